"""What a rank knows about its device: its name, and what the choice of kernels needs."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from megatron_bert.config.kernels import ComputeDevice
from megatron_bert.config.schema import DeviceChoice


def device_name(device: torch.device) -> str:
    """The GPU's name, as its driver gives it, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def facts_of(device: torch.device) -> ComputeDevice:
    """What a rank knows about its device; Triton is looked for, not imported."""
    if device.type != "cuda":
        return ComputeDevice("cpu")
    capability = torch.cuda.get_device_capability(device)
    return ComputeDevice("cuda", capability, has_triton=find_spec("triton") is not None)


def facts_at_hand(requested: DeviceChoice) -> ComputeDevice:
    """What this machine knows about the devices of a run with this `run.device`.

    It knows nothing about GPUs that the run asks for but this machine lacks: a run may be prepared
    anywhere.
    """
    if requested != "cpu" and torch.cuda.is_available():
        return facts_of(torch.device("cuda", 0))
    return ComputeDevice("cuda" if requested == "cuda" else "cpu")

"""The name of the device that figures are measured on."""

from __future__ import annotations

import torch


def device_name(device: torch.device) -> str:
    """The GPU's name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"

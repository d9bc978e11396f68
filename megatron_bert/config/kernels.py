"""Which kernels compute attention, linear layers, norms and the update, and where they can run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from megatron_bert.config.arithmetic import computed_lengths
from megatron_bert.config.schema import Config, KernelsChoice, KernelsName

# From this capability on, GPUs compute in BF16, which our kernels need.
KERNEL_CAPABILITY = (8, 0)

# Head sizes that our attention kernels, which never store the scores, support.
_HEAD_SIZES = (16, 32, 64, 128)

# The rows and columns of FP8 products must be multiples of this.
_FP8_MULTIPLE = 16

_MEANING: dict[KernelsName, str] = {
    "torch": "PyTorch's, on CUDA attention (BF16) and the head's softmax our own",
    "fused": "our own between the blocks' products, the rest as with torch",
    "te": "Transformer Engine's linear layers, the rest as with torch",
    "apex": "Apex's norms and AdamW, the rest as with torch",
}


@dataclass(frozen=True)
class ComputeDevice:
    """What the choice of kernels depends on.

    Attributes:
        kind: `cuda` or `cpu`.
        capability: a GPU's compute capability. By default it is new enough: planners choose for a
            GPU that is not at hand.
        has_triton: whether the package triton is installed there; true by default, likewise.
    """

    kind: str
    capability: tuple[int, int] = KERNEL_CAPABILITY
    has_triton: bool = True

    @property
    def runs_our_kernels(self) -> bool:
        """Whether our kernels, which Triton compiles for CUDA, can run here."""
        return self.kind == "cuda" and self.has_triton and self.capability >= KERNEL_CAPABILITY

    def runs_our_attention(self, compute: str, head_dim: int) -> bool:
        """Whether our kernels compute attention of this compute dtype and head size here."""
        return self.runs_our_kernels and compute == "bf16" and head_dim in _HEAD_SIZES


def chosen_kernels(config: Config, device: ComputeDevice) -> KernelsName:
    """The kernels used on a device; `auto` stands for the fastest measured that it supports.

    Args:
        config: the whole configuration; `run.device: cpu` overrides `device`.
        device: what is known of the device.
    """
    if config.kernels != "auto":
        return config.kernels
    runs = device.runs_our_kernels and config.run.device != "cpu"
    fits = runs and config.precision.compute == "bf16"
    return "fused" if fits and not any(_fused_conflicts(config, "auto")) else "torch"


def records_passes(config: Config, device: ComputeDevice) -> bool:
    """Whether passes are recorded and replayed (`compile.cuda_graphs`; `auto`: where possible).

    Args:
        config: the whole configuration, with the layout of the run; `run.device: cpu` overrides
            `device`.
        device: what is known of the device.
    """
    asked = config.compile.cuda_graphs
    if asked != "auto":
        return asked
    runs = device.kind == "cuda" and config.run.device != "cpu"
    return runs and not any(_recording_conflicts(config))


def describe_kernels(config: Config, device: ComputeDevice) -> str:
    """The kernels that the run computes with, in words, for its plan."""
    name = chosen_kernels(config, device)
    shown = f"{name} (auto)" if config.kernels == "auto" else name
    fp8 = config.precision.fp8
    products = "the feed-forward networks' products" if name == "fused" else "products"
    return f"{shown}: {_MEANING[name]}{'' if fp8 == 'none' else f'; {products} in FP8 ({fp8})'}"


def kernel_conflicts(config: Config) -> Iterator[str]:
    """Conflicts of `kernels` with the rest of the configuration, on any machine."""
    key = f"kernels = {config.kernels}"
    if config.kernels == "fused":
        yield from _fused_conflicts(config, key)
    if config.kernels == "te":
        yield from _te_conflicts(config, key)
    if config.compile.cuda_graphs is True:
        yield from _recording_conflicts(config)


def kernel_problems(config: Config) -> Iterator[str]:
    """What this machine lacks for `kernels`."""
    kernels = config.kernels
    if config.compile.cuda_graphs is True and config.run.device == "cpu":
        yield (
            "compile.cuda_graphs = true: they are CUDA's and run.device = cpu; use "
            "compile.cuda_graphs=false"
        )
    if kernels in ("auto", "torch"):
        return
    key = f"kernels = {kernels}"
    others = ", ".join(name for name in get_args(KernelsChoice) if name != kernels)
    if config.run.device == "cpu":
        yield f"{key}: it computes on CUDA only and run.device = cpu; use torch or auto"
        return
    if kernels == "fused" and find_spec("triton") is None:
        yield (
            f"{key}: the package triton is not installed; install PyTorch for CUDA, which comes "
            "with it, or use kernels=torch"
        )
    if kernels == "te" and find_spec("transformer_engine") is None:
        yield (
            f"{key}: the package transformer_engine is not installed; on a machine with CUDA "
            "pip install --no-build-isolation 'transformer_engine[pytorch]', or use one of "
            f"{others}"
        )
    if kernels == "apex" and not has_nvidias_apex():
        found = "is not NVIDIA's" if find_spec("apex") else "is not installed"
        yield (
            f"{key}: the package apex {found}: there is no apex.optimizers.FusedAdam (the package "
            "registry's apex is another project); build https://github.com/NVIDIA/apex with its "
            f"CUDA extensions, or use one of {others}"
        )


def _te_conflicts(config: Config, key: str) -> Iterator[str]:
    if config.precision.compute != "bf16":
        yield (
            f"{key}: Transformer Engine multiplies fp32 in TF32, of 10 bits after the point, and "
            f"precision.compute = {config.precision.compute}; use precision.compute=bf16, or "
            "kernels=torch"
        )
    if config.parallel.schedule.splits_backward:
        yield (
            f"{key}: Transformer Engine computes both gradients of a layer at once, and "
            f"parallel.pipeline_schedule = {config.parallel.pipeline_schedule} takes them apart; "
            "use kernels=torch, or parallel.pipeline_schedule=interleaved"
        )


def _fused_conflicts(config: Config, key: str) -> Iterator[str]:
    if config.compile.enabled:
        yield (
            f"{key}: its kernels stand where compiled ones would and compile.enabled = true; use "
            "compile.enabled=false, or kernels=torch"
        )
    if config.precision.fp8 != "none" and config.parallel.tensor > 1:
        yield (
            f"{key}: it scales FP8 numbers by what one rank knows, precision.fp8 = "
            f"{config.precision.fp8} and parallel.tensor = {config.parallel.tensor}; use "
            "parallel.tensor=1, or kernels=torch"
        )


def _recording_conflicts(config: Config) -> Iterator[str]:
    """Conflicts with recording, which needs one rank's whole pass and the same kernels every time.

    Everything else that can be configured can be recorded: sizes on the device follow from shapes
    alone, nothing is read back to the host, and recomputation draws from no random generator. The
    scales of FP8 stay on the device too.
    """
    key, other = "compile.cuda_graphs = true", "or compile.cuda_graphs=false"
    parallel = config.parallel
    for name, ranks in (("tensor", parallel.tensor), ("pipeline", parallel.pipeline)):
        if ranks > 1:
            yield (
                f"{key}: passes are recorded without messages and parallel.{name} = {ranks}; use "
                f"parallel.{name}=1, {other}"
            )
    if parallel.reshard_after_forward:
        yield (
            f"{key}: recorded passes find weights where they were and "
            "parallel.reshard_after_forward = true gives their memory away; use "
            f"parallel.reshard_after_forward=false, {other}"
        )
    if config.compile.enabled:
        yield (
            f"{key}: the compiler takes no weights whose gradients are added up in another type "
            f"and compile.enabled = true; use compile.enabled=false, {other}"
        )
    if config.kernels in ("te", "apex"):
        yield f"{key}: kernels = {config.kernels} cannot be recorded; use kernels=auto, {other}"


def has_nvidias_apex() -> bool:
    """Look for the optimizer's file: importing another project's apex might do anything."""
    package = find_spec("apex")
    places = [] if package is None else package.submodule_search_locations or []
    return any((Path(place) / "optimizers" / "fused_adam.py").is_file() for place in places)


def fp8_changes(old: Mapping[str, Any], config: Config, device: ComputeDevice) -> Iterator[str]:
    """Changes of kernels by which a resumed run would compute other products in FP8 than before.

    Args:
        old: the configuration that the run was trained with, as plain values.
        config: the configuration that it continues with; `precision.fp8` is the same.
        device: what is known of the device that it continues on.
    """
    if config.precision.fp8 == "none":
        return
    given = {
        "kernels": old.get("kernels"),
        "parallel.tensor": old.get("parallel", {}).get("tensor"),
        "compile.enabled": old.get("compile", {}).get("enabled"),
    }
    keys = {name: value for name, value in given.items() if value is not None}
    before, after = (chosen_kernels(one, device) for one in (config.with_keys(keys), config))
    # All other kernels multiply as `torch` does.
    if before != after and {before, after} & {"fused", "te"}:
        yield (
            f"precision.fp8 = {config.precision.fp8}: with kernels = {after} other products are in "
            f"FP8 than with {before}, by which this run was trained (kernels, parallel.tensor and "
            "compile.enabled decide it); restore these, or branch off: set checkpoint.resume to "
            "the checkpoint and run.dir to a new directory"
        )


def _fp8_sizes(config: Config) -> dict[str, tuple[int, int]]:
    """Widths of the matrices multiplied in FP8, and over how many ranks each is sharded.

    `kernels: auto` counts as what it means on a GPU: PyTorch's products on a CPU take any size.
    """
    model, tensor = config.model, config.parallel.tensor
    sizes = {
        "model.hidden_size": (model.hidden_size, tensor),
        "model.ffn_hidden_size": (model.ffn_hidden_size, tensor),
    }
    # Fused blocks leave the products around attention in BF16.
    if chosen_kernels(config, ComputeDevice("cuda")) != "fused":
        sizes["model.num_query_groups x head size"] = (model.kv_size, model.kv_ranks(tensor))
    return sizes


def fp8_problems(config: Config) -> Iterator[str]:
    """Conflicts of `precision.fp8` with the rest of the configuration."""
    if config.precision.fp8 == "none":
        return
    key = f"precision.fp8 = {config.precision.fp8}"
    if config.parallel.schedule.splits_backward:
        yield (
            f"{key}: it computes both gradients of a layer at once, and "
            f"parallel.pipeline_schedule = {config.parallel.pipeline_schedule} takes them apart; "
            "use parallel.pipeline_schedule=interleaved, or precision.fp8=none"
        )
    if config.precision.compute != "bf16":
        yield (
            f"{key}: the rest is then in BF16 and precision.compute = {config.precision.compute}; "
            "use precision.compute=bf16, or precision.fp8=none"
        )
    for name, (size, parts) in _fp8_sizes(config).items():
        if size % (parts * _FP8_MULTIPLE):
            over = f" over parallel.tensor = {parts} ranks" if parts > 1 else ""
            yield (
                f"{key}: {name} = {size}{over} gives products whose sides are no multiple of "
                f"{_FP8_MULTIPLE}; use a multiple of {parts * _FP8_MULTIPLE}, or precision.fp8=none"
            )
    for name, length in computed_lengths(config).items():
        if length % _FP8_MULTIPLE:
            yield (
                f"{key}: {name} = {length} is no multiple of {_FP8_MULTIPLE}; use "
                f"{length - length % _FP8_MULTIPLE + _FP8_MULTIPLE}, or precision.fp8=none"
            )

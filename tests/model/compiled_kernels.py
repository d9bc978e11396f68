"""What Triton makes of every kernel of the project, for GPUs that need not be there.

A process of its own, since where the interpreter is on Triton compiles nothing:
`python -m tests.model.compiled_kernels` prints as JSON a list of (compute capability, kernel, what
it takes), or in place of the last why it was not compiled.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_bert.config.presets import PRESETS
from megatron_bert.config.schema import ModelConfig
from megatron_bert.model import (
    flash_attention,
    flash_gradient_kernels,
    flash_kernels,
    flash_tiles,
    fp8_kernels,
    fused_activation_kernels,
    fused_norm_kernels,
    fused_tiles,
)
from megatron_bert.parallel import column_sums, softmax_kernels, softmax_rows

# Of the arguments that are not arrays of the compute type, by their names.
_TYPES = {
    "BEGINS": "*i32",
    "ENDS": "*i32",
    "ROW_KEYS": "*i64",
    "LABELS": "*i32",
    "TOKEN_DRAWS": "*i32",
    "CHANNEL_DRAWS": "*i32",
    "DRAWS": "*i32",
    **dict.fromkeys(("LOG_SUM", "DELTA", "DQ_SUMS", "DKV_SUMS", "DK_PARTS", "DV_PARTS"), "*fp32"),
    **dict.fromkeys(("q_step", "kv_step", "dq_step", "dkv_step"), "i32"),
    **dict.fromkeys(
        ("SUMS", "MEAN", "RSTD", "PARTS", "WEIGHTS", "LARGEST", "LABEL_LOGIT"), "*fp32"
    ),
    **dict.fromkeys(
        ("count", "T", "D", "F", "S", "N", "size", "heads", "first_head", "threshold"), "i32"
    ),
    **dict.fromkeys(("eps", "keep_scale", "scale", "gradient_scale"), "fp32"),
    **dict.fromkeys(("format_largest", "smallest_scale"), "fp32"),
    **dict.fromkeys(("SCALE", "GRAD_SCALE", "SCALES"), "*fp32"),
    **dict.fromkeys(("COLUMNS_PACKED", "GRAD_COLUMNS_PACKED"), "*i32"),
    "GRAD_NUMBERS": "*fp8e5",
    "column_length": "i32",
}
# Sizes are multiples of 16, as arrays' addresses are.
_DIVISIBLE = (
    "T",
    "D",
    "F",
    "S",
    "N",
    "size",
    "column_length",
    "q_step",
    "kv_step",
    "dq_step",
    "dkv_step",
)


_MODULES = (
    column_sums,
    flash_gradient_kernels,
    flash_kernels,
    fp8_kernels,
    fused_activation_kernels,
    fused_norm_kernels,
    softmax_kernels,
)


@dataclass(frozen=True)
class Case:
    """A kernel as it is launched for a model.

    Attributes:
        name: of the kernel and of what is computed.
        options: its constants and how it is cut up.
        compute: the type of what it reads and writes.
    """

    name: str
    options: dict[str, Any]
    compute: str = "bf16"

    @property
    def kernel(self) -> Any:
        name = f"{self.name.split()[0]}_kernel"
        return next(getattr(module, name) for module in _MODULES if hasattr(module, name))


def cases() -> Iterator[tuple[int, Case]]:
    """Compute capabilities, and kernels as RetrievaBERT's and ModernBERT's layers launch them.

    On what was not tuned for, the larger of the two, with dropout, is enough; where a program may
    share least, fused kernels also in fp32 and for a wide model.
    """
    model, modern = (
        ModelConfig(**PRESETS[name]) for name in ("retrievabert-1.3b", "modernbert-base")
    )
    wide = model.model_copy(update={"hidden_size": 5120, "ffn_hidden_size": 13824})
    wide_heads = model.model_copy(update={"num_attention_heads": model.hidden_size // 128})
    for capability in (80, 86, 89, 90, 100):
        kernels = {**_flash(model, True), **_fused(model, True), **_softmax()}
        for name, options in kernels.items():
            yield capability, Case(f"{name} retrievabert-1.3b", options)
    # From Ada on GPUs have FP8.
    for capability in (89, 90, 100):
        for name, options in _fp8(model, True).items():
            yield capability, Case(f"{name} retrievabert-1.3b", options)
    for name, options in _fp8(wide, True).items():
        yield 89, Case(f"{name} wide", options)
    for name, options in {
        **_flash(modern, False),
        **_fused(modern, False),
        **_fp8(modern, False),
    }.items():
        yield 90, Case(f"{name} modernbert-base", options)
    for name, options in _fused(model, True).items():
        yield 86, Case(f"{name} retrievabert-1.3b in fp32", options, "fp32")
    for name, options in _fused(wide, True).items():
        yield 86, Case(f"{name} wide", options)
    for name, options in _flash(wide_heads, True).items():
        yield 86, Case(f"{name} heads of 128", options)


def _flash(model: ModelConfig, dropout: bool) -> dict[str, dict[str, Any]]:
    tiling = flash_tiles.ATTENTION_TILING
    sharing = model.num_attention_heads // model.num_query_groups
    reach = model.local_attention // 2 if model.family.alternates else -1
    meta = {
        "SHARING": sharing,
        "DROPOUT": dropout,
        "REACH": reach,
        "SIZE": model.head_dim,
        "EVEN": True,
    }
    forward, query_gradient, key_gradient = (
        meta | tile.of_heads(model.head_dim).options()
        for tile in (tiling.forward, tiling.query_gradient, tiling.key_gradient)
    )
    return {
        "flash_forward": forward,
        "flash_query_gradient": query_gradient | {"SUMS": True},
        "flash_key_gradient": key_gradient | {"SUMS": True, "HEADS": sharing},
        "flash_key_sum": {
            "GROUPS": model.num_query_groups,
            "PARTS": 2,
            "SIZE": model.head_dim,
            "SLOTS": flash_attention._SUMMED_SLOTS,
            "num_warps": 4,
        },
    }


def _fused(model: ModelConfig, dropout: bool) -> dict[str, dict[str, Any]]:
    tiling, biases = fused_tiles.ROW_TILING, model.family.biases
    rows, activation = tiling.rows(model.hidden_size), tiling.activation
    gradient = tiling.gradient_rows(model.hidden_size).options(loops=True)
    norm, branch = {"HAS_BIAS": biases}, {"HAS_BRANCH_BIAS": biases, "DROPOUT": dropout}
    gated = {"BIASES": biases, "GELU": model.family.activation == "gelu"}
    forward = norm | branch | {"HAS_BRANCH": True, "NORM": True, "SCALED": False} | rows.options()
    return {
        "fused_residual_norm": forward,
        "fused_norm_again": norm | rows.options(),
        "fused_residual_norm_gradient": norm | branch | gradient,
        "fused_branch_gradient": branch | rows.options(loops=True),
        "fused_gated_activation": gated | activation.options(),
        "fused_gated_activation_gradient": gated | activation.options(loops=True),
    }


def _fp8(model: ModelConfig, dropout: bool) -> dict[str, dict[str, Any]]:
    tiling, biases = fused_tiles.ROW_TILING, model.family.biases
    gated = {"BIASES": biases, "GELU": model.family.activation == "gelu"}
    formats, norm = {"FORMAT": tl.float8e4nv}, {"HAS_BIAS": biases}
    cast = {"DROPOUT": dropout, "SUMS": biases, "HAS_ROWS": True, "HAS_COLUMNS": True}
    columns = formats | norm | tiling.fp8.options()
    scaled = {"HAS_BRANCH": True, "HAS_BRANCH_BIAS": biases, "DROPOUT": dropout, "NORM": True}
    scaled |= norm | {"SCALED": True} | tiling.rows(model.hidden_size).options()
    gradient = formats | {"GRAD_FORMAT": tl.float8e5} | gated
    loops = tiling.fp8.options(loops=True)
    weight = formats | {"DROPOUT": False, "SUMS": False} | loops
    return {
        "fp8_cast": {"FORMAT": tl.float8e5} | cast | loops,
        "fp8_cast of a weight's rows": weight | {"HAS_ROWS": True, "HAS_COLUMNS": False},
        "fp8_cast of a weight's columns": weight | {"HAS_ROWS": False, "HAS_COLUMNS": True},
        "fused_residual_norm in fp8": scaled,
        "fp8_norm_columns": columns,
        "fp8_gated_activation": gated | tiling.whole_rows(model.ffn_hidden_size).options(),
        "fp8_gated_activation_gradient": gradient | tiling.fp8_gradient.options(loops=True),
    }


def _softmax() -> dict[str, dict[str, Any]]:
    options = {"COLUMNS": softmax_rows._COLUMNS, "num_warps": softmax_rows._WARPS}
    sums = {"TILE": column_sums._TILE, "COLUMNS": column_sums._COLUMNS}
    return {
        "softmax_statistics": options,
        "softmax_gradient": options,
        "column_sums": sums | {"num_warps": column_sums._WARPS},
    }


def compiled(case: Case, capability: int) -> dict[str, int]:
    """Compile a kernel: registers of a thread, and bytes of its stack and of a program."""
    launch = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
    constants = {n: v for n, v in case.options.items() if n not in launch}
    names = case.kernel.arg_names
    found = _TYPES | _formats(case.options)
    types = {n: "constexpr" if n in constants else found.get(n, f"*{case.compute}") for n in names}
    divisible = [n for n in names if types[n].startswith("*") or n in _DIVISIBLE]
    source = ASTSource(
        case.kernel,
        types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    made = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={name: case.options[name] for name in launch if name in case.options},
    )
    usage = _resource_usage(made.asm["cubin"])
    return {
        "warps": case.options["num_warps"],
        "registers": usage["REG"],
        "spilled": usage["STACK"] + usage["LOCAL"],
        "shared": made.metadata.shared,
    }


def _formats(options: dict[str, Any]) -> dict[str, str]:
    """Types of the arrays that a kernel writes in FP8."""
    made = "*fp8e5" if options.get("FORMAT") == tl.float8e5 else "*fp8e4nv"
    return {"NUMBERS": made} | ({"NORMED": made} if options.get("SCALED") else {})


def _resource_usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(count) for name, count in re.findall(r"\b([A-Z]+):(\d+)", printed)}


def _tried(case: tuple[int, Case]) -> dict[str, int] | str:
    try:
        return compiled(case[1], case[0])
    except (AttributeError, ImportError, TypeError) as error:
        # Kernels that cannot be compiled raise errors of Triton's own.
        return f"Triton {triton.__version__} is called otherwise: {type(error).__name__}: {error}"


def main() -> None:
    """Print what the kernels take."""
    pairs = list(cases())
    with ProcessPoolExecutor() as pool:
        figures = list(pool.map(_tried, pairs))
    found = [(*pair, figure) for pair, figure in zip(pairs, figures, strict=True)]
    json.dump([[capability, case.name, figure] for capability, case, figure in found], sys.stdout)


if __name__ == "__main__":
    main()

"""FP8 numbers in Triton's interpreter as GPUs make them.

The interpreter's own (3.6 to 3.9) are wrong: what rounding should carry over to the next power of
two gets lost, so that 1.99 becomes 1. And it knows no instructions of a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from megatron_bert.model import fp8_kernels

_FORMATS = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}


@triton.jit  # type: ignore[untyped-decorator]
def _packed(a, b, c, d, inverse, FORMAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """What the kernels' `_packed` makes."""
    low = (a * inverse).to(FORMAT).to(tl.uint8, bitcast=True).to(tl.uint32)
    low |= (b * inverse).to(FORMAT).to(tl.uint8, bitcast=True).to(tl.uint32) << 8
    high = (c * inverse).to(FORMAT).to(tl.uint8, bitcast=True).to(tl.uint32)
    high |= (d * inverse).to(FORMAT).to(tl.uint8, bitcast=True).to(tl.uint32) << 8
    return (low | (high << 16)).to(tl.int32, bitcast=True)


@contextmanager
def casts_of_a_gpu() -> Iterator[None]:
    """Round to nearest, and to the format's largest number what passes it."""
    convert = interpreter._convert_float

    def converted(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if source != tl.float32 or target not in _FORMATS:
            return convert(values, source, target, mode)
        numbers = torch.from_numpy(np.ascontiguousarray(values).view(np.float32))
        largest = torch.finfo(_FORMATS[target]).max
        return numbers.clamp(-largest, largest).to(_FORMATS[target]).view(torch.uint8).numpy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", converted)
        patch.setattr(fp8_kernels, "_packed", _packed)
        yield

"""How the fused kernels are tiled."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megatron_bert.config.arithmetic import ceil_div


def launch_options(warps: int, registers: int | None) -> dict[str, int]:
    """The keyword arguments of any kernel's launch; `registers` are the most per thread."""
    options = {"num_warps": warps, "enable_fp_fusion": True}
    return options if registers is None else options | {"maxnreg": registers}


@dataclass(frozen=True)
class RowTile:
    """How a kernel on rows of tokens is tiled.

    Attributes:
        tokens: tokens per tile.
        columns: columns per tile; all of them where rows are summed.
        warps: warps that share a tile.
        stages: pipeline stages of tiles loaded ahead, where a program takes several tiles.
        registers: most registers per thread; None leaves that to the compiler.
    """

    tokens: int
    columns: int
    warps: int
    stages: int = 2
    registers: int | None = None

    def programs(self, tokens: int, most: int) -> int:
        """Number of programs, up to `most`, of a kernel whose programs take several tiles each."""
        return min(ceil_div(tokens, self.tokens), most)

    def options(self, *, loops: bool = False) -> dict[str, int]:
        """The keyword arguments of a kernel's launch."""
        sizes = {"TOKENS": self.tokens, "COLUMNS": self.columns}
        looping = {"STAGES": self.stages} if loops else {}
        return sizes | launch_options(self.warps, self.registers) | looping


@dataclass(frozen=True)
class RowTiling:
    """How these kernels are tiled, by the registers and the bytes in flight that each needs.

    Attributes:
        elements: elements per tile of whole rows, unless one row has more: enough rows that the
            parameter vectors, which each program reads, weigh little beside them.
        gradient_elements: the same for the norm's gradient, which holds more arrays at once.
        activation: tile of the activation and its gradient.
        row_programs: programs that take all whole rows in turn; two run at once on each of an
            H100's 132 multiprocessors.
        activation_programs: the same for the activation's gradient, of which three run at once.
        fp8: tile of what is also written as columns, each as long as a tile has tokens.
        fp8_gradient: the same for the activation's gradient.
        fp8_programs: programs that take all tiles of either in turn.
    """

    elements: int = 8192
    gradient_elements: int = 4096
    activation: RowTile = RowTile(8, 256, 4)
    row_programs: int = 264
    activation_programs: int = 396
    fp8: RowTile = RowTile(64, 64, 4)
    fp8_gradient: RowTile = RowTile(64, 64, 8, registers=128)
    fp8_programs: int = 1056

    def rows(self, size: int) -> RowTile:
        """A tile of rows of D elements."""
        return _of_rows(size, self.elements)

    def whole_rows(self, size: int) -> RowTile:
        """A tile of one row of F elements: scaling it takes all of gate, up and the row at once."""
        columns = 1 << (size - 1).bit_length()
        return RowTile(1, columns, min(16, max(1, columns // 1024)))

    def gradient_rows(self, size: int) -> RowTile:
        """The same as `rows`, for the norm's gradient."""
        return _of_rows(size, self.gradient_elements)


@lru_cache
def _of_rows(size: int, elements: int) -> RowTile:
    columns = 1 << (size - 1).bit_length()
    tokens = min(16, max(1, elements // columns))
    # 16 to 32 elements of an array per thread.
    most = 8 if columns <= 4096 else 16
    return RowTile(tokens, columns, min(most, max(1, tokens * columns // 512)))


ROW_TILING = RowTiling()

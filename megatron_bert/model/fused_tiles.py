"""How the fused kernels are cut up."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache


def cdiv(number: int, size: int) -> int:
    """How many tiles of a size hold a number; Triton's own function takes microseconds."""
    return -(-number // size)


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut up.

    Attributes:
        tokens: of a tile.
        columns: of a tile, all of them where rows are summed.
        warps: that share a tile.
        stages: of tiles that are loaded ahead, in a kernel that takes several.
        registers: of a thread at most; None: as many as the compiler likes.
    """

    tokens: int
    columns: int
    warps: int
    stages: int = 2
    registers: int | None = None

    def programs(self, tokens: int, most: int) -> int:
        """Programs of a kernel that takes several tiles each."""
        return min(cdiv(tokens, self.tokens), most)

    def options(self, *, loops: bool = False) -> dict[str, int]:
        """As a kernel's launch takes them."""
        options = {
            "TOKENS": self.tokens,
            "COLUMNS": self.columns,
            "num_warps": self.warps,
            "enable_fp_fusion": True,
        }
        if self.registers is not None:
            options["maxnreg"] = self.registers
        return options | ({"STAGES": self.stages} if loops else {})


@dataclass(frozen=True)
class Tiling:
    """How kernels are cut up, by their registers and by the bytes that they have under way.

    Attributes:
        elements: of a tile of whole rows, where a row has no more: enough rows that vectors of
            parameters, which each program reads, weigh little beside them.
        gradient_elements: the same of the norm's gradient, which holds more arrays at once.
        activation: of the activation and its gradient.
        row_programs: that take all whole rows in turn; two run on each of an H100's 132
            multiprocessors at once.
        activation_programs: the same of the activation's gradient, of which three do.
        fp8: of what is written as columns too: these are as long as a tile has tokens.
        fp8_gradient: the same of the activation's gradient.
        fp8_programs: that take all tiles of both in turn.
    """

    elements: int = 8192
    gradient_elements: int = 4096
    activation: Tile = Tile(8, 256, 4)
    row_programs: int = 264
    activation_programs: int = 396
    fp8: Tile = Tile(64, 64, 4)
    fp8_gradient: Tile = Tile(64, 64, 8, registers=128)
    fp8_programs: int = 1056

    def rows(self, size: int) -> Tile:
        """A tile of rows of D elements."""
        return _of_rows(size, self.elements)

    def whole_rows(self, size: int) -> Tile:
        """A tile of one row of F elements: what scales rows holds all of gate, up and itself."""
        columns = 1 << (size - 1).bit_length()
        return Tile(1, columns, min(16, max(1, columns // 1024)))

    def gradient_rows(self, size: int) -> Tile:
        """The same of the norm's gradient."""
        return _of_rows(size, self.gradient_elements)


@lru_cache
def _of_rows(size: int, elements: int) -> Tile:
    columns = 1 << (size - 1).bit_length()
    tokens = min(16, max(1, elements // columns))
    # 16 to 32 elements of an array a thread.
    most = 8 if columns <= 4096 else 16
    return Tile(tokens, columns, min(most, max(1, tokens * columns // 512)))


TILING = Tiling()

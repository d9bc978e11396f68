"""How the fused kernels are cut up."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut up.

    Attributes:
        tokens: of a tile.
        columns: of a tile, all of them where rows are summed.
        stages: of tiles that are loaded ahead, in a kernel that takes several.
    """

    tokens: int
    columns: int
    stages: int = 2

    @property
    def warps(self) -> int:
        """That share a tile: 16 elements of each array a thread."""
        return min(16, max(1, self.tokens * self.columns // (32 * 16)))

    def programs(self, tokens: int, most: int) -> int:
        """That take a number of tokens in turn, where a kernel's loop over tiles."""
        return min(-(-tokens // self.tokens), most)

    def options(self, *, loops: bool = False) -> dict[str, int]:
        """As a kernel's launch takes them."""
        stages = {"STAGES": self.stages} if loops else {}
        return {"TOKENS": self.tokens, "COLUMNS": self.columns, "num_warps": self.warps} | stages


@dataclass(frozen=True)
class Tiling:
    """How kernels are cut up, by their registers and by the bytes that they have under way.

    Attributes:
        elements: of a tile of whole rows, where a row has no more.
        activation: of the activation and its gradient.
        row_programs: that take all whole rows in turn; two run on each of an H100's 132
            multiprocessors at once.
        activation_programs: the same of the activation's gradient, of which three do.
    """

    elements: int = 4096
    activation: Tile = Tile(8, 256)
    row_programs: int = 264
    activation_programs: int = 396

    def of_rows(self, size: int) -> Tile:
        """A tile of rows of D elements."""
        columns = 1 << (size - 1).bit_length()
        return Tile(min(16, max(1, self.elements // columns)), columns)


TILING = Tiling()

"""Make figures with Matplotlib, and write them where a user says."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_bert.command_line.arguments import argument
from megatron_bert.command_line.places import write_output
from megatron_bert.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_name(picture: Path) -> None:
    """Refuse a picture's name before any work begins.

    Raises:
        UserError: it ends neither in `.svg` nor in `.png`.
    """
    if picture.suffix not in (".svg", ".png"):
        raise UserError(f"{argument('picture')} {picture}: give a name that ends in .svg or .png")


def figure_class() -> type[Figure]:
    """Matplotlib's `Figure`, which needs no display.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            f"matplotlib, which draws pictures, cannot be imported by {sys.executable}; install "
            "it there: python -m pip install matplotlib"
        ) from error
    return Figure


def write_figure(figure: Figure, picture: Path) -> None:
    """Write a figure as `.svg` or `.png`, by the name's ending: whole, or not at all.

    Raises:
        UserError: the name has another ending, the path climbs out of a folder that it names, or
            the file cannot be written.
    """
    check_name(picture)
    if picture.suffix == ".svg":
        write_output(picture, _as_svg(figure))
        return
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_output(picture, buffer.getvalue())


def _as_svg(figure: Figure) -> str:
    from matplotlib import rc_context

    buffer = io.StringIO()
    # Text stays text, and the same figure gives the same bytes.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "megatron_bert"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()

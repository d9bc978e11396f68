"""Generated tables of the documentation, between markers in a page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from megatron_bert.command_line.parser import Parser
from megatron_bert.errors import ConfigError


def guide_to_write(arguments: Sequence[str] | None, file: str, description: str | None) -> Path:
    """Path of the page, in the folder that the command line's `--docs` gives.

    Raises:
        ConfigError: The page does not exist.
    """
    parser = Parser(description=description)
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of the page")
    guide: Path = parser.parse_args(arguments).docs / file
    if not guide.is_file():
        raise ConfigError(
            f"the document {guide} does not exist; run in the checkout's root or give --docs"
        )
    return guide


def with_tables(guide: str, file: str, tables: Mapping[str, Iterable[str]]) -> str:
    """A page's text with its tables replaced; text outside the markers is kept.

    Args:
        guide: the text, in which `<!-- NAME: begin -->` and `<!-- NAME: end -->` enclose a table.
        file: the page's name, for errors.
        tables: lines of each table by name; read only once its markers are found.

    Raises:
        ConfigError: A marker is missing.
    """
    for name, lines in tables.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, found_begin, rest = guide.partition(begin)
        _, found_end, after = rest.partition(end)
        if not found_begin or not found_end:
            raise ConfigError(f"{file}: markers {begin} and {end} are missing; restore them")
        guide = "\n".join([before + begin, *lines, end + after])
    return guide

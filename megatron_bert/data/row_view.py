"""Rows as coloured text for a terminal, and as a page of HTML."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator

from megatron_bert.data.batch import Replacement
from megatron_bert.data.row_inspection import ShownRow, ShownToken

_LEGEND = {
    Replacement.MASKED: "[<MASK>|word]: hidden, to be predicted",
    Replacement.RANDOM: "[other|word]: another one in its place, to be predicted",
    Replacement.KEPT: "[=|word]: left as it was, to be predicted",
}
# ANSI codes: neighbouring segments differ in colour, and each replacement has its own style.
_SEGMENT_COLOURS = ("32", "36", "33", "34", "35")
_KIND_COLOURS = {
    Replacement.MASKED: "7",
    Replacement.RANDOM: "1;37;41",
    Replacement.KEPT: "1;4",
}


def legend(*, coloured: bool) -> Iterator[str]:
    """Yield a line for each mark in a row's text, with its meaning."""
    for kind, meaning in _LEGEND.items():
        mark, _, rest = meaning.partition(": ")
        yield f"{_paint(mark, _KIND_COLOURS[kind], coloured=coloured)}  {rest}"


def _row_lines(row: ShownRow, *, coloured: bool) -> Iterator[str]:
    """Yield a row's title and a line for each segment; nothing depends on the colours alone."""
    yield _title(row)
    for number, tokens in enumerate(row.segments):
        colour = _SEGMENT_COLOURS[number % len(_SEGMENT_COLOURS)]
        words = (
            _paint(_marked(t), _KIND_COLOURS.get(t.replacement, colour), coloured=coloured)
            for t in tokens
        )
        yield f"  {' '.join(words)}"


def item_lines(item: ShownRow | str, *, coloured: bool) -> Iterator[str]:
    """Yield the lines of what `show_rows` gives."""
    if isinstance(item, str):
        yield item
    else:
        yield from _row_lines(item, coloured=coloured)


def page(title: str, items: Iterable[ShownRow | str]) -> str:
    """A self-contained page of HTML, with rows and lines in the order they come in."""
    body, lines = [], []
    for item in items:
        if isinstance(item, str):
            lines.append(html.escape(item))
            continue
        body += _preformatted(lines)
        lines = []
        body.append(_row_html(item))
    body += _preformatted(lines)
    marks = "".join(
        f'<li><span class="{kind.value}">{kind.value}</span> '
        f"{html.escape(_LEGEND[kind].partition(': ')[2])}</li>"
        for kind in _LEGEND
    )
    return _PAGE.format(title=html.escape(title), marks=marks, body="\n".join(body))


def _title(row: ShownRow) -> str:
    return (
        f"row {row.row}: {len(row.segments)} segment(s), {row.predicted} to be predicted, "
        f"{row.padding} slot(s) of padding"
    )


def _marked(token: ShownToken) -> str:
    if token.replacement is Replacement.NONE:
        return token.seen
    return f"[{'=' if token.replacement is Replacement.KEPT else token.seen}|{token.label}]"


def _paint(text: str, colour: str, *, coloured: bool) -> str:
    return f"\x1b[{colour}m{text}\x1b[0m" if coloured else text


def _row_html(row: ShownRow) -> str:
    segments = "".join(
        f'<p class="segment">{" ".join(map(_token_html, tokens))}</p>' for tokens in row.segments
    )
    return f"<section><h2>{_title(row)}</h2>{segments}</section>"


def _token_html(token: ShownToken) -> str:
    seen, label = html.escape(token.seen), html.escape(token.label)
    if token.replacement is Replacement.NONE:
        return seen
    under = "" if token.replacement is Replacement.KEPT else f"<small>{label}</small>"
    kind = token.replacement.value
    return f'<span class="{kind}" title="{kind}">{seen}{under}</span>'


def _preformatted(lines: list[str]) -> list[str]:
    return ["<pre>{}</pre>".format("\n".join(lines))] if lines else []


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font-family: sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff; }}
h2 {{ font-size: 1rem; }}
ul {{ list-style: none; padding: 0; }}
pre {{ background: #f4f4f4; padding: 0.5rem; overflow: auto; }}
.segment {{ margin: 0; padding: 0.3rem; line-height: 2; overflow-wrap: anywhere; }}
.segment:nth-of-type(4n+1) {{ background: #e8f2fc; }}
.segment:nth-of-type(4n+2) {{ background: #e9f7ea; }}
.segment:nth-of-type(4n+3) {{ background: #fdf3dd; }}
.segment:nth-of-type(4n) {{ background: #f6eafa; }}
.masked, .random, .kept {{ border-radius: 0.2rem; padding: 0.1rem 0.2rem; }}
.masked {{ background: #333; color: #fff; }}
.random {{ background: #b00020; color: #fff; }}
.kept {{ outline: 2px solid #b07d00; }}
small {{ margin-left: 0.3rem; opacity: 0.85; }}
</style>
</head>
<body>
<h1>{title}</h1>
<ul>{marks}</ul>
{body}
</body>
</html>
"""

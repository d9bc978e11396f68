"""Rendering a translation as a file, and as lines for people."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from megatron_bert.config.yaml_text import format_document
from megatron_bert.translation.translate import Translation

_WIDTH = 100


def render_file(translation: Translation) -> str:
    """The configuration as YAML, with the remarks on it as a comment at the top."""
    head = [
        "Made of Megatron-LM's arguments by tools/translate_megatron.py.",
        *remarks(translation),
    ]
    comment = "".join(f"# {line}".rstrip() + "\n" for line in head)
    sections = [format_document({name: keys}) for name, keys in translation.tree.items()]
    return comment + "\n" + "\n".join(sections)


def remarks(translation: Translation) -> Iterator[str]:
    """Yield lines on what the user has to do or to know, under headings."""
    parts = {
        "To be filled in:": translation.by_hand,
        "Unknown, and left out:": translation.unknown,
        "Not as in Megatron-LM:": translation.differs,
        "Without a counterpart:": translation.lacks,
        "Nothing to set:": translation.holds,
    }
    for heading, sentences in parts.items():
        if sentences:
            yield ""
            yield heading
        for sentence in sentences:
            yield from textwrap.wrap(
                sentence.replace("`", ""),
                _WIDTH - len("# "),
                initial_indent="- ",
                subsequent_indent="  ",
                break_long_words=False,
                break_on_hyphens=False,
            )

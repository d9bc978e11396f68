"""What a tree of mappings and lists holds, entry by entry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_bert.config.yaml_text import KeyPath


def leaves(tree: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Yield each value that is neither mapping nor list, with its path from `path` on."""
    if isinstance(tree, Mapping):
        for name, entry in tree.items():
            yield from leaves(entry, (*path, name))
    elif isinstance(tree, list):
        for index, entry in enumerate(tree):
            yield from leaves(entry, (*path, index))
    else:
        yield path, tree

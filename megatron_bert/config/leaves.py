"""Iterating over the leaves of a tree of mappings and lists."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from megatron_bert.config.yaml_text import KeyPath


def leaves(
    tree: Any, path: KeyPath = (), *, with_empty: bool = False
) -> Iterator[tuple[KeyPath, Any]]:
    """Yield each value that is neither a mapping nor a list, with its path.

    Args:
        tree: the tree to traverse.
        path: the path of the tree itself, which all paths begin with.
        with_empty: whether to yield empty mappings and lists too, rather than treat them as absent.
    """
    entries: Iterable[tuple[Any, Any]] | None = None
    if isinstance(tree, Mapping):
        entries = tree.items()
    elif isinstance(tree, list):
        entries = enumerate(tree)
    if entries is None or (with_empty and not tree):
        yield path, tree
        return
    for name, entry in entries:
        yield from leaves(entry, (*path, name), with_empty=with_empty)

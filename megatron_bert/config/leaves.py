"""What a tree of mappings and lists holds, entry by entry."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from megatron_bert.config.yaml_text import KeyPath


def leaves(
    tree: Any, path: KeyPath = (), *, with_empty: bool = False
) -> Iterator[tuple[KeyPath, Any]]:
    """Yield each value that is neither mapping nor list, with its path from `path` on.

    Args:
        tree: what is gone through.
        path: where it stands itself.
        with_empty: whether a mapping or list that holds nothing is a value too, and not as good as
            absent.
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

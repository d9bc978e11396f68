"""Overrides from the command line: `key.path=value`, the value read as YAML."""

from __future__ import annotations

from typing import Any

from megatron_bert.config.diagnostics import format_value
from megatron_bert.config.keys import dotted
from megatron_bert.config.yaml_text import KeyPath, parse_document
from megatron_bert.errors import ConfigError

FORM = "key.path=value, e.g. optimizer.lr=1e-4 or data.train.0.weight=2"


def apply_override(tree: dict[str, Any], override: str) -> KeyPath:
    """Set one value in a tree of plain values, in place; missing sections are created.

    Args:
        tree: What the configuration file gave.
        override: `a.b.c=value`; a number in the path is a list's index.

    Returns:
        The path that was set.

    Raises:
        ConfigError: The override does not have this form, its value is not YAML, or its path goes
            through a value that is not a section, or past a list's end.
    """
    name, equals, text = override.partition("=")
    name = name.strip()
    if not equals or not name or not all(name.split(".")):
        raise ConfigError(f"override {override!r}: write it as {FORM}")
    if not text.strip():
        raise ConfigError(f"override {override!r}: the value is empty; write {name}=null for none")
    value, _ = parse_document(text, f"override {override!r}")
    path: KeyPath = ()
    node: Any = tree
    *parents, last = name.split(".")
    for part in parents:
        step = _step(node, path, part)
        if isinstance(step, str) and node.get(step) is None:
            node[step] = {}
        node, path = node[step], (*path, step)
    step = _step(node, path, last)
    node[step] = value
    return (*path, step)


def _step(node: Any, path: KeyPath, part: str) -> str | int:
    """The key or index that `part` names in `node`."""
    if isinstance(node, dict):
        return part
    if not isinstance(node, list):
        raise ConfigError(
            f"{dotted((*path, part))}: {dotted(path)} = {format_value(node)} is a value, "
            f"not a section; set {dotted(path)} itself, or correct the key"
        )
    if not part.isascii() or not part.isdigit():
        raise ConfigError(
            f"{dotted((*path, part))}: {dotted(path)} is a list; name an entry by its index, "
            f"e.g. {dotted(path)}.0"
        )
    if int(part) >= len(node):
        have = f"entries 0 to {len(node) - 1}" if node else "no entry"
        raise ConfigError(
            f"{dotted((*path, part))}: {dotted(path)} has {have}; "
            f"to add one, give the whole list: {dotted(path)}=[...]"
        )
    return int(part)

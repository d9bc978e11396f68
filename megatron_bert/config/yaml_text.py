"""YAML as the configuration reads and writes it.

PyYAML follows YAML 1.1, in which `1e-4` is text, `no` is false, `010` is 8, `1:30` is 90, and of a
key given twice the last one silently wins. Here numbers and booleans are those of YAML 1.2 (with
`31_000` allowed), and a key given twice is an error.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from megatron_bert.errors import ConfigError

KeyPath = tuple[str | int, ...]

_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_REDEFINED_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "float", "timestamp")}


_MERGE = "tag:yaml.org,2002:merge"
_TEXT = "tag:yaml.org,2002:str"
_REMEDY = "correct it, or put text that has marks of YAML in quotes"


def _refusal(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


class _Loader(yaml.SafeLoader):
    """Reads YAML with the scalars of YAML 1.2."""


class _Dumper(yaml.SafeDumper):
    """Quotes exactly the texts that `_Loader` would not read back as text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _set_scalars(kind: type[yaml.SafeLoader] | type[yaml.SafeDumper]) -> None:
    kind.yaml_implicit_resolvers = {
        first: [(tag, expression) for tag, expression in resolvers if tag not in _REDEFINED_TAGS]
        for first, resolvers in kind.yaml_implicit_resolvers.items()
    }
    # Integers before floats, whose pattern takes them too: the first match wins.
    for name, expression, first in (
        ("bool", _BOOL, "tTfF"),
        ("int", _INT, "-+0123456789"),
        ("float", _FLOAT, "-+.0123456789"),
    ):
        kind.add_implicit_resolver(
            f"tag:yaml.org,2002:{name}", re.compile(f"(?:{expression.pattern})$"), list(first)
        )


_set_scalars(_Loader)
_set_scalars(_Dumper)

# Unicode's line breaks, which would be folded into spaces within single quotes.
_UNICODE_BREAKS = re.compile("[\x85\u2028\u2029]")


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = '"' if _UNICODE_BREAKS.search(text) else None
    return dumper.represent_scalar(_TEXT, text, style=style)


_Dumper.add_representer(str, _represent_text)


def parse_document(text: str, source: str) -> tuple[Any, dict[KeyPath, int]]:
    """Read one YAML document.

    Args:
        text: The document.
        source: What errors call it: the file's name.

    Returns:
        Its value (None if it is empty), and the line number of each path in it.

    Raises:
        ConfigError: It is not YAML, with source and line.
    """
    lines: dict[KeyPath, int] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, lines
        _survey(node, (), lines)
        return _unshare(loader.construct_document(node)), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{source}, line {mark.line + 1}" if mark else source
        problem = ": ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{place}: {problem}; {_REMEDY}") from None
    except (yaml.YAMLError, ValueError) as error:
        first_line = str(error).splitlines()[0]
        raise ConfigError(f"{source}: not readable as YAML: {first_line}; {_REMEDY}") from None
    except RecursionError:
        raise ConfigError(f"{source}: not readable as YAML: nested too deeply; {_REMEDY}") from None


def _unshare(value: Any) -> Any:
    """Copy a tree so that an alias's value can be overridden without changing its anchor's."""
    if isinstance(value, dict):
        return {key: _unshare(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_unshare(entry) for entry in value]
    return value


def format_document(value: Any) -> str:
    """Write a value as a YAML document that `parse_document` reads back equal."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _survey(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int]) -> None:
    """Record every value's line; refuse keys that are not names or are given twice.

    This looks at the document as written: PyYAML's own mappings already have `<<` merged in, which
    may legitimately repeat a key.
    """
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        for index, entry in enumerate(node.value):
            _survey(entry, (*path, index), lines)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        if key_node.tag == _MERGE:
            continue
        if key_node.tag != _TEXT:
            raise _refusal("a key must be a name", key_node)
        key, line = key_node.value, key_node.start_mark.line + 1
        if key in seen:
            raise _refusal(f"the key {key} is given twice, first in line {seen[key]}", key_node)
        seen[key] = line
        lines.setdefault((*path, key), line)
        _survey(value_node, (*path, key), lines)

"""The schema as a list of dotted keys: their names, what each takes, and nearest right names."""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from megatron_bert.config.schema import Config

JsonSchema = Mapping[str, Any]
INDEX = "N"
"""Placeholder in a key's name for the index of a list entry: `curriculum.N.steps`."""


class _WithoutTitles(GenerateJsonSchema):
    """Leaves out the titles pydantic makes from field names: they say nothing new."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


@functools.cache
def json_schema() -> dict[str, Any]:
    """The configuration's JSON Schema (draft 2020-12), for editors and for `docs/`."""
    schema = Config.model_json_schema(schema_generator=_WithoutTitles)
    return {"$schema": GenerateJsonSchema.schema_dialect, **schema, "title": "Pretraining run"}


@dataclass(frozen=True)
class Key:
    """One key of the configuration.

    Attributes:
        name: Dotted name, `N` for a list index.
        expected: What the key takes, in words.
        required: Whether it must be given.
        default: Its value if not given; None if the description says what then happens.
        description: What it does and its unit.
        is_section: Whether it holds named keys.
        is_list: Whether it holds a list of sections.
    """

    name: str
    expected: str
    required: bool
    default: Any
    description: str
    is_section: bool
    is_list: bool

    @property
    def is_leaf(self) -> bool:
        """Whether it holds a single value."""
        return not self.is_section and not self.is_list


@functools.cache
def all_keys() -> Mapping[str, Key]:
    """Every key of the schema by name, in the schema's order; parents before their children."""
    return {key.name: key for key in _walk((), json_schema())}


def key_at(path: Sequence[str | int]) -> Key | None:
    """The key at a concrete path such as `("data", "train", 0, "prefix")`, if the schema has it."""
    return all_keys().get(pattern(path))


def dotted(path: Iterable[str | int]) -> str:
    """A path as the user writes it: `data.train.0.prefix`."""
    return ".".join(str(part) for part in path)


def pattern(path: Iterable[str | int]) -> str:
    """A path as the schema names it: `data.train.N.prefix`."""
    return ".".join(INDEX if _is_index(part) else str(part) for part in path)


def children(parent: str) -> list[str]:
    """Names directly under a section, or at the top for the empty name."""
    prefix = f"{parent}." if parent else ""
    names = (name.removeprefix(prefix) for name in all_keys() if name.startswith(prefix))
    return [name for name in names if "." not in name]


def nearest_keys(path: Sequence[str | int]) -> list[str]:
    """Suggest names for a wrong one: similar siblings, else the same or similar names elsewhere.

    Args:
        path: A concrete path that the schema does not have.

    Returns:
        Dotted names, best first; empty if nothing is similar.
    """
    parents, wrong, rest = _split_at_unknown(path)
    beside = difflib.get_close_matches(wrong, children(pattern(parents)), n=1)
    if beside:
        repaired = [*parents, beside[0], *rest]
        return [dotted(repaired if key_at(repaired) else [*parents, beside[0]])]
    # Elsewhere only the last name is compared; otherwise every key of the same section would be
    # similar. A list's index cannot be guessed, so keys inside lists are left out.
    name = str(path[-1])
    elsewhere = {
        key.name: key.name.rpartition(".")[2]
        for key in all_keys().values()
        if key.is_leaf and INDEX not in key.name.split(".")
    }
    near = [name] if name in elsewhere.values() else []
    near = near or difflib.get_close_matches(name, sorted({*elsewhere.values()}), n=1, cutoff=0.75)
    return [key for key, last in elsewhere.items() if last in near]


def _split_at_unknown(
    path: Sequence[str | int],
) -> tuple[Sequence[str | int], str, Sequence[str | int]]:
    """Split at the first name that the schema lacks: the valid parents, the name, the rest."""
    for at in range(len(path)):
        if not _is_index(path[at]) and key_at(path[: at + 1]) is None:
            return path[:at], str(path[at]), path[at + 1 :]
    return path[:-1], str(path[-1]), ()


def expected_at(path: Sequence[str | int]) -> str:
    """What the key at a concrete path takes, in words."""
    key = key_at(path)
    if key is None and path and _is_index(path[-1]) and key_at(path[:-1]):
        return f"{{{', '.join(children(pattern(path)))}}}"
    return key.expected if key else "something else"


def _is_index(part: str | int) -> bool:
    # Under a misspelt list an override's index is still text; no key is a number.
    return isinstance(part, int) or part.isdigit()


def _walk(path: tuple[str, ...], section: JsonSchema) -> Iterator[Key]:
    required = _required(section)
    for name, declared in section["properties"].items():
        node = _resolve(declared)
        nested = _nested_section(node)
        key = (*path, name)
        # Pydantic omits a field's description if it equals that of its class.
        description = declared.get("description", node.get("description", ""))
        yield Key(
            name=".".join(key),
            expected=_describe(node),
            required=name in required,
            default=declared.get("default"),
            description=re.sub(r"\s+", " ", description),
            is_section="properties" in node,
            is_list=node.get("type") == "array",
        )
        if nested is not None:
            yield from _walk((*key, INDEX) if node.get("type") == "array" else key, nested)


def _required(section: JsonSchema) -> set[str]:
    """Required names; for the model's shape, those required without a preset."""
    alternatives = section.get("anyOf", [section])
    return set(alternatives[-1].get("required", ()))


def _resolve(node: JsonSchema) -> JsonSchema:
    reference = node.get("$ref")
    return json_schema()["$defs"][reference.rpartition("/")[2]] if reference else node


def _nested_section(node: JsonSchema) -> JsonSchema | None:
    if node.get("type") == "array":
        node = _resolve(node["items"])
    return node if "properties" in node else None


def _describe(node: JsonSchema) -> str:
    node = _resolve(node)
    if "properties" in node:
        return f"a section with {', '.join(node['properties'])}"
    if "anyOf" in node:
        return " or ".join(_describe(option) for option in node["anyOf"])
    if "enum" in node:
        # In YAML's spelling: true and false may be among the names.
        return f"one of {', '.join(_plain(value) for value in node['enum'])}"
    if "const" in node:
        return str(node["const"])
    if node["type"] == "array":
        entry = ", ".join(_resolve(node["items"])["properties"])
        least = " with at least one entry" if node.get("minItems") else ""
        return f"a list of {{{entry}}}{least}"
    if node["type"] == "string":
        return "non-empty text" if node.get("minLength") else "text"
    words = {"integer": "an integer", "number": "a number", "boolean": "true or false"}
    return words.get(node["type"], "null") + _limits(node)


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _limits(node: JsonSchema) -> str:
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    # :g would round large integers, and JSON Schema writes the float limit 1 as 1.0.
    limits = [
        f"{sign} {node[name] if isinstance(node[name], int) else format(node[name], 'g')}"
        for name, sign in signs.items()
        if name in node
    ]
    return f" {' and '.join(limits)}" if limits else ""

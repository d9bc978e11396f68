"""Write what the documentation derives from the schema.

`python -m megatron_bert.config.emit_schema` writes `docs/config.schema.json` as a whole, and the
tables between the markers of `docs/configuration.md`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence

from megatron_bert.command_line.emitted_tables import guide_to_write, with_tables
from megatron_bert.command_line.run import run_cli
from megatron_bert.config.change_table import change_of
from megatron_bert.config.keys import Key, all_keys, json_schema
from megatron_bert.files import write_atomically

SCHEMA_FILE = "config.schema.json"
GUIDE_FILE = "configuration.md"


def render_schema() -> str:
    """The JSON Schema as the text of its file."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def render_guide(guide: str) -> str:
    """The guide with its tables regenerated; text outside the markers is kept.

    Raises:
        ConfigError: A marker is missing.
    """
    tables = {"keys": [_key_table()], "changes": _change_table()}
    return with_tables(guide, GUIDE_FILE, tables)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write both files into the folder given by `--docs`."""
    guide = guide_to_write(arguments, GUIDE_FILE, __doc__)
    write_atomically(guide.with_name(SCHEMA_FILE), render_schema())
    write_atomically(guide, render_guide(guide.read_text(encoding="utf-8")))
    return 0


def _key_table() -> str:
    of_sections: dict[str, list[Key]] = {}
    others: list[Key] = []
    for key in all_keys().values():
        first = key.name.partition(".")[0]
        keys = of_sections.setdefault(first, []) if all_keys()[first].is_section else others
        if not key.is_section:
            keys.append(key)
    parts = [
        f"### {name}\n\n{all_keys()[name].description}\n\n{_rows(keys)}"
        for name, keys in of_sections.items()
    ]
    parts.append(f"### Keys of their own\n\n{_rows(others)}")
    return "\n\n".join(parts)


def _rows(keys: Iterable[Key]) -> str:
    lines = ["| key | takes | default | meaning |", "|---|---|---|---|"]
    lines += [
        f"| `{key.name}` | {key.expected} | {_default(key)} | {key.description} |" for key in keys
    ]
    return "\n".join(lines)


def _default(key: Key) -> str:
    if key.required:
        return "from `preset`, or required" if key.name.startswith("model.") else "required"
    return "see there" if key.default is None else f"`{json.dumps(key.default)}`"


def _change_table() -> Iterator[str]:
    yield "| key | may change |"
    yield "|---|---|"
    for key in all_keys().values():
        if key.is_leaf:
            yield f"| `{key.name}` | {change_of(key.name).value} |"


if __name__ == "__main__":
    run_cli(main)

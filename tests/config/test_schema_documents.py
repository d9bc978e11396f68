from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from megatron_bert.config import emit_schema
from megatron_bert.config.change_table import change_of
from megatron_bert.config.keys import all_keys, json_schema
from megatron_bert.config.load import config_dict
from megatron_bert.config.yaml_text import parse_document
from megatron_bert.errors import ConfigError
from tests.config.conftest import SMALL, Build

CHECKOUT = Path(__file__).resolve().parents[2]
DOCS = CHECKOUT / "docs"


def test_the_emitted_schema_is_fresh() -> None:
    emitted = (DOCS / emit_schema.SCHEMA_FILE).read_text(encoding="utf-8")
    assert emitted == emit_schema.render_schema(), "run python -m megatron_bert.config.emit_schema"


def test_the_guides_tables_are_fresh() -> None:
    guide = (DOCS / emit_schema.GUIDE_FILE).read_text(encoding="utf-8")
    assert guide == emit_schema.render_guide(guide), (
        "run python -m megatron_bert.config.emit_schema"
    )


def test_the_emitter_writes_both_files_whole(tmp_path: Path) -> None:
    guide = DOCS / emit_schema.GUIDE_FILE
    (tmp_path / guide.name).write_bytes(guide.read_bytes())
    assert emit_schema.main(["--docs", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        emit_schema.SCHEMA_FILE,
        emit_schema.GUIDE_FILE,
    ]


def test_the_emitter_refuses_a_folder_without_the_guide_or_its_markers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        emit_schema.main(["--docs", str(tmp_path)])
    (tmp_path / emit_schema.GUIDE_FILE).write_text("no markers", encoding="utf-8")
    with pytest.raises(ConfigError, match="markers"):
        emit_schema.main(["--docs", str(tmp_path)])


def test_every_key_is_described() -> None:
    undescribed = [name for name, key in all_keys().items() if not key.description]
    assert undescribed == []


def test_the_schema_is_valid_and_accepts_what_the_loader_accepts(build: Build) -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())
    jsonschema.validate(config_dict(build()), json_schema())
    jsonschema.validate(SMALL | {"model": {"preset": "retrievabert-1.3b"}}, json_schema())


@pytest.mark.parametrize("example", sorted(CHECKOUT.glob("examples/*.yaml")), ids=lambda p: p.name)
def test_every_example_fits_the_schema(example: Path) -> None:
    tree, _ = parse_document(example.read_text(encoding="utf-8"), example.name)
    jsonschema.validate(tree, json_schema())


@pytest.mark.parametrize(
    "wrong",
    [{"model": {"num_layers": 2}}, {"run": {"sede": 1}}, {"recompute": "some"}, {"curriculum": []}],
)
def test_the_schema_refuses_what_the_loader_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(SMALL | wrong, json_schema())


def test_the_guides_smallest_file_loads(tmp_path: Path) -> None:
    guide = (DOCS / emit_schema.GUIDE_FILE).read_text(encoding="utf-8")
    smallest = guide.split("```yaml\n")[1].split("```")[0]
    assert json.loads(json.dumps(yaml.safe_load(smallest)))["batch"] == {"global_size": 256}
    jsonschema.validate(parse_document(smallest, "guide")[0], json_schema())


def test_a_key_stands_in_one_table_even_if_its_name_begins_as_another_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = dict(all_keys())
    for name, like in {"recompute_more": "run", "recompute_more.seed": "run.seed"}.items():
        keys[name] = dataclasses.replace(keys[like], name=name)
    monkeypatch.setattr(emit_schema, "all_keys", lambda: keys)
    monkeypatch.setattr(
        emit_schema, "change_of", lambda name: change_of(name.replace("_more.seed", ""))
    )
    guide = emit_schema.render_guide((DOCS / emit_schema.GUIDE_FILE).read_text(encoding="utf-8"))
    for name in (key.name for key in keys.values() if not key.is_section):
        assert guide.count(f"\n| `{name}` | {keys[name].expected} |") == 1, name

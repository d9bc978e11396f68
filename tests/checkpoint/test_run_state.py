from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_bert.checkpoint.run_state import RunState, imported_state, trained_state
from megatron_bert.config.load import config_dict
from megatron_bert.errors import CheckpointError
from tests.small_model import small_config

FIELDS: dict[str, Any] = {
    "step": 3,
    "consumed_rows": 24,
    "optimizer": "muon",
    "optimizer_updates": 2,
    "config": config_dict(small_config()),
    "tokenizer_hash": "ab" * 32,
    "data": ["one line a corpus"],
    "topology": {"pipeline": 1, "data": 2, "tensor": 1, "keys": {}},
}


def test_what_a_run_says_in_its_manifest_is_read_from_it_field_by_field() -> None:
    state = RunState(Path("step_3"), json.loads(json.dumps(trained_state(**FIELDS))))
    assert {name: getattr(state, name) for name in FIELDS} == FIELDS
    assert not state.is_imported
    assert (state.model, state.tokenizer) == (small_config().model, Path("unused"))


def test_imported_weights_say_what_they_are_and_that_nobody_trained_them(tmp_path: Path) -> None:
    model = small_config().model
    imported = imported_state(model, tmp_path / "tiny.model", "ab" * 32)
    state = RunState(Path("step_0"), json.loads(json.dumps(imported)))
    assert state.is_imported
    assert (state.step, state.consumed_rows, state.optimizer_updates, state.data) == (0, 0, 0, [])
    assert (state.model, state.tokenizer) == (model, tmp_path / "tiny.model")
    assert state.tokenizer_hash == "ab" * 32
    with pytest.raises(CheckpointError, match=r"has no state\.topology"):
        _ = state.topology

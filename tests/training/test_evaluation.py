"""What is evaluated is planned at the start, and does not depend on threads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import _megatron_bert_core
import pytest

from megatron_bert.config.curriculum import Curriculum
from megatron_bert.config.schema import Config
from megatron_bert.data import indexed_dataset
from megatron_bert.data.source import training_source
from megatron_bert.data.tokenizer import Tokenizer
from megatron_bert.model.build import build_model
from megatron_bert.training.description import describe_data
from megatron_bert.training.evaluation import Evaluator
from megatron_bert.training.held_out import HeldOutRows, Measure
from tests.core.support import write_documents
from tests.distributed_harness import run_ranks
from tests.small_model import cpu_topology, small_config

STAGES = [
    {"seq_length": 32, "steps": 7},
    {"seq_length": 64, "steps": 5},
    {"seq_length": 64, "steps": 5, "mlm": {"probability": 0.3}},
]


def _scores(config: Config) -> dict[str, object]:
    """Scores of an untrained model in the second stage."""
    tokenizer = Tokenizer.load(Path(config.data.tokenizer))
    topology = cpu_topology()
    evaluator = Evaluator(config, HeldOutRows.plan(config, tokenizer), tokenizer, topology)
    model = build_model(config, tokenizer.vocab_size, topology)
    return evaluator.evaluate(model, Curriculum(config).spans[1])


@pytest.mark.parametrize("world_size", [1, 2])
def test_any_number_of_threads_gives_the_same_scores(
    tiny_run: Callable[..., Config], world_size: int
) -> None:
    def scores(threads: int) -> dict[str, object]:
        config = tiny_run(
            curriculum=STAGES,
            data={"threads": threads, "held_out_fraction": 0.2},
            batch={"micro_size": 3},
            eval={"batches": 3},
        )
        found: dict[str, object] = run_ranks(world_size, _scores, config)[0]
        return found

    one = scores(1)
    assert list(cast(dict[str, object], one["valid"])) == ["valid", "train (held out)"]
    assert scores(3) == one


def test_each_text_is_opened_once_and_planned_for_every_stage(
    tiny_run: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, limits = list[str](), list[object]()

    def open_dataset(prefix: str) -> Any:
        opened.append(prefix)
        return indexed_dataset.open_dataset(prefix)

    def epoch_rows(*args: Any, **options: Any) -> int:
        limits.append(options["limit"])
        return _megatron_bert_core.epoch_rows(*args, **options)

    monkeypatch.setattr("megatron_bert.data.corpora.open_dataset", open_dataset)
    monkeypatch.setattr("megatron_bert.data.source.epoch_rows", epoch_rows)
    config = tiny_run(curriculum=STAGES, data={"held_out_fraction": 0.2}, eval={"batches": 2})
    held_out = HeldOutRows.plan(config, Tokenizer.load(Path(config.data.tokenizer)))
    assert opened == [config.data.valid[0].prefix, config.data.train[0].prefix]
    assert held_out.fixed == Measure(64, 0.15)
    assert set(held_out.sources) == {Measure(32, 0.15), Measure(64, 0.15), Measure(64, 0.3)}
    for measure, sources in held_out.sources.items():
        assert [source.row_shape(0)[0] for source in sources] == [measure.seq_length] * 2
    # No whole epoch is counted where so many rows are enough.
    assert limits == [24] * 6
    rows = {at: sum(source.num_rows for source in held_out.sources[at]) for at in held_out.sources}
    both = 32 * rows[Measure(32, 0.15)] + 64 * rows[Measure(64, 0.15)]
    slots = [held_out.slots(span) for span in Curriculum(config).spans]
    assert slots[:2] == [both, 64 * rows[Measure(64, 0.15)]]


def test_the_plan_tells_of_text_that_is_not_evaluated(
    tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    write_documents(tmp_path / "one", [[50, 51]])
    write_documents(tmp_path / "set", [[50, 51, 52]] * 400)
    train = [{"prefix": str(tmp_path / name)} for name in ("one", "set")]
    config = small_config(data={"train": train, "held_out_fraction": 0.01})
    held_out = HeldOutRows.plan(config, tiny_tokenizer)
    assert held_out.names == ["set (held out)"]
    lines = list(describe_data(training_source(config, tiny_tokenizer), held_out))
    assert [line.split()[0] for line in lines[:3]] == ["train", "train", "valid"]
    assert any(line.startswith("warning") and "one is not evaluated" in line for line in lines)

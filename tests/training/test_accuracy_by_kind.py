"""The accuracies by kind of a real run's evaluations, against its held-out rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_bert.config.schema import Config
from megatron_bert.data.token_kinds import TOKEN_KINDS, token_kinds
from megatron_bert.data.tokenizer import Tokenizer
from megatron_bert.training.held_out import HeldOutRows, Measure
from tests.distributed_harness import run_ranks
from tests.training.runs import train


def _train(config: Config) -> list[dict[str, Any]]:
    return train(config)


def _counts(config: Config, measure: Measure) -> tuple[Counter[str], Counter[str]]:
    """Masked tokens of the first held-out text by what stands in their place, and by kind."""
    tokenizer = Tokenizer.load(Path(config.data.tokenizer))
    source = HeldOutRows.plan(config, tokenizer).sources[measure][0]
    rows = source.batch(np.arange(source.num_rows), 0)
    used = rows.weights_BM.bool()
    labels = rows.labels_BM[used].tolist()
    seen = rows.tokens_BS.gather(1, rows.masked_BM.long())[used].tolist()
    kinds = token_kinds(tokenizer)
    replacements = (
        "masked" if new == tokenizer.mask_id else "kept" if new == label else "random"
        for new, label in zip(seen, labels, strict=True)
    )
    return Counter(replacements), Counter(TOKEN_KINDS[kinds[label]] for label in labels)


def test_accuracies_by_kind_weighted_by_their_tokens_are_the_whole(
    tiny_run: Callable[..., Config],
) -> None:
    # A last row that is cut off, so that slots are left unused, and a vocabulary with padding.
    config = tiny_run(
        model={"vocab_size": 640},
        curriculum=[{"seq_length": 32, "steps": 12}],
        eval={"interval": 12, "batches": 3, "fixed_seq_length": 64},
        optimizer={"lr": 3e-2},
        checkpoint={"interval": 12},
    )
    (lines,) = run_ranks(1, _train, config)
    (line,) = (line for line in lines if "valid_loss" in line)
    scores = line["valid"]["valid"]
    assert 0 < line["valid_accuracy"] == scores["accuracy"] < 1
    by_replacement, by_characters = _counts(config, Measure(32, 0.15))
    assert set(by_replacement) == {"masked", "random", "kept"}
    assert {"han", "latin_start"} < set(by_characters) < set(TOKEN_KINDS)
    for counts, name in (
        (by_replacement, "accuracy_by_replacement"),
        (by_characters, "accuracy_by_characters"),
    ):
        # Kinds that the text lacks are left out.
        assert set(scores[name]) == set(counts), name
        right = sum(scores[name][kind] * count for kind, count in counts.items())
        assert right / counts.total() == pytest.approx(scores["accuracy"]), name
        assert len(set(scores[name].values())) > 1, name
    # Written so that anything can read it.
    assert json.loads(json.dumps(line)) == line

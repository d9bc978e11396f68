from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from _megatron_bert_core import IndexedDataset

from megatron_bert.benchmark import synthetic
from megatron_bert.benchmark.synthetic import (
    ARTICLES,
    PARAGRAPHS,
    VOCAB_SIZE,
    DocumentKind,
    draw_lengths,
    write_corpora,
    write_sentences,
)


@pytest.mark.parametrize("kind", [PARAGRAPHS, ARTICLES])
def test_lengths_are_log_normal_with_the_mean_asked_for(
    kind: DocumentKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic, "_DRAWN_AT_A_TIME", 30_000)
    lengths = draw_lengths(200_000, kind.mean_tokens, seed=0)
    assert lengths.dtype == np.int32
    assert lengths.min() >= 1
    assert lengths.mean() == pytest.approx(kind.mean_tokens, rel=0.01)
    logarithms = np.log(lengths)
    assert logarithms.std() == pytest.approx(1, rel=0.02)
    assert np.median(logarithms) == pytest.approx(logarithms.mean(), abs=0.02)
    assert np.array_equal(lengths, draw_lengths(200_000, kind.mean_tokens, seed=0))
    assert not np.array_equal(lengths, draw_lengths(200_000, kind.mean_tokens, seed=1))


def test_corpora_have_their_shares_of_the_tokens_and_no_special_one(tmp_path: Path) -> None:
    corpora = write_corpora(tmp_path, PARAGRAPHS, 1_000_000, [0.75, 0.25])
    large, small = corpora.open()
    assert large.num_tokens == pytest.approx(750_000, rel=0.05)
    assert small.num_tokens == pytest.approx(250_000, rel=0.05)
    tokens = np.concatenate([large.document(number) for number in range(large.num_documents)])
    assert tokens.min() >= 8
    assert tokens.max() < VOCAB_SIZE
    assert len(np.unique(tokens)) > 0.99 * VOCAB_SIZE


def test_documents_of_sentences_hold_as_many_as_asked_for(tmp_path: Path) -> None:
    documents = write_sentences(str(tmp_path / "a"), 60_000, 30, sentences=100)
    dataset = IndexedDataset(str(tmp_path / "a"))
    assert dataset.num_documents == documents == 20
    assert dataset.num_sequences == 2000
    assert dataset.num_tokens == pytest.approx(60_000, rel=0.1)

"""Blends by epochs, and what is said of corpora that are read too often or not as asked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_bert.config.schema import Corpus
from megatron_bert.data.blending import blend_warnings
from megatron_bert.data.corpora import CorpusPart, open_corpus
from megatron_bert.data.source import RowSource, RowStage
from megatron_bert.data.tokenizer import Tokenizer
from tests.core.support import write_documents
from tests.small_model import small_config


@pytest.fixture
def corpora(tmp_path: Path) -> tuple[Path, Path]:
    """One of short documents, one of long ones: rows hold fewer tokens of the first."""
    random = np.random.default_rng(9)
    for name, documents, longest in (("short", 4000, 24), ("long", 400, 400)):
        lengths = random.integers(longest // 2, longest, documents)
        write_documents(
            tmp_path / name, [random.integers(8, 500, length).tolist() for length in lengths]
        )
    return tmp_path / "short", tmp_path / "long"


def _source(tokenizer: Tokenizer, corpora: list[Corpus], *stages: tuple[int, int]) -> RowSource:
    row_stages = [RowStage(seq_length, rows, 0.15) for seq_length, rows in stages]
    opened = [open_corpus(CorpusPart(corpus), tokenizer) for corpus in corpora]
    return RowSource(small_config(), tokenizer, opened, row_stages, seed=1)


def _epochs(source: RowSource) -> list[float]:
    return [float(line.split("read ")[1].split()[0]) for line in source.describe()]


@pytest.mark.parametrize("asked", [(1.0, 1.0), (3.0, 1.0), (0.5, 2.0)])
def test_corpora_are_read_in_the_proportion_of_the_epochs_asked_for(
    corpora: tuple[Path, Path], tiny_tokenizer: Tokenizer, asked: tuple[float, float]
) -> None:
    blend = [
        Corpus(prefix=str(prefix), epochs=epochs)
        for prefix, epochs in zip(corpora, asked, strict=True)
    ]
    source = _source(tiny_tokenizer, blend, (64, 2000), (128, 2000), (256, 500))
    short, long = _epochs(source)
    assert short / long == pytest.approx(asked[0] / asked[1], rel=0.01)
    epochs = "1 epoch" if asked[0] == 1 else f"{asked[0]:g} epochs"
    assert f", {epochs} asked for, " in source.describe()[0]


def test_empty_documents_take_no_rows_and_count_for_nothing(
    tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    full = [[9] * 10] * 1000
    write_documents(tmp_path / "full", full)
    write_documents(tmp_path / "mostly_empty", full + [[]] * 9000)
    blend = [Corpus(prefix=str(tmp_path / name), epochs=1) for name in ("full", "mostly_empty")]
    source = _source(tiny_tokenizer, blend, (64, 400))
    first, second = _epochs(source)
    assert first == pytest.approx(second, rel=0.01)
    assert all(": 1,000 documents, 10,000 tokens" in line for line in source.describe())


def test_a_curriculum_of_another_length_than_the_epochs_need_is_told_with_the_factor(
    corpora: tuple[Path, Path], tiny_tokenizer: Tokenizer
) -> None:
    blend = [Corpus(prefix=str(prefix), epochs=2.0) for prefix in corpora]
    source = _source(tiny_tokenizer, blend, (64, 3000))
    (warning,) = source.warnings()
    assert "data.train.0.epochs = 2" in warning
    assert "data.train.1.epochs = 2" in warning
    factor = float(warning.rpartition(" by ")[2])
    as_asked = _source(tiny_tokenizer, blend, (64, round(3000 * factor)))
    assert _epochs(as_asked) == pytest.approx([2.0, 2.0], rel=0.01)
    assert as_asked.warnings() == []


def test_a_corpus_that_is_read_more_than_four_times_is_told_once_with_the_remedy() -> None:
    blend = [Corpus(prefix="crawl", weight=0.9), Corpus(prefix="wiki", weight=0.1)]
    assert blend_warnings(blend, [0.7, 4.0]) == []
    (warning,) = blend_warnings(blend, [0.7, 6.53])
    assert warning.startswith("wiki is read 6.53 times; beyond 4 times")
    assert "Muennighoff et al. 2023" in warning
    assert "lower data.train.1.weight" in warning


def test_a_single_corpus_that_is_read_too_often_needs_text_and_not_another_weight() -> None:
    (warning,) = blend_warnings([Corpus(prefix="wiki")], [5.0])
    assert "add text, or shorten the curriculum" in warning
    assert "weight" not in warning


def test_epochs_within_one_percent_of_those_asked_for_are_as_asked() -> None:
    blend = [Corpus(prefix="crawl", epochs=1.0), Corpus(prefix="wiki", epochs=3.0)]
    assert blend_warnings(blend, [1.009, 2.98]) == []
    (warning,) = blend_warnings(blend, [1.002, 2.9])
    assert "multiply" not in warning
    assert "crawl" not in warning
    assert "wiki 2.9 times (data.train.1.epochs = 3)" in warning


@pytest.mark.parametrize(
    ("read", "said"),
    [
        ([0.02, 0.0], "much shorter than that: to read about as often as asked, multiply"),
        ([0.02, 0.05], "multiply the stages' steps by 55"),
        ([0.0, 0.0], "too short for a row of any; take more steps"),
        ([0.9, 0.0], "take it as it is, or join small corpora"),
    ],
)
def test_a_run_too_short_to_read_a_corpus_is_told_so(read: list[float], said: str) -> None:
    blend = [Corpus(prefix="wiki", epochs=1.0), Corpus(prefix="books", epochs=3.0)]
    (warning,) = blend_warnings(blend, read)
    assert said in warning


def test_a_corpus_of_too_little_weight_to_be_read_is_named() -> None:
    blend = [Corpus(prefix="wiki", weight=1000.0), Corpus(prefix="notes", weight=1.0)]
    (warning,) = blend_warnings(blend, [0.3, 0.0])
    assert "notes is never read" in warning
    assert "raise data.train.1.weight" in warning


def test_a_factor_on_the_steps_is_advised_only_where_it_mends_all_corpora() -> None:
    blend = [Corpus(prefix="crawl", epochs=1.0), Corpus(prefix="wiki", epochs=3.0)]
    (warning,) = blend_warnings(blend, [0.5, 1.5])
    assert warning.endswith("multiply the stages' steps by 2")
    for apart in ([0.5, 6.0], [0.5, 2.0]):
        warning = blend_warnings(blend, apart)[0]
        assert "multiply" not in warning
        assert "tools/merge_datasets.py" in warning

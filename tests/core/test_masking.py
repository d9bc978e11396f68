from __future__ import annotations

from dataclasses import dataclass
from math import floor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _megatron_bert_core import BatchAssembler, IndexedDataset, RowPlan
from numpy.typing import NDArray

from tests.core.support import (
    MASK,
    SPECIAL_IDS,
    VOCAB_SIZE,
    Filled,
    fill,
    make_assembler,
    text_documents,
    unmasked_row,
    write_documents,
)

SEQ_LENGTH = 64
UNITS = ("token", "whole_word", "ngram")


@dataclass(frozen=True)
class Masked:
    """Rows before and after masking, and which slots [B, S] were chosen."""

    before_BS: NDArray[np.int32]
    positions_BS: NDArray[np.int32]
    filled: Filled

    @property
    def chosen(self) -> NDArray[np.bool_]:
        chosen = np.zeros(self.before_BS.shape, dtype=bool)
        for row, (masked, weights) in enumerate(
            zip(self.filled.masked_BM, self.filled.weights_BM, strict=True)
        ):
            chosen[row, masked[weights == 1]] = True
        return chosen

    @property
    def maskable(self) -> NDArray[np.bool_]:
        return ~np.isin(self.before_BS, SPECIAL_IDS)


def word_tables(seed: int = 3) -> dict[str, NDArray[np.uint8]]:
    random = np.random.default_rng(seed)
    first_class = random.integers(0, 2, VOCAB_SIZE, dtype=np.uint8)
    return {
        "first_class": first_class,
        "last_class": first_class,
        "starts_word": (random.random(VOCAB_SIZE) < 0.05).astype(np.uint8),
    }


def mask_rows(
    dataset: IndexedDataset,
    num_rows: int,
    seq_length: int = SEQ_LENGTH,
    masked_slots: int | None = None,
    **options: object,
) -> Masked:
    plan = RowPlan([dataset], [1.0], [(seq_length, num_rows)], 0)
    assembler = make_assembler([dataset], plan, **{**word_tables(), **options})
    filled = fill(assembler, range(num_rows), seq_length, masked_slots or seq_length)
    rows = [unmasked_row([dataset], plan, row, seq_length) for row in range(num_rows)]
    return Masked(
        np.stack([tokens for tokens, _ in rows]), np.stack([at for _, at in rows]), filled
    )


def words_of(tokens: NDArray[np.int32], tables: dict[str, NDArray[np.uint8]]) -> list[list[int]]:
    """Slots of each word: the rule of the design, token by token."""
    words: list[list[int]] = []
    for slot, token in enumerate(tokens):
        previous = tokens[slot - 1]
        if token in SPECIAL_IDS:
            continue
        continues = (
            previous not in SPECIAL_IDS
            and not tables["starts_word"][token]
            and tables["last_class"][previous] == tables["first_class"][token]
            and len(words[-1]) < 8
        )
        if continues:
            words[-1].append(slot)
        else:
            words.append([slot])
    return words


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> IndexedDataset:
    """Short documents, long ones, empty ones, and some with special ids inside."""
    random = np.random.default_rng(1)
    documents = text_documents(random.integers(0, 150, 400).tolist())
    for document in documents[::5]:
        document[random.random(len(document)) < 0.2] = random.choice(SPECIAL_IDS)
    return write_documents(tmp_path_factory.mktemp("masking") / "set", documents, 2)


@pytest.fixture(scope="module")
def long_text(tmp_path_factory: pytest.TempPathFactory) -> IndexedDataset:
    return write_documents(
        tmp_path_factory.mktemp("masking") / "long", text_documents([2_000_000]), 2
    )


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("probability", [0.01, 0.15, 0.3, 0.95])
def test_a_row_masks_its_share_rounded_or_less_than_a_unit_beside_it(
    dataset: IndexedDataset, unit: str, probability: float
) -> None:
    masked = mask_rows(dataset, 300, unit=unit, probability=probability)
    beside = 0 if unit == "token" else 7
    for maskable, chosen in zip(masked.maskable.sum(1), masked.chosen.sum(1), strict=True):
        wanted = max(1, floor(probability * maskable + 0.5)) if maskable else 0
        assert wanted - beside <= chosen <= min(wanted + beside, maskable)


@pytest.mark.parametrize("unit", UNITS)
def test_special_tokens_are_never_masked(dataset: IndexedDataset, unit: str) -> None:
    masked = mask_rows(dataset, 300, unit=unit, probability=0.9)
    assert not (masked.chosen & ~masked.maskable).any()


@pytest.mark.parametrize("unit", UNITS)
def test_slots_hold_ascending_positions_and_what_stood_there(
    dataset: IndexedDataset, unit: str
) -> None:
    masked = mask_rows(dataset, 200, unit=unit)
    for row, filled in enumerate(
        zip(
            masked.filled.masked_BM,
            masked.filled.labels_BM,
            masked.filled.weights_BM,
            strict=True,
        )
    ):
        positions, labels, weights = filled
        used = int(weights.sum())
        assert weights.tolist() == [1.0] * used + [0.0] * (len(weights) - used)
        assert (np.diff(positions[:used]) > 0).all()
        assert labels[:used].tolist() == masked.before_BS[row, positions[:used]].tolist()
        assert not positions[used:].any()
        assert not labels[used:].any()


@pytest.mark.parametrize("unit", UNITS)
def test_only_masked_slots_change(dataset: IndexedDataset, unit: str) -> None:
    masked = mask_rows(dataset, 300, unit=unit)
    changed = masked.filled.tokens_BS != masked.before_BS
    assert not (changed & ~masked.chosen).any()


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("masked_slots", [1, 4])
def test_never_more_is_masked_than_there_are_slots(
    dataset: IndexedDataset, unit: str, masked_slots: int
) -> None:
    masked = mask_rows(dataset, 200, masked_slots=masked_slots, unit=unit, probability=0.5)
    assert masked.chosen.sum(1).max() == masked_slots


def test_masks_replacements_and_kept_tokens_have_their_shares(long_text: IndexedDataset) -> None:
    masked = mask_rows(long_text, 4000, mask_ratio=0.7, random_ratio=0.2)
    became = masked.filled.tokens_BS[masked.chosen]
    before = masked.before_BS[masked.chosen]
    num_ordinary = VOCAB_SIZE - len(SPECIAL_IDS)
    count = len(became)
    for share, expected in [
        ((became == MASK).mean(), 0.7),
        ((became == before).mean(), 0.1 + 0.2 / num_ordinary),
    ]:
        assert abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / count)
    drawn = became[(became != MASK) & (became != before)]
    assert not np.isin(drawn, SPECIAL_IDS).any()
    counts = np.bincount(drawn, minlength=VOCAB_SIZE)[len(SPECIAL_IDS) :]
    expected_count = len(drawn) / num_ordinary
    chi_square = ((counts - expected_count) ** 2 / expected_count).sum()
    assert chi_square < (num_ordinary - 1) + 5 * np.sqrt(2 * (num_ordinary - 1))


@pytest.mark.parametrize(("mask_ratio", "random_ratio"), [(1.0, 0.0), (0.0, 0.0), (0.0, 1.0)])
def test_ratios_of_all_and_nothing_are_exact(
    dataset: IndexedDataset, mask_ratio: float, random_ratio: float
) -> None:
    masked = mask_rows(dataset, 300, mask_ratio=mask_ratio, random_ratio=random_ratio)
    became = masked.filled.tokens_BS[masked.chosen]
    before = masked.before_BS[masked.chosen]
    assert (became == MASK).mean() == mask_ratio
    # One in 95 random tokens is the one that stood there.
    kept = (became == before).mean()
    assert kept < 0.03 if random_ratio else kept == 1 - mask_ratio


def test_whole_words_are_masked_whole(dataset: IndexedDataset) -> None:
    tables = word_tables()
    masked = mask_rows(dataset, 300, unit="whole_word")
    lengths = set[int]()
    for tokens, chosen in zip(masked.before_BS, masked.chosen, strict=True):
        for word in words_of(tokens, tables):
            assert chosen[word].all() or not chosen[word].any()
            lengths.add(len(word))
    assert lengths >= {1, 2, 3, 8}


def test_a_word_ends_where_its_segment_does(tmp_path: Path) -> None:
    one_word: dict[str, Any] = {
        "first_class": np.ones(VOCAB_SIZE, dtype=np.uint8),
        "last_class": np.ones(VOCAB_SIZE, dtype=np.uint8),
        "starts_word": np.zeros(VOCAB_SIZE, dtype=np.uint8),
    }
    dataset = write_documents(tmp_path / "set", text_documents([3] * 60))
    masked = mask_rows(dataset, 20, seq_length=65, unit="whole_word", **one_word)
    for chosen in masked.chosen:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], chosen, [0]])))
        assert set(edges[1::2] - edges[::2]) == {3}


def test_ngrams_of_length_k_are_drawn_in_proportion_to_one_over_k(
    long_text: IndexedDataset,
) -> None:
    # So few spans that they hardly ever touch.
    masked = mask_rows(long_text, 700, seq_length=2048, unit="ngram", probability=0.004)
    lengths: list[int] = []
    for chosen in masked.chosen:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], chosen, [0]])))
        lengths += (edges[1::2] - edges[::2]).tolist()
    shares = np.bincount(lengths, minlength=4)[1:4] / len(lengths)
    assert np.abs(shares - np.array([6, 3, 2]) / 11).max() < 0.02


def test_ngrams_stay_within_their_segment(tmp_path: Path) -> None:
    dataset = write_documents(tmp_path / "set", text_documents([2] * 100))
    # At most a span a row, and segments shorter than most: whatever crossed would show.
    masked = mask_rows(dataset, 12, unit="ngram", max_ngram=8, probability=0.01)
    spans = [np.flatnonzero(chosen).tolist() for chosen in masked.chosen]
    assert {len(span) for span in spans} == {0, 1, 2}
    for row, span in enumerate(spans):
        assert span == list(range(min(span, default=0), min(span, default=0) + len(span)))
        assert masked.maskable[row, span].all()


def test_masks_are_a_function_of_seed_and_row(dataset: IndexedDataset) -> None:
    plan = RowPlan([dataset], [1.0], [(SEQ_LENGTH, 40)], 0)

    def masked_slots(assembler: BatchAssembler, rows: list[int]) -> list[bytes]:
        return [slots.tobytes() for slots in fill(assembler, rows, SEQ_LENGTH, 20).masked_BM]

    first, same, other = (make_assembler([dataset], plan, seed=seed) for seed in (1, 1, 2))
    assert masked_slots(first, [3, 4, 5]) == masked_slots(same, [3, 4, 5])
    assert masked_slots(first, [3, 4, 5]) == masked_slots(first, [5, 4, 3])[::-1]
    assert masked_slots(first, [3, 4, 5]) != masked_slots(other, [3, 4, 5])


def test_equal_rows_of_different_epochs_have_different_masks(tmp_path: Path) -> None:
    dataset = write_documents(tmp_path / "set", text_documents([60]))
    masked = mask_rows(dataset, 8)
    assert len({tokens.tobytes() for tokens in masked.before_BS}) == 1
    assert len({positions.tobytes() for positions in masked.filled.masked_BM}) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probability": 0.0}, "probability"),
        ({"probability": 1.5}, "probability"),
        ({"mask_ratio": 0.8, "random_ratio": 0.3}, "mask_ratio"),
        ({"mask_ratio": -0.1}, "mask_ratio"),
        ({"max_ngram": 9}, "max_ngram"),
        ({"max_ngram": 0}, "max_ngram"),
        ({"unit": "sentence"}, "sentence"),
        ({"unit": "whole_word", "first_class": np.zeros(3, dtype=np.uint8)}, "word tables"),
        ({"vocab_size": 4}, "special id 4"),
        ({"special_ids": np.array([-1], dtype=np.int32)}, "special id -1"),
        ({"special_ids": np.arange(VOCAB_SIZE, dtype=np.int32)}, "every id"),
        ({"vocab_size": 0}, "vocabulary is empty"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    dataset: IndexedDataset, options: dict[str, object], message: str
) -> None:
    plan = RowPlan([dataset], [1.0], [(SEQ_LENGTH, 1)], 0)
    with pytest.raises(ValueError, match=message):
        make_assembler([dataset], plan, **options)

"""Masking over ten million tokens: every rate is what was asked for, wherever one looks.

Each test compares many rates with their expectation at once. The bound is a normal one whose level
is divided by the number of comparisons (Bonferroni), so that all of them together exceed it by
chance once in a million seeds; the seed is fixed.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from statistics import NormalDist

import numpy as np
import pytest
from _megatron_bert_core import IndexedDataset, RowPlan
from numpy.typing import NDArray

from tests.core.support import (
    CLS,
    MASK,
    PAD,
    SEP,
    SPECIAL_IDS,
    make_assembler,
    text_documents,
    write_documents,
)

NUM_TOKENS = 10_000_000
SEQ_LENGTH = 512
SHORT_LENGTH = 16
PROBABILITY = 0.15
VOCAB_SIZE = 2000
LEVEL = 1e-6
MAX_UNIT_TOKENS = 8

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Masked:
    """Rows [B, S] before and after masking, which slots hold text, and which were chosen."""

    before_BS: NDArray[np.int32]
    after_BS: NDArray[np.int32]
    positions_BS: NDArray[np.int32]
    is_text_BS: Bools
    chosen_BS: Bools


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> IndexedDataset:
    lengths = np.random.default_rng(5).lognormal(5.5, 1.0, NUM_TOKENS // 400).astype(int) + 1
    documents = text_documents(lengths.tolist(), seed=5, vocab_size=VOCAB_SIZE)
    return write_documents(tmp_path_factory.mktemp("statistics") / "set", documents, 2)


def word_tables() -> dict[str, NDArray[np.uint8]]:
    """Six words in ten have one token; lengths up to the longest occur."""
    starts_word = (np.random.default_rng(2).random(VOCAB_SIZE) < 0.6).astype(np.uint8)
    no_class = np.zeros(VOCAB_SIZE, dtype=np.uint8)
    return {"first_class": no_class, "last_class": no_class, "starts_word": starts_word}


def mask(dataset: IndexedDataset, unit: str, seq_length: int = SEQ_LENGTH) -> Masked:
    num_rows = NUM_TOKENS // seq_length + 1
    plan = RowPlan([dataset], [1.0], [(seq_length, num_rows)], 0)
    assembler = make_assembler(
        [dataset],
        plan,
        unit=unit,
        vocab_size=VOCAB_SIZE,
        probability=PROBABILITY,
        seed=99,
        **word_tables(),
    )
    slots = seq_length // 4 + MAX_UNIT_TOKENS
    tokens = np.empty((num_rows, seq_length), dtype=np.int32)
    positions = np.empty_like(tokens)
    masked = np.empty((num_rows, slots), dtype=np.int32)
    labels = np.empty_like(masked)
    weights = np.empty((num_rows, slots), dtype=np.float32)
    assembler.fill(np.arange(num_rows), tokens, positions, masked, labels, weights)
    before = tokens.copy()
    chosen = np.zeros(tokens.shape, dtype=bool)
    row, slot = np.nonzero(weights)
    before[row, masked[row, slot]] = labels[row, slot]
    chosen[row, masked[row, slot]] = True
    return Masked(before, tokens, positions, ~np.isin(before, SPECIAL_IDS), chosen)


@pytest.fixture(scope="module", params=["token", "whole_word", "ngram"])
def masked(request: pytest.FixtureRequest, dataset: IndexedDataset) -> Masked:
    return mask(dataset, request.param)


def assert_rates(
    hits: NDArray[np.int64], trials: NDArray[np.int64], expected: NDArray[np.float64] | float
) -> None:
    """All rates hits / trials at once lie within chance of what is expected.

    The variance of independent draws is an upper bound: a row's draws exclude one another. Where a
    unit has several tokens, `hits` and `trials` must count units.
    """
    deviations = np.abs(hits / trials - expected)
    bound = NormalDist().inv_cdf(1 - LEVEL / 2 / len(hits))
    allowed = bound * np.sqrt(expected * (1 - expected) / trials) + 1 / trials
    worst = int(np.argmax(deviations / allowed))
    assert (deviations <= allowed).all(), (
        f"rate {worst} is {hits[worst] / trials[worst]:.5f} of {trials[worst]}, expected "
        f"{np.broadcast_to(expected, hits.shape)[worst]:.5f}"
    )


def units_begun_by(masked: Masked, starts_BS: Bools) -> tuple[NDArray[np.int64], Bools]:
    """Length of each unit of a row, in order, and whether it was chosen."""
    starts = np.flatnonzero(starts_BS)
    # Text ends where the next unit begins, or before a special token.
    ends = np.flatnonzero(masked.is_text_BS & ~np.roll(masked.is_text_BS, -1)) + 1
    stops = np.minimum(
        np.append(starts[1:], masked.is_text_BS.size), ends[np.searchsorted(ends, starts, "right")]
    )
    return stops - starts, masked.chosen_BS.reshape(-1)[starts]


def word_starts(masked: Masked) -> Bools:
    """Where words begin: by the vocabulary, with a segment, and after eight tokens of a word."""
    before = masked.before_BS
    starts: Bools = masked.is_text_BS & (
        word_tables()["starts_word"][before].astype(bool) | (masked.positions_BS == 1)
    )
    flat, text = starts.reshape(-1), masked.is_text_BS.reshape(-1)
    places = np.arange(flat.size)
    since = places - np.maximum.accumulate(np.where(flat, places, 0))
    flat |= text & (since % MAX_UNIT_TOKENS == 0)
    return starts


def test_the_rate_over_all_tokens_is_the_one_asked_for(masked: Masked) -> None:
    text = masked.is_text_BS.sum(1)
    wanted = np.maximum(1, np.floor(PROBABILITY * text + 0.5))
    surplus = masked.chosen_BS.sum(1) - wanted
    bound = NormalDist().inv_cdf(1 - LEVEL / 2)
    assert abs(surplus.mean()) <= bound * surplus.std() / np.sqrt(len(text))


def test_every_slot_of_a_row_is_masked_as_often(masked: Masked) -> None:
    # A unit has its tokens in different slots, so that in one slot draws are of different rows.
    text = masked.is_text_BS.sum(0)
    slots = text > 1000
    hits = masked.chosen_BS.sum(0)[slots]
    assert slots.sum() >= SEQ_LENGTH - 2
    assert_rates(hits, text[slots], PROBABILITY)


def test_every_position_of_a_segment_is_masked_as_often(masked: Masked) -> None:
    positions = masked.positions_BS[masked.is_text_BS]
    trials = np.bincount(positions, minlength=SEQ_LENGTH)
    hits = np.bincount(masked.positions_BS[masked.chosen_BS], minlength=SEQ_LENGTH)
    often = trials > 1000
    assert often.sum() > 400
    assert_rates(hits[often], trials[often], PROBABILITY)


def test_every_token_is_masked_as_often(masked: Masked) -> None:
    trials = np.bincount(masked.before_BS[masked.is_text_BS], minlength=VOCAB_SIZE)
    hits = np.bincount(masked.before_BS[masked.chosen_BS], minlength=VOCAB_SIZE)
    ordinary = np.arange(len(SPECIAL_IDS), VOCAB_SIZE)
    assert not hits[list(SPECIAL_IDS)].any()
    assert_rates(hits[ordinary], trials[ordinary], PROBABILITY)


def test_words_are_masked_as_often_whatever_their_length(dataset: IndexedDataset) -> None:
    masked = mask(dataset, "whole_word")
    lengths, chosen = units_begun_by(masked, word_starts(masked))
    trials = np.bincount(lengths, minlength=MAX_UNIT_TOKENS + 1)[1:]
    hits = np.bincount(lengths[chosen], minlength=MAX_UNIT_TOKENS + 1)[1:]
    assert len(trials) == MAX_UNIT_TOKENS
    assert (trials > 1000).all()
    assert_rates(hits, trials, PROBABILITY)


def test_words_longer_than_a_short_rows_share_are_masked_no_more_than_others(
    dataset: IndexedDataset,
) -> None:
    # 14 tokens of text, of which two are the share: most words of a row have more or as many.
    masked = mask(dataset, "whole_word", SHORT_LENGTH)
    full = masked.is_text_BS.sum(1) == SHORT_LENGTH - 2
    masked = Masked(*(getattr(masked, field.name)[full] for field in fields(Masked)))
    lengths, chosen = units_begun_by(masked, word_starts(masked))
    trials = np.bincount(lengths, minlength=MAX_UNIT_TOKENS + 1)[1:]
    hits = np.bincount(lengths[chosen], minlength=MAX_UNIT_TOKENS + 1)[1:]
    assert (trials > 1000).all()
    assert_rates(hits, trials, 2 / (SHORT_LENGTH - 2))


def test_what_stands_in_a_masked_tokens_place_does_not_depend_on_the_token(
    masked: Masked,
) -> None:
    before, after = masked.before_BS[masked.chosen_BS], masked.after_BS[masked.chosen_BS]
    trials = np.bincount(before, minlength=VOCAB_SIZE)[len(SPECIAL_IDS) :]
    by_mask = np.bincount(before[after == MASK], minlength=VOCAB_SIZE)[len(SPECIAL_IDS) :]
    assert_rates(by_mask, trials, 0.8)
    drawn = after[(after != MASK) & (after != before)]
    assert not np.isin(drawn, (PAD, CLS, SEP, MASK)).any()
    counts = np.bincount(drawn, minlength=VOCAB_SIZE)[len(SPECIAL_IDS) :]
    assert_rates(counts, np.full_like(counts, counts.sum()), 1 / len(counts))

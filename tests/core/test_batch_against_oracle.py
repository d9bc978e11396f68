from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from _megatron_bert_core import BatchAssembler, IndexedDataset, RowPlan
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core import oracle
from tests.core.batch_oracle import (
    SURPLUS_ROW,
    CounterRandom,
    Masking,
    Row,
    Vocabulary,
    WordTables,
    make_row,
)
from tests.core.support import Filled, fill, make_assembler, write_sequences

Corpus = list[list[int]]

seeds = st.integers(0, 2**64 - 1)
ratios = st.sampled_from([0.0, 0.1, 0.5, 0.8, 1.0]) | st.floats(0, 1)


@dataclass(frozen=True)
class Run:
    """All that the rows of a run depend on."""

    corpora: list[Corpus]
    weights: list[float]
    stages: list[tuple[int, int]]
    plan_seed: int
    vocabulary: Vocabulary
    tables: WordTables
    masking: Masking


@st.composite
def vocabularies(draw: st.DrawFn) -> Vocabulary:
    size = draw(st.integers(6, 40))
    ids = draw(st.permutations(range(size)))
    # At least one id stays ordinary.
    num_further = draw(st.integers(0, size - 5))
    cls, sep, mask, pad, *others = ids
    return Vocabulary(size, cls, sep, mask, pad, frozenset(others[:num_further]))


@st.composite
def word_tables(draw: st.DrawFn, size: int) -> WordTables:
    """Words from one token each to as long as they may get."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    classes = random.integers(0, draw(st.integers(1, 3)), (2, size), dtype=np.uint8)
    starts_word = random.random(size) < draw(st.sampled_from([0.0, 0.1, 0.5]))
    return WordTables(classes[0], classes[1], starts_word.astype(np.uint8))


@st.composite
def corpora_of(draw: st.DrawFn, vocabulary: Vocabulary, longest: int) -> Corpus:
    """Documents of any ids, or of as good as no special ones; at least one has text."""
    lengths = draw(
        st.lists(st.integers(0, 12) | st.integers(0, longest), min_size=1, max_size=8).filter(any)
    )
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    special_share = draw(st.sampled_from([0.0, 0.05, 0.3, 1.0]))
    return [
        np.where(
            random.random(length) < special_share,
            random.choice(sorted(vocabulary.special), length),
            random.choice(vocabulary.ordinary, length),
        ).tolist()
        for length in lengths
    ]


@st.composite
def maskings(draw: st.DrawFn) -> Masking:
    mask_ratio = draw(ratios)
    return Masking(
        # Halves and quarters of a row's tokens are what rounding can go wrong with.
        probability=draw(st.sampled_from([0.15, 0.25, 0.5, 1.0]) | st.floats(1e-6, 1)),
        unit=draw(st.sampled_from(["token", "whole_word", "ngram"])),
        max_ngram=draw(st.integers(1, 8)),
        mask_ratio=mask_ratio,
        random_ratio=draw(ratios) * (1 - mask_ratio),
        seed=draw(seeds),
    )


@st.composite
def runs(draw: st.DrawFn) -> Run:
    vocabulary = draw(vocabularies())
    # Beyond 64 and 128, so that a row's positions fill several words of bits.
    stages = draw(
        st.lists(
            st.tuples(st.integers(3, 40) | st.integers(60, 140), st.integers(1, 5)),
            min_size=1,
            max_size=2,
        )
    )
    longest = 3 * max(seq_length for seq_length, _ in stages)
    corpora = draw(st.lists(corpora_of(vocabulary, longest), min_size=1, max_size=2))
    weights = [draw(st.floats(0.1, 10)) for _ in corpora]
    tables = draw(word_tables(vocabulary.size))
    return Run(corpora, weights, stages, draw(seeds), vocabulary, tables, draw(maskings()))


def assemble(run: Run, folder: Path) -> BatchAssembler:
    datasets = []
    for number, documents in enumerate(run.corpora):
        prefix = folder / str(number)
        write_sequences(prefix, documents, range(len(documents) + 1), (2, 4)[number % 2])
        datasets.append(IndexedDataset(str(prefix)))
    vocabulary = run.vocabulary
    return make_assembler(
        datasets,
        RowPlan(datasets, run.weights, run.stages, run.plan_seed),
        cls_id=vocabulary.cls,
        sep_id=vocabulary.sep,
        mask_id=vocabulary.mask,
        pad_id=vocabulary.pad,
        vocab_size=vocabulary.size,
        special_ids=np.array(sorted(vocabulary.further_special), dtype=np.int32),
        **vars(run.tables),
        **asdict(run.masking),
    )


def expected_rows(run: Run, numbers: Sequence[int], shape: tuple[int, int]) -> list[Row]:
    lengths = [[len(document) for document in documents] for documents in run.corpora]
    segments = oracle.plan(lengths, run.weights, run.stages, run.plan_seed)
    return [
        make_row(
            number,
            [] if number == SURPLUS_ROW else segments[number],
            run.corpora,
            shape,
            run.vocabulary,
            run.tables,
            run.masking,
        )
        for number in numbers
    ]


def assert_rows_are(filled: Filled, expected: Sequence[Row]) -> None:
    for index, row in enumerate(expected):
        assert filled.tokens_BS[index].tolist() == row.tokens.tolist()
        assert filled.positions_BS[index].tolist() == row.positions.tolist()
        assert filled.masked_BM[index].tolist() == row.masked.tolist()
        assert filled.labels_BM[index].tolist() == row.labels.tolist()
        assert filled.weights_BM[index].tobytes() == row.weights.tobytes()
    assert filled.batch_hash == sum(row.hash for row in expected) % 2**64


@settings(max_examples=150, derandomize=True, deadline=None)
@given(runs(), st.data())
def test_every_row_and_hash_is_that_of_the_oracle(run: Run, data: st.DataObject) -> None:
    with TemporaryDirectory() as folder:
        assembler = assemble(run, Path(folder))
    first = 0
    for seq_length, num_rows in run.stages:
        num_slots = data.draw(st.integers(1, seq_length))
        numbers = data.draw(st.permutations([*range(first, first + num_rows), SURPLUS_ROW]))
        expected = expected_rows(run, numbers, (seq_length, num_slots))
        assert_rows_are(fill(assembler, numbers, seq_length, num_slots), expected)
        for number, row in zip(numbers, expected, strict=True):
            assert_rows_are(fill(assembler, [number], seq_length, num_slots), [row])
        first += num_rows


def test_the_oracle_draws_the_published_numbers_of_splitmix64() -> None:
    random = CounterRandom(1234567)
    # The first outputs that Vigna's splitmix64.c gives for this seed.
    assert [random.next() for _ in range(5)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from _megatron_bert_core import DocumentLengths, IndexedDataset, RowPlan, epoch_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.core import oracle
from tests.core.support import text_documents, write_documents, write_sequences

Stages = list[tuple[int, int]]
Corpora = list[list[int]]

lengths_of_a_corpus = st.lists(st.integers(0, 25), min_size=1, max_size=30).filter(any)
corpora = st.lists(lengths_of_a_corpus, min_size=1, max_size=3)
stage_lists = st.lists(st.tuples(st.integers(3, 24), st.integers(0, 60)), max_size=4)
seeds = st.integers(0, 2**63 - 1)


def as_array(lengths: Sequence[int]) -> NDArray[np.int64]:
    return np.array(lengths, dtype=np.int64)


def make_plan(lengths: Corpora, weights: Sequence[float], stages: Stages, seed: int) -> RowPlan:
    return RowPlan([as_array(corpus) for corpus in lengths], weights, stages, seed)


def all_rows(plan: RowPlan) -> list[list[oracle.Segment]]:
    return [plan.segments(row) for row in range(plan.num_rows)]


def times_read(rows: Sequence[Sequence[oracle.Segment]]) -> Counter[tuple[int, int, int]]:
    """How often each token, named by (corpus, document, offset), is read."""
    return Counter(
        (corpus, document, offset + i)
        for row in rows
        for corpus, document, offset, length in row
        for i in range(length)
    )


@settings(max_examples=150, derandomize=True, deadline=None)
@given(corpora, st.data(), stage_lists, seeds)
def test_every_row_is_that_of_the_oracle(
    lengths: Corpora, data: st.DataObject, stages: Stages, seed: int
) -> None:
    weights = [data.draw(st.floats(0.01, 10)) for _ in lengths]
    plan = make_plan(lengths, weights, stages, seed)
    assert all_rows(plan) == oracle.plan(lengths, weights, stages, seed)
    ends = np.cumsum([rows for _, rows in stages])
    for row in range(plan.num_rows):
        stage = int(np.searchsorted(ends, row, side="right"))
        assert plan.stage_of(row) == (stage, row - int(ends[stage] - stages[stage][1]))


def write_sentences(prefix: Path, documents: Sequence[Sequence[int]]) -> IndexedDataset:
    """Documents of sentences with the given lengths; what the tokens are does not matter."""
    sentences = [[9] * length for document in documents for length in document]
    boundaries = np.cumsum([0, *map(len, documents)])
    write_sequences(prefix, sentences, boundaries.tolist())
    return IndexedDataset(str(prefix))


# Rows of 64 slots and more may stay empty by a slot or a few for a sentence's end.
sentence_stages = st.lists(st.tuples(st.integers(60, 260), st.integers(0, 12)), max_size=3)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 40), max_size=12), min_size=1, max_size=8).filter(
        lambda documents: any(map(sum, documents))
    ),
    sentence_stages,
    seeds,
)
def test_rows_of_a_set_of_sentences_are_those_of_the_oracle(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[list[int]],
    stages: Stages,
    seed: int,
) -> None:
    dataset = write_sentences(tmp_path_factory.mktemp("sentences") / "a", documents)
    lengths = [sum(document) for document in documents]
    ends = [set(np.cumsum(document).tolist()) for document in documents]
    # As many sentences as documents are taken for documents of one sequence each.
    one_sequence_each = all(len(document) == 1 for document in documents)
    expected = oracle.plan([lengths], [1.0], stages, seed, None if one_sequence_each else [ends])
    assert all_rows(RowPlan([dataset], [1.0], stages, seed)) == expected


def test_a_row_ends_with_a_sentence_where_that_leaves_few_slots_empty(tmp_path: Path) -> None:
    # 30 slots of a row are text: two sentences and most of a third, or a part of one long one.
    dataset = write_sentences(tmp_path / "a", [[40, 21, 400, 30]])
    rows = all_rows(RowPlan([dataset], [1.0], [(64, 7)], 5))
    cut_at = sorted(offset + length for ((_, _, offset, length),) in rows)
    assert cut_at[0] == 61  # of 62: the second sentence's end
    assert cut_at[1:4] == [123, 185, 247]  # no sentence ends near the row's end


@settings(max_examples=60, derandomize=True, deadline=None)
@given(lengths_of_a_corpus, st.floats(0.05, 0.95), stage_lists, seeds)
def test_the_two_sides_of_a_split_have_every_document_once(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    fraction: float,
    stages: Stages,
    seed: int,
) -> None:
    dataset = write_documents(tmp_path_factory.mktemp("split") / "a", text_documents(lengths))
    for side in (False, True):
        # The held-out side has its documents alone, the other all, some of them without tokens.
        has = [oracle.held_out(document, fraction) == side for document in range(len(lengths))]
        numbers = [number for number, on_side in enumerate(has) if on_side or not side]
        on_side = [lengths[number] if has[number] else 0 for number in numbers]
        half = DocumentLengths(dataset, held_out_fraction=fraction, held_out=side)
        assert half.on_side(0, len(lengths)).tolist() == has
        assert half.on_side(1, len(lengths)).tolist() == has[1:]
        assert half.num_tokens == sum(on_side)
        assert half.num_nonempty_documents == sum(length > 0 for length in on_side)
        if any(on_side):
            rows = all_rows(RowPlan([half], [1.0], stages, seed))
            assert rows == [
                [(corpus, numbers[document], *span) for corpus, document, *span in row]
                for row in oracle.plan([on_side], [1.0], stages, seed)
            ]


def test_about_the_asked_share_of_documents_is_held_out(tmp_path: Path) -> None:
    dataset = write_documents(tmp_path / "a", [np.array([7], dtype=np.int32)] * 20_000)
    held = DocumentLengths(dataset, held_out_fraction=0.1, held_out=True).num_tokens
    assert abs(held - 2000) < 4 * np.sqrt(20_000 * 0.1 * 0.9)
    rest = DocumentLengths(dataset, held_out_fraction=0.1, held_out=False).num_tokens
    assert held + rest == 20_000
    assert DocumentLengths(dataset, held_out_fraction=0.0, held_out=True).num_tokens == 0
    all_of_it = DocumentLengths(dataset, held_out_fraction=0.0, held_out=False)
    assert all_of_it.on_side(0, 20_000).all()
    for first, end in ((-1, 3), (3, 2)):
        with pytest.raises(IndexError, match=f"documents {first} to {end}"):
            all_of_it.on_side(first, end)
    with pytest.raises(ValueError, match="held-out fraction"):
        DocumentLengths(dataset, held_out_fraction=1.0, held_out=False)


@pytest.mark.parametrize("num_documents", [8191, 8192, 20_001, 131_075])
def test_rows_of_permuted_groups_are_those_of_the_oracle(num_documents: int) -> None:
    lengths = np.random.default_rng(num_documents).integers(0, 4, num_documents).tolist()
    stages = [(12, 5000), (30, 1500)]
    assert all_rows(make_plan([lengths], [1.0], stages, 7)) == oracle.plan(
        [lengths], [1.0], stages, 7
    )


def test_rows_of_several_full_windows_are_those_of_the_oracle() -> None:
    lengths = np.random.default_rng(0).integers(0, 400, 900).tolist()
    stages = [(6, 20_000), (5, 25_000), (9, 18_000)]
    assert all_rows(make_plan([lengths], [1.0], stages, 3)) == oracle.plan(
        [lengths], [1.0], stages, 3
    )


@settings(max_examples=100, derandomize=True, deadline=None)
@given(lengths_of_a_corpus, stage_lists, seeds)
def test_every_epoch_is_read_exactly_once_over_all_stages(
    lengths: list[int], stages: Stages, seed: int
) -> None:
    plan = make_plan([lengths], [1.0], stages, seed)
    counts = times_read(all_rows(plan))
    tokens = [(0, d, offset) for d, length in enumerate(lengths) for offset in range(length)]
    times = [counts[token] for token in tokens]
    # The epoch that the run ends in is read in part; none before it lacks a token.
    assert max(times) - min(times) <= 1
    assert counts.total() == sum(times)
    assert plan.epochs() == [pytest.approx(sum(times) / len(tokens))]


@settings(max_examples=60, derandomize=True, deadline=None)
@given(lengths_of_a_corpus, st.integers(3, 24), seeds)
def test_the_rows_of_an_epoch_hold_each_token_once(
    lengths: list[int], seq_length: int, seed: int
) -> None:
    rows = epoch_rows(as_array(lengths), seq_length, seed)
    counts = times_read(all_rows(make_plan([lengths], [1.0], [(seq_length, rows)], seed)))
    assert set(counts.values()) == {1}
    assert counts.total() == sum(lengths)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(corpora, stage_lists.filter(bool), st.integers(1, 100), seeds)
def test_lengthening_the_last_stage_changes_no_row_before(
    lengths: Corpora, stages: Stages, more: int, seed: int
) -> None:
    weights = [1.0 + corpus for corpus in range(len(lengths))]
    seq_length, rows = stages[-1]
    before = all_rows(make_plan(lengths, weights, stages, seed))
    longer = make_plan(lengths, weights, [*stages[:-1], (seq_length, rows + more)], seed)
    assert all_rows(longer)[: len(before)] == before


@settings(max_examples=60, derandomize=True, deadline=None)
@given(corpora, stage_lists.filter(bool), st.integers(1, 100), seeds, st.data())
def test_lengthening_the_current_stage_changes_no_row_before_its_end(
    lengths: Corpora, stages: Stages, more: int, seed: int, data: st.DataObject
) -> None:
    current = data.draw(st.integers(0, len(stages) - 1))
    seq_length, rows = stages[current]
    lengthened = [*stages[:current], (seq_length, rows + more), *stages[current + 1 :]]
    weights = [1.0] * len(lengths)
    seen = sum(rows for _, rows in stages[: current + 1])
    before = all_rows(make_plan(lengths, weights, stages, seed))[:seen]
    assert all_rows(make_plan(lengths, weights, lengthened, seed))[:seen] == before


@settings(max_examples=60, derandomize=True, deadline=None)
@given(corpora, stage_lists, seeds)
def test_a_row_is_filled_until_no_segment_fits_or_an_epoch_ends(
    lengths: Corpora, stages: Stages, seed: int
) -> None:
    plan = make_plan(lengths, [1.0] * len(lengths), stages, seed)
    short_rows = Counter[int]()
    for row in range(plan.num_rows):
        segments = plan.segments(row)
        seq_length = stages[plan.stage_of(row)[0]][0]
        free = seq_length - sum(length + 2 for *_, length in segments)
        assert free >= 0
        assert len({corpus for corpus, *_ in segments}) == 1
        for corpus, document, offset, length in segments:
            assert length >= 1
            assert offset >= 0
            assert offset + length <= lengths[corpus][document]
        short_rows[segments[0][0]] += free > 2
    for corpus, epochs in enumerate(plan.epochs()):
        # One ends each epoch, and once more where a stage carries on with an epoch's last window.
        assert short_rows[corpus] <= epochs + 1 + len(stages)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=5), st.integers(1, 700))
def test_every_corpus_has_its_share_after_every_row(weights: list[float], rows: int) -> None:
    plan = make_plan([[5]] * len(weights), weights, [(8, rows)], 0)
    counts = np.zeros(len(weights))
    for row in range(rows):
        counts[plan.segments(row)[0][0]] += 1
        ideal = np.array(weights) / sum(weights) * (row + 1)
        assert np.abs(counts - ideal).max() < len(weights)


def test_shares_start_anew_with_each_stage() -> None:
    plan = make_plan([[5], [5]], [2.0, 1.0], [(8, 2), (8, 3)], 0)
    assert [plan.segments(row)[0][0] for row in range(5)] == [0, 1, 0, 1, 0]


def test_rows_of_a_stage_are_not_in_stream_order() -> None:
    plan = make_plan([[1000]], [1.0], [(12, 100)], 0)
    offsets = [plan.segments(row)[0][2] for row in range(100)]
    assert sorted(offsets) == list(range(0, 1000, 10))
    assert offsets != sorted(offsets)


def test_epochs_seeds_and_corpora_visit_documents_in_different_orders() -> None:
    lengths = [6] * 200
    rows = all_rows(make_plan([lengths], [1.0], [(8, 400)], 0))
    orders = [
        rows[:200],
        rows[200:],
        all_rows(make_plan([lengths], [1.0], [(8, 200)], 1)),
        [
            [(0, *segment[1:]) for segment in row]
            for row in all_rows(make_plan([lengths, lengths], [1.0, 1.0], [(8, 400)], 0))
            if row[0][0] == 1
        ],
    ]
    documents = [[row[0][1] for row in order] for order in orders]
    assert all(sorted(order) == list(range(200)) for order in documents)
    assert len({tuple(order) for order in documents}) == len(orders)


def test_lengths_plan_as_the_dataset_they_are_of(tmp_path: Path) -> None:
    lengths = [7, 0, 30, 2, 0, 11]
    stages = [(10, 9), (20, 5)]
    single = write_documents(tmp_path / "single", text_documents(lengths))
    sequences = [[5] * count for count in (3, 4, 30, 1, 1, 11)]
    write_sequences(tmp_path / "joined", sequences, [0, 2, 2, 3, 5, 5, 6])
    sources: list[IndexedDataset | NDArray[np.int64] | NDArray[np.int32]] = [
        single,
        IndexedDataset(str(tmp_path / "joined")),
        np.array(lengths, dtype=np.int64),
        np.array(lengths, dtype=np.int32),
    ]
    plans = [all_rows(RowPlan([source], [1.0], stages, 5)) for source in sources]
    assert all(rows == plans[0] for rows in plans)
    assert len({epoch_rows(source, 10) for source in sources}) == 1


def test_a_plan_keeps_its_lengths_alive() -> None:
    plan = RowPlan([np.full(100_000, 9, dtype=np.int64)], [1.0], [(16, 100)], 0)
    churn = [np.zeros(100_000, dtype=np.int64) for _ in range(10)]
    assert len(churn) == 10
    assert {sum(s[3] for s in plan.segments(row)) for row in range(100)} <= {12, 13, 14}


@pytest.mark.parametrize(
    ("lengths", "weights", "stages", "message"),
    [
        ([], [], [], "at least one"),
        ([[5]], [1.0, 1.0], [], "weight for each corpus"),
        ([[5], [0, 0]], [1.0, 1.0], [(8, 1)], "corpus 1 holds no token"),
        ([[]], [1.0], [(8, 1)], "corpus 0 holds no token"),
        ([[5, -1]], [1.0], [(8, 1)], "document 1 has the length -1"),
        ([[2**62, 2**62]], [1.0], [(8, 1)], "document 0 has the length"),
        ([[5]], [0.0], [(8, 1)], "positive"),
        ([[5]], [float("nan")], [(8, 1)], "positive"),
        ([[5]], [1.0], [(2, 1)], "at least 3 slots"),
        ([[5]], [1.0], [(8, -1)], "-1 rows"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    lengths: Corpora, weights: list[float], stages: Stages, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(lengths, weights, stages, 0)


def test_a_row_outside_the_plan_is_an_index_error() -> None:
    plan = make_plan([[5]], [1.0], [(8, 3)], 0)
    for row in (-1, 3):
        with pytest.raises(IndexError, match="of 3"):
            plan.segments(row)


def test_lengths_of_another_type_are_refused() -> None:
    with pytest.raises(TypeError, match="int32 or int64"):
        RowPlan([np.array([1.0])], [1.0], [(8, 1)], 0)

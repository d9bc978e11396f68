"""Which documents of a corpus are read, and what is found out about its files."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megatron_bert.config.schema import Config, Corpus
from megatron_bert.data.corpora import (
    CorpusPart,
    OpenCorpus,
    evaluation_parts,
    open_corpus,
    open_evaluation_corpora,
    part_names,
    training_parts,
)
from megatron_bert.data.indexed_dataset import DatasetInfo, write_dataset_info
from megatron_bert.data.source import RowSource, RowStage, training_source, validation_source
from megatron_bert.data.tokenizer import Tokenizer
from megatron_bert.errors import DataError
from tests.core.support import write_documents
from tests.small_model import small_config

FRACTION = 0.25


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """400 documents, each of an id that no other has."""
    write_documents(tmp_path / "set", [[number + 10] * 7 for number in range(400)])
    return tmp_path / "set"


def _config(prefix: Path, **sections: object) -> Config:
    data = {"train": [{"prefix": str(prefix)}], "held_out_fraction": FRACTION}
    return small_config(data=data, **sections)


def _held_out(config: Config, tokenizer: Tokenizer) -> RowSource:
    """All rows of the one held-out part."""
    (part,) = evaluation_parts(config)
    return validation_source(config, tokenizer, open_corpus(part, tokenizer), 32, 0.15)


def _documents_in(source: RowSource) -> set[int]:
    """The documents that a source's rows read."""
    found = set[int]()
    for row in range(source.num_rows):
        batch = source.batch(np.array([row]), 0)
        tokens = batch.tokens_BS.numpy().copy()
        tokens[0, batch.masked_BM.numpy()[0]] = batch.labels_BM.numpy()[0]
        found |= set((tokens[tokens >= 10] - 10).tolist())
    return found


def test_what_is_held_out_is_evaluated_and_never_trained_on(
    prefix: Path, tiny_tokenizer: Tokenizer
) -> None:
    config = _config(prefix, eval={"batches": 1000}, curriculum=[{"seq_length": 32, "steps": 60}])
    trained = _documents_in(training_source(config, tiny_tokenizer))
    evaluated = _documents_in(_held_out(config, tiny_tokenizer))
    assert trained | evaluated == set(range(400))
    assert not trained & evaluated
    assert abs(len(evaluated) - 400 * FRACTION) < 4 * np.sqrt(400 * FRACTION * (1 - FRACTION))


def test_the_seed_does_not_change_what_is_held_out(prefix: Path, tiny_tokenizer: Tokenizer) -> None:
    evaluated = []
    for seed in (1, 2):
        config = _config(prefix, run={"seed": seed}, eval={"batches": 1000})
        evaluated.append(_documents_in(_held_out(config, tiny_tokenizer)))
    assert evaluated[0] == evaluated[1]


def test_held_out_parts_stand_beside_the_corpora_of_data_valid(prefix: Path) -> None:
    data = {"train": [{"prefix": "a/x"}, {"prefix": "b/x"}], "valid": [{"prefix": "v"}]}
    config = small_config(data={**data, "held_out_fraction": FRACTION})
    names = part_names(evaluation_parts(config))
    assert names == ["v", "a/x (held out)", "b/x (held out)"]
    assert part_names(training_parts(config)) == ["a/x", "b/x"]
    assert part_names(evaluation_parts(small_config(data=data))) == ["v"]


def test_a_split_that_leaves_nothing_on_a_side_is_refused(
    tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    write_documents(tmp_path / "one", [[50, 51]])
    part = CorpusPart(Corpus(prefix=str(tmp_path / "one")), 0.001, held_out=True)
    with pytest.raises(DataError, match=r"= 0.001 holds out no document of .*one"):
        open_corpus(part, tiny_tokenizer)


def test_a_corpus_too_small_to_hold_anything_out_is_left_out_with_a_word(
    prefix: Path, tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    write_documents(tmp_path / "one", [[50, 51]])
    train = [{"prefix": str(tmp_path / "one")}, {"prefix": str(prefix)}]
    config = small_config(data={"train": train, "held_out_fraction": 0.01})
    corpora, warnings = open_evaluation_corpora(config, tiny_tokenizer)
    assert [corpus.part.prefix for corpus in corpora] == [f"{prefix} (held out)"]
    (warning,) = warnings
    assert "one is not evaluated: data.held_out_fraction = 0.01 holds out none" in warning


def test_held_out_text_of_which_nothing_is_left_is_refused(
    tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    write_documents(tmp_path / "one", [[50, 51]])
    train = {"train": [{"prefix": str(tmp_path / "one")}], "held_out_fraction": 0.001}
    with pytest.raises(DataError, match=r"= 0.001 holds out no document of any training corpus"):
        open_evaluation_corpora(small_config(data=train), tiny_tokenizer)
    valid = {**train, "valid": train["train"]}
    corpora, warnings = open_evaluation_corpora(small_config(data=valid), tiny_tokenizer)
    assert [corpus.part.held_out for corpus in corpora] == [False]
    assert len(warnings) == 1
    assert open_evaluation_corpora(small_config(), tiny_tokenizer) == ([], [])


def test_the_documents_of_either_side_are_counted_without_empty_ones(
    tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    write_documents(tmp_path / "set", [[9] * (number % 2) for number in range(1000)])
    corpus = Corpus(prefix=str(tmp_path / "set"))

    def opened(held_out_fraction: float, *, held_out: bool = False) -> OpenCorpus:
        return open_corpus(CorpusPart(corpus, held_out_fraction, held_out), tiny_tokenizer)

    assert opened(0.0).num_documents == 500
    sides = [opened(FRACTION, held_out=held_out) for held_out in (False, True)]
    assert [side.num_documents for side in sides] == [side.num_tokens for side in sides]
    assert sum(side.num_documents for side in sides) == 500


def _change(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "truncated":
        with path.open("r+b") as file:
            file.truncate(len(content) // 2)
    elif how == "grown":
        with path.open("ab") as file:
            file.write(b"\0" * 8)
    else:
        other = path.with_name("other")
        other.write_bytes(content)
        other.replace(path)


@pytest.mark.parametrize("how", ["truncated", "grown", "replaced"])
@pytest.mark.parametrize("suffix", [".bin", ".idx", ".words"])
def test_a_file_that_changes_during_a_run_ends_it_with_a_word(
    prefix: Path, tiny_tokenizer: Tokenizer, how: str, suffix: str
) -> None:
    _words(prefix, [1] * 2800)
    source = training_source(_config(prefix, mlm={"unit": "whole_word"}), tiny_tokenizer)
    source.check_unchanged()
    _change(Path(f"{prefix}{suffix}"), how)
    with pytest.raises(DataError, match=rf"set\{suffix}.* begin a new run with the new data"):
        source.check_unchanged()


def _words(prefix: Path, starts: list[int]) -> None:
    bits = np.packbits(np.array(starts, dtype=np.uint8), bitorder="little")
    Path(f"{prefix}.words").write_bytes(bits.tobytes())


def _chosen(source: RowSource) -> list[list[int]]:
    batch = source.batch(np.arange(source.num_rows), 0)
    return [
        positions[weights > 0].tolist()
        for positions, weights in zip(
            batch.masked_BM.numpy(), batch.weights_BM.numpy(), strict=True
        )
    ]


def test_words_of_a_dictionary_are_masked_whole_in_place_of_the_vocabularys(
    tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    # One document of 30 tokens a row. Its words have 5, 5, 1, 1, 5, 5, 3 and 5 tokens.
    lengths = [5, 5, 1, 1, 5, 5, 3, 5]
    starts = [int(i == 0) for length in lengths for i in range(length)]
    write_documents(tmp_path / "set", [list(range(20, 50))] * 50, 2)
    _words(tmp_path / "set", starts * 50)
    config = small_config(data={"train": [{"prefix": str(tmp_path / "set")}]})
    config = config.model_copy(update={"mlm": config.mlm.model_copy(update={"unit": "whole_word"})})
    begins = np.cumsum([1, *lengths])
    words = [set(range(*bounds)) for bounds in pairwise(begins.tolist())]
    source = RowSource(
        config,
        tiny_tokenizer,
        [open_corpus(part, tiny_tokenizer, with_words=True) for part in training_parts(config)],
        [RowStage(32, 50, 0.3)],
        seed=3,
    )
    seen = set[int]()
    for chosen in _chosen(source):
        whole = [number for number, word in enumerate(words) if word <= set(chosen)]
        assert set(chosen) == set().union(*(words[number] for number in whole))
        seen |= set(whole)
    assert seen == set(range(len(words)))


def test_words_of_another_set_are_refused_but_only_where_words_are_masked(
    prefix: Path, tiny_tokenizer: Tokenizer
) -> None:
    _words(prefix, [1] * 80)
    part = CorpusPart(Corpus(prefix=str(prefix)))
    assert open_corpus(part, tiny_tokenizer).word_starts is None
    with pytest.raises(DataError, match=r"set\.words: 10 bytes, expected 350.*--word-boundaries"):
        open_corpus(part, tiny_tokenizer, with_words=True)


def test_a_fingerprint_follows_the_words(prefix: Path, tiny_tokenizer: Tokenizer) -> None:
    part = CorpusPart(Corpus(prefix=str(prefix)))
    fingerprints = set[str]()
    for starts in (None, [1] * 2800, [1, 0] * 1400):
        if starts is not None:
            _words(prefix, starts)
        fingerprints.add(open_corpus(part, tiny_tokenizer, with_words=True).fingerprint)
    assert len(fingerprints) == 3


def test_a_fingerprint_follows_the_words_to_their_end(
    tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    write_documents(tmp_path / "set", [np.full(1_000_000, 20, dtype=np.int32)] * 9, 2)
    part = CorpusPart(Corpus(prefix=str(tmp_path / "set")))
    words = tmp_path / "set.words"
    fingerprints = set[str]()
    for last in (b"\0", b"\1"):
        words.write_bytes(bytes(9_000_000 // 8 - 1) + last)
        fingerprints.add(open_corpus(part, tiny_tokenizer, with_words=True).fingerprint)
    assert len(fingerprints) == 2


def test_a_sidecar_of_another_set_is_refused(prefix: Path, tiny_tokenizer: Tokenizer) -> None:
    info = DatasetInfo(
        tokenizer_hash=tiny_tokenizer.hash,
        tokenizer_name=tiny_tokenizer.name,
        vocab_size=tiny_tokenizer.vocab_size,
        documents=400,
        tokens=2800,
        sources=(),
    )
    write_dataset_info(prefix, info)
    open_corpus(CorpusPart(Corpus(prefix=str(prefix))), tiny_tokenizer)
    write_dataset_info(prefix, replace(info, tokens=2801))
    with pytest.raises(DataError, match=r"set\.json tells of 400 documents and 2,801 tokens, but"):
        open_corpus(CorpusPart(Corpus(prefix=str(prefix))), tiny_tokenizer)

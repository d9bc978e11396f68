"""Megatron-LM's own reader and builder of datasets, against ours, in both directions."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from megatron_bert.data.indexed_dataset import open_dataset
from megatron_bert.data.merge import merge_datasets
from megatron_bert.data.tokenizer import Tokenizer
from megatron_bert.errors import DataError
from tests.distributed_harness import run_ranks
from tests.training.runs import run_config, steps_of, train
from tools import preprocess_data

pytestmark = pytest.mark.peers

# Documents are lists of sequences, sequences lists of ids.
Documents = Sequence[Sequence[Sequence[int]]]


@pytest.fixture(scope="module")
def megatron() -> ModuleType:
    """Megatron-LM's `indexed_dataset` module."""
    with warnings.catch_warnings():
        # It announces at length which of its accelerators are missing.
        warnings.simplefilter("ignore")
        return pytest.importorskip(
            "megatron.core.datasets.indexed_dataset",
            reason="no megatron-core (tests/run.sh --peers installs it)",
            exc_type=ImportError,
        )


def build(
    megatron: ModuleType,
    prefix: Path,
    documents: Documents,
    dtype: type,
    *,
    multimodal: bool = False,
) -> None:
    """A dataset by Megatron-LM's builder, as its `preprocess_data.py` calls it."""
    builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype, multimodal=multimodal)
    for document in documents:
        tokens = [token for sequence in document for token in sequence]
        modes = [1] * len(document) if multimodal else None
        builder.add_document(tokens, [len(sequence) for sequence in document], modes)
    builder.finalize(f"{prefix}.idx")


def read_by_megatron(megatron: ModuleType, prefix: Path) -> tuple[list[list[int]], list[int]]:
    """Its sequences and its document boundaries."""
    dataset = megatron.IndexedDataset(str(prefix), mmap=False)
    sequences = [dataset[number].tolist() for number in range(len(dataset))]
    return sequences, dataset.document_indices.tolist()


def read_by_us(prefix: Path) -> list[list[int]]:
    dataset = open_dataset(prefix)
    return [dataset.document(number).tolist() for number in range(dataset.num_documents)]


@pytest.fixture(scope="module")
def sentences(tiny_texts: list[str], tiny_tokenizer: Tokenizer) -> Documents:
    """Each line of a text as a sequence."""
    return [tiny_tokenizer.encode_batch(text.split("\n")) for text in tiny_texts]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("by_sentence", [True, False])
def test_a_set_of_megatrons_is_read_token_for_token_and_trained_on(
    megatron: ModuleType,
    sentences: Documents,
    tiny_tokenizer_path: Path,
    tmp_path: Path,
    dtype: type,
    by_sentence: bool,
) -> None:
    joined = [[token for sequence in document for token in sequence] for document in sentences]
    documents = sentences if by_sentence else [[document] for document in joined]
    build(megatron, tmp_path / "train", documents, dtype)
    assert read_by_us(tmp_path / "train") == joined
    dataset = open_dataset(tmp_path / "train")
    assert dataset.num_sequences == sum(map(len, documents))
    assert dataset.token_bytes == np.dtype(dtype).itemsize

    (tmp_path / "tiny.model").write_bytes(tiny_tokenizer_path.read_bytes())
    stages = [{"seq_length": 32, "steps": 1}, {"seq_length": 64, "steps": 1}]
    config = run_config(tmp_path, tmp_path / "run", valid=False, curriculum=stages)
    (lines,) = run_ranks(1, train, config)
    assert list(steps_of(lines)) == [1, 2]


def test_an_empty_document_of_megatrons_is_read_as_empty(
    megatron: ModuleType, tmp_path: Path
) -> None:
    build(megatron, tmp_path / "set", [[[5, 6]], [[]], [], [[7], []]], np.int32)
    assert read_by_us(tmp_path / "set") == [[5, 6], [], [], [7]]


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32])
def test_a_set_of_megatrons_in_another_type_is_refused_by_the_types_name(
    megatron: ModuleType, tmp_path: Path, dtype: type
) -> None:
    build(megatron, tmp_path / "set", [[[5, 6]], [[7]]], dtype)
    with pytest.raises(DataError, match=rf"set\.idx: token type code \d \({dtype.__name__}\)"):
        open_dataset(tmp_path / "set")


def test_a_multimodal_set_of_megatrons_is_refused_as_such(
    megatron: ModuleType, tmp_path: Path
) -> None:
    build(megatron, tmp_path / "set", [[[5, 6], [7]], [[8]]], np.int32, multimodal=True)
    with pytest.raises(DataError, match=r"set\.idx: a multimodal dataset .* only text"):
        open_dataset(tmp_path / "set")


def test_a_set_of_ours_is_read_by_megatron_token_for_token(
    megatron: ModuleType,
    tiny_texts: list[str],
    tiny_tokenizer: Tokenizer,
    tiny_tokenizer_path: Path,
    tmp_path: Path,
) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny_texts))
    arguments = ["--input", str(corpus), "--tokenizer", str(tiny_tokenizer_path)]
    preprocess_data.main([*arguments, "--output-prefix", str(tmp_path / "ours")])
    sequences, boundaries = read_by_megatron(megatron, tmp_path / "ours")
    assert sequences == tiny_tokenizer.encode_batch(tiny_texts)
    assert boundaries == list(range(len(tiny_texts) + 1))


def test_merging_gives_the_files_that_megatrons_merging_gives(
    megatron: ModuleType, sentences: Documents, tmp_path: Path
) -> None:
    parts = [tmp_path / name for name in ("a", "b", "c")]
    for number, part in enumerate(parts):
        build(megatron, part, sentences[number * 100 : number * 100 + 100], np.uint16)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for part in parts:
        builder.add_index(str(part))
    builder.finalize(str(tmp_path / "theirs.idx"))
    merge_datasets(parts, tmp_path / "ours")
    for suffix in (".bin", ".idx"):
        theirs = (tmp_path / f"theirs{suffix}").read_bytes()
        assert (tmp_path / f"ours{suffix}").read_bytes() == theirs

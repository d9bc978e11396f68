from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _megatron_bert_core import IndexedDataset, epoch_rows

from megatron_bert.config.arithmetic import masked_slots
from megatron_bert.config.schema import Config, MaskUnit
from megatron_bert.data import source as source_module
from megatron_bert.data.corpora import evaluation_parts, open_corpus
from megatron_bert.data.indexed_dataset import DatasetInfo, open_dataset, write_dataset_info
from megatron_bert.data.source import training_source, validation_source
from megatron_bert.data.tokenizer import Tokenizer
from megatron_bert.errors import DataError
from tests.core.support import write_documents

STAGES = [{"seq_length": 32, "steps": 3}, {"seq_length": 64, "steps": 2}]
GLOBAL_SIZE = 4


def make_config(*prefixes: Path, **sections: Any) -> Config:
    corpora = [
        {"prefix": str(prefix), "weight": 1.0 + number} for number, prefix in enumerate(prefixes)
    ]
    model = {
        "num_layers": 1,
        "hidden_size": 8,
        "ffn_hidden_size": 8,
        "num_attention_heads": 1,
        "num_query_groups": 1,
        "max_position_embeddings": 64,
    }
    data = {"tokenizer": "tiny.model", "train": corpora, "valid": corpora}
    return Config.model_validate(
        {
            "model": model,
            "data": data,
            "curriculum": STAGES,
            "batch": {"global_size": GLOBAL_SIZE},
            **sections,
        }
    )


@pytest.fixture
def corpus(tmp_path: Path, tiny_texts: list[str], tiny_tokenizer: Tokenizer) -> Path:
    """A dataset as tools/preprocess_data.py makes it."""
    prefix = tmp_path / "corpus"
    documents = tiny_tokenizer.encode_batch(tiny_texts)
    dataset = write_documents(prefix, documents, 2)
    info = DatasetInfo(
        tokenizer_hash=tiny_tokenizer.hash,
        tokenizer_name=tiny_tokenizer.name,
        vocab_size=tiny_tokenizer.vocab_size,
        documents=dataset.num_documents,
        tokens=dataset.num_tokens,
        sources=(),
    )
    write_dataset_info(prefix, info)
    return prefix


@pytest.mark.parametrize("unit", ["token", "whole_word", "ngram"])
def test_a_batch_has_the_shapes_and_types_of_its_stage(
    corpus: Path, tiny_tokenizer: Tokenizer, unit: MaskUnit
) -> None:
    config = make_config(corpus, mlm={"unit": unit})
    source = training_source(config, tiny_tokenizer)
    assert source.num_rows == 5 * GLOBAL_SIZE
    for stage, first, seq_length in ((0, 0, 32), (1, 3 * GLOBAL_SIZE, 64)):
        batch = source.batch(np.array([first, -1, first + 1]), stage)
        assert source.row_shape(stage)[0] == seq_length
        slots = masked_slots(config.mlm.probability, unit, seq_length)
        shapes = [tuple(tensor.shape) for tensor in batch.model_inputs()]
        assert shapes == [(3, seq_length)] * 2 + [(3, slots)] * 3 + [(3,)]
        dtypes = [tensor.dtype for tensor in batch.model_inputs()]
        assert dtypes == [torch.int32] * 4 + [torch.float32, torch.int64]
        assert batch.rows_B.tolist() == [first, -1, first + 1]
        assert batch.weights_BM.sum(1)[1] == 0
        assert (batch.weights_BM.sum(1)[[0, 2]] >= 1).all()
        assert (batch.tokens_BS == tiny_tokenizer.mask_id).any()
        assert 0 < batch.batch_hash < 2**64


def test_a_row_is_the_tokenizers_text(corpus: Path, tiny_tokenizer: Tokenizer) -> None:
    source = training_source(make_config(corpus), tiny_tokenizer)
    batch = source.batch(np.arange(GLOBAL_SIZE), 0)
    dataset = open_dataset(corpus)
    streams = [dataset.document(number).tolist() for number in range(dataset.num_documents)]
    text = " ".join(" ".join(map(str, tokens)) for tokens in streams)
    tokens_BS = batch.tokens_BS.clone()
    used = batch.weights_BM == 1
    rows = torch.arange(GLOBAL_SIZE)[:, None].expand_as(used)[used]
    tokens_BS[rows, batch.masked_BM[used].long()] = batch.labels_BM[used]
    for row in tokens_BS.tolist():
        segments = " ".join(map(str, row)).split(f"{tiny_tokenizer.cls_id} ")[1:]
        for segment in segments:
            assert segment.split(f" {tiny_tokenizer.sep_id}")[0] in text


def test_a_batch_of_surplus_rows_takes_the_stage_it_is_given(
    corpus: Path, tiny_tokenizer: Tokenizer
) -> None:
    source = training_source(make_config(corpus), tiny_tokenizer)
    batch = source.batch(np.array([-1, -1]), 1)
    assert batch.tokens_BS.shape == (2, 64)
    assert batch.weights_BM.sum() == 0
    assert batch.batch_hash == 0


def test_a_batch_keeps_its_content_when_it_is_copied(
    corpus: Path, tiny_tokenizer: Tokenizer
) -> None:
    batch = training_source(make_config(corpus), tiny_tokenizer).batch(np.arange(2), 0)
    copied = batch.to(torch.device("cpu"))
    assert copied.batch_hash == batch.batch_hash
    for a, b in zip(copied.model_inputs(), batch.model_inputs(), strict=True):
        assert torch.equal(a, b)


def test_stages_have_the_rows_and_the_masking_rate_that_they_set(
    corpus: Path, tiny_tokenizer: Tokenizer
) -> None:
    stages = [
        {"seq_length": 64, "steps": 2, "mlm": {"probability": 0.3}, "batch": {"global_size": 6}},
        {"seq_length": 64, "steps": 3},
    ]
    source = training_source(make_config(corpus, curriculum=stages), tiny_tokenizer)
    assert source.num_rows == 2 * 6 + 3 * GLOBAL_SIZE
    assert source.row_shape(0) == (64, masked_slots(0.3, "token", 64))
    often, seldom = (source.batch(np.arange(12) + 12 * stage, stage) for stage in (0, 1))
    text = (often.tokens_BS != tiny_tokenizer.pad_id).sum()
    assert float(often.weights_BM.sum() / text) == pytest.approx(0.28, abs=0.03)
    assert float(seldom.weights_BM.sum() / text) == pytest.approx(0.14, abs=0.02)


def test_the_same_configuration_makes_the_same_rows(
    corpus: Path, tiny_tokenizer: Tokenizer
) -> None:
    def batch_hash(seed: int) -> int:
        config = make_config(corpus, run={"seed": seed})
        return training_source(config, tiny_tokenizer).batch(np.arange(8), 0).batch_hash

    assert batch_hash(1) == batch_hash(1)
    assert batch_hash(1) != batch_hash(2)


def test_validation_reads_at_most_one_epoch(corpus: Path, tiny_tokenizer: Tokenizer) -> None:
    def rows(batches: int) -> int:
        config = make_config(corpus, eval={"batches": batches})
        (part,) = evaluation_parts(config)
        opened = open_corpus(part, tiny_tokenizer)
        return validation_source(config, tiny_tokenizer, opened, 64, 0.15).num_rows

    seed = make_config(corpus).run.seed
    assert rows(3) == 3 * GLOBAL_SIZE
    assert rows(10**6) == epoch_rows(open_dataset(corpus), 64, seed)


def test_the_description_tells_documents_tokens_and_epochs(
    corpus: Path, tiny_tokenizer: Tokenizer
) -> None:
    source = training_source(make_config(corpus, corpus), tiny_tokenizer)
    lines = source.describe()
    assert len(lines) == 2
    assert all("300 documents" in line and "read 0." in line for line in lines)
    assert "weight 2" in lines[1]


def test_the_fingerprint_follows_the_content_not_the_place(
    corpus: Path, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    dataset = open_dataset(corpus)
    documents = [dataset.document(number) for number in range(dataset.num_documents)]
    write_documents(tmp_path / "moved", documents, 2)
    documents[0] = documents[0][::-1].copy()
    write_documents(tmp_path / "changed", documents, 2)
    prints = [
        training_source(make_config(prefix), tiny_tokenizer).fingerprint()
        for prefix in (corpus, tmp_path / "moved", tmp_path / "changed")
    ]
    assert prints[0] == prints[1] != prints[2]


def test_a_dataset_of_another_tokenizer_is_refused_with_both_hashes(
    corpus: Path, tiny_tokenizer: Tokenizer
) -> None:
    dataset = open_dataset(corpus)
    info = DatasetInfo(
        "0123" * 16, "other.model", 512, dataset.num_documents, dataset.num_tokens, ()
    )
    write_dataset_info(corpus, info)
    with pytest.raises(
        DataError, match=rf"other\.model.*{'0123' * 16}.*{tiny_tokenizer.hash}"
    ) as e:
        training_source(make_config(corpus), tiny_tokenizer)
    assert "from-hf --tokenizer FILE" in str(e.value)
    write_dataset_info(corpus, replace(info, tokenizer_hash=tiny_tokenizer.hash))
    training_source(make_config(corpus), tiny_tokenizer)


def test_a_dataset_without_sidecar_is_taken(corpus: Path, tiny_tokenizer: Tokenizer) -> None:
    Path(f"{corpus}.json").unlink()
    assert training_source(make_config(corpus), tiny_tokenizer).num_rows == 5 * GLOBAL_SIZE


def test_a_vocabulary_smaller_than_the_datas_largest_id_is_refused(
    tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    write_documents(tmp_path / "set", [[9, 512]])
    with pytest.raises(DataError, match=r"token id 512, but tokenizer .* only 512 pieces"):
        training_source(make_config(tmp_path / "set"), tiny_tokenizer)


def test_an_id_that_sampling_missed_is_refused_when_its_row_is_read(
    tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    tokens = [9] * 5000
    tokens[3] = 600
    write_documents(tmp_path / "set", [[token] for token in tokens])
    source = training_source(
        make_config(tmp_path / "set", curriculum=[{"seq_length": 32, "steps": 125}]),
        tiny_tokenizer,
    )
    remedy = "use the tokenizer that made the dataset"
    with pytest.raises(DataError, match=f"document 3 holds the token id 600.*{remedy}"):
        source.batch(np.arange(500), 0)


def test_a_row_that_the_disk_does_not_give_is_no_matter_of_the_tokenizer(
    corpus: Path, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "megatron_bert.data.corpora.open_dataset",
        lambda prefix: IndexedDataset(str(prefix), mmap=False),
    )
    source = training_source(make_config(corpus), tiny_tokenizer)
    with Path(f"{corpus}.bin").open("r+b") as file:
        file.truncate(0)
    with pytest.raises(DataError, match="truncated while in use; check the disk") as caught:
        source.batch(np.arange(GLOBAL_SIZE), 0)
    assert "tokenizer" not in str(caught.value)


@pytest.mark.parametrize("documents", [[], [[], []]])
def test_an_empty_corpus_is_refused(
    tmp_path: Path, tiny_tokenizer: Tokenizer, documents: list[list[int]]
) -> None:
    write_documents(tmp_path / "set", documents)
    with pytest.raises(DataError, match=r"set holds no token"):
        training_source(make_config(tmp_path / "set"), tiny_tokenizer)


def test_a_missing_corpus_is_refused(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"absent\.idx"):
        training_source(make_config(tmp_path / "absent"), tiny_tokenizer)


def test_a_run_that_reads_a_small_corpus_more_often_than_memory_has_room_for_is_refused(
    corpus: Path, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "room_for_rows", lambda: 10**9)
    # Places of rows alone would fit: a gigabyte has those of 4 billion rows.
    steps = 500_000_000
    config = make_config(corpus, curriculum=[{"seq_length": 64, "steps": steps}])
    with pytest.raises(DataError, match=f"steps = {steps}: with steps of 4 rows .* more text"):
        training_source(config, tiny_tokenizer)


def test_memory_that_cannot_be_had_for_the_plan_is_told_as_the_run_s_length(
    corpus: Path, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_memory(*_: object) -> None:
        raise MemoryError("std::bad_alloc")

    monkeypatch.setattr(source_module, "RowPlan", without_memory)
    with pytest.raises(DataError, match=r"curriculum\.0\.steps = 3: .* use fewer steps"):
        training_source(make_config(corpus), tiny_tokenizer)


def test_evaluation_that_asks_for_more_batches_than_can_be_counted_reads_one_epoch(
    corpus: Path, tiny_tokenizer: Tokenizer
) -> None:
    config = make_config(corpus, eval={"batches": 10**25})
    opened = open_corpus(evaluation_parts(config)[0], tiny_tokenizer)
    source = validation_source(config, tiny_tokenizer, opened, 32, 0.15)
    assert source.num_rows == epoch_rows(opened.lengths, 32, config.run.seed)

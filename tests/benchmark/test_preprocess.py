from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_bert.benchmark.data.preprocess import (
    measure_preprocessing,
    read_documents,
    tokenizer_for,
)
from megatron_bert.data.tokenizer import Tokenizer
from megatron_bert.errors import DataError


@pytest.fixture
def corpus(tiny_texts: list[str], tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny_texts))
    return path


def test_a_small_corpus_is_repeated_and_a_large_one_cut_off(
    corpus: Path, tiny_texts: list[str]
) -> None:
    size = sum(len(text.encode()) for text in tiny_texts)
    assert read_documents([corpus], "text", size * 5 // 2) == tiny_texts * 3
    assert read_documents([corpus], "text", 1) == tiny_texts[:1]


def test_lines_that_cannot_be_used_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{\n{"body": "猫"}\n{"text": "犬"}\n')
    assert read_documents([path], "text", 1) == ["犬"]
    assert read_documents([path], "body", 1) == ["猫"]


@pytest.mark.parametrize("content", ["", '{"text": ""}\n', '{"body": "猫"}\n'])
def test_a_corpus_without_text_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"corpus\.jsonl: no text under the key 'text'"):
        read_documents([path], "text", 1)


def test_a_missing_corpus_is_refused() -> None:
    with pytest.raises(DataError, match=r"--corpus none\.jsonl: no such file"):
        read_documents([Path("none.jsonl")], "text", 1)


def test_without_a_tokenizer_one_is_trained(tiny_texts: list[str], tmp_path: Path) -> None:
    path = tokenizer_for(None, tiny_texts, tmp_path)
    assert path.parent == tmp_path
    assert Tokenizer.load(path).vocab_size > 256


def test_only_a_sentencepiece_model_is_taken(tiny_texts: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"give a SentencePiece \.model"):
        tokenizer_for(Path("tokenizer.json"), tiny_texts, tmp_path)
    with pytest.raises(DataError, match=r"cannot read tokenizer none\.model"):
        tokenizer_for(Path("none.model"), tiny_texts, tmp_path)


def test_the_tokens_counted_are_those_of_the_documents(
    tiny_texts: list[str], tiny_tokenizer_path: Path, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    figures = measure_preprocessing(tiny_texts, tiny_tokenizer_path, tmp_path, repetitions=2)
    assert figures.documents == len(tiny_texts)
    assert figures.tokens == sum(map(len, tiny_tokenizer.encode_batch(tiny_texts)))
    assert figures.tokens_per_second >= figures.median_tokens_per_second > 0
    theirs = figures.sentencepiece_tokens_per_second
    assert theirs >= figures.median_sentencepiece_tokens_per_second > 0
    assert figures.start_seconds > 0

"""JGLUE's own files where they are at hand, small files like them, and tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from tests.huggingface.exported import write_exported
from tests.huggingface.tiny_models import VOCABULARY, tiny_tokenizer

CONTEXT = "猫 [SEP] 吾輩は猫である。名前はまだ無い。"


@pytest.fixture(scope="session")
def jglue(shared_data: Path) -> Path:
    """The folder of JGLUE v1.3; the test is skipped where it is absent."""
    folder = shared_data / "jglue-v1.3"
    if not folder.is_dir():
        pytest.skip(f"no JGLUE at {folder} (set MEGATRON_BERT_TEST_DATA)")
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    return tiny_tokenizer()


def _name_class_as_exported(folder: Path) -> Path:
    """Name the tokenizer's class as exports do; the installed release has one that others lack."""
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings))
    return folder


def _bert(folder: Path) -> Path:
    torch.manual_seed(7)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
        pad_token_id=4,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models of 64 positions: this project's export, and one of transformers' own."""
    folder = tmp_path_factory.mktemp("models")
    written = {"exported": write_exported(folder / "exported"), "bert": _bert(folder / "bert")}
    return {name: _name_class_as_exported(model) for name, model in written.items()}


def row(task: str, number: int) -> dict[str, Any]:
    """A row of a task's file; the label can be read off the texts."""
    even = number % 2 == 0
    first = ("猫" if even else "名前") * (1 + number % 3)
    match task:
        case "jsts":
            return {"sentence1": first, "sentence2": "猫", "label": 5.0 if even else 0.5}
        case "jnli":
            label = "entailment" if even else "contradiction"
            return {"sentence1": first, "sentence2": "猫", "label": label}
        case "marc_ja":
            return {"sentence": first, "label": "positive" if even else "negative"}
        case "jcommonsenseqa":
            choices = {f"choice{n}": "猫" if n == number % 5 else "名" for n in range(5)}
            return {"question": "猫?", **choices, "label": number % 5}
        case _:
            text = "猫である" if even else "まだ無い"
            answer = {"text": text, "answer_start": CONTEXT.index(text)}
            return {"question": first, "id": str(number), "answers": [answer, answer]}


def write_split(task: str, path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows in the task's format."""
    if task == "jsquad":
        paragraph = {"context": CONTEXT, "qas": rows}
        content = json.dumps({"data": [{"title": "猫", "paragraphs": [paragraph]}]})
    else:
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(content)


def write_task(task: str, folder: Path, train: int = 12, valid: int = 10) -> Path:
    """Write both files of a task, and return the folder."""
    folder.mkdir(exist_ok=True)
    for split, count in (("train", train), ("valid", valid)):
        write_split(task, folder / f"{split}-v1.3.json", [row(task, n) for n in range(count)])
    return folder

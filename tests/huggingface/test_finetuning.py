from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from tests.huggingface.tiny_models import HEADS, tiny_config, tiny_tokenizer

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

ROWS, LENGTH, CHOICES = 8, 64, 5

Row = dict[str, Any]


def _lines(data: Path, name: str) -> list[Row]:
    with (data / "jglue-v1.3" / name / "valid-v1.3.json").open(encoding="utf-8") as file:
        return [json.loads(next(file)) for _ in range(ROWS)]


def _answers(data: Path) -> list[Row]:
    text = (data / "jglue-v1.3/jsquad/valid-v1.3.json").read_text("utf-8")
    rows = []
    for paragraph in json.loads(text)["data"][0]["paragraphs"]:
        for question in paragraph["qas"]:
            answer = question["answers"][0]
            rows.append(
                {
                    "question": question["question"][:16],
                    "context": paragraph["context"][answer["answer_start"] :],
                    "length": len(answer["text"]),
                }
            )
    return rows[:ROWS]


def _pair(row: Row, tokenizer: PreTrainedTokenizerFast) -> Row:
    return dict(_encode(tokenizer, row["sentence1"], row["sentence2"]))


def _encode(tokenizer: PreTrainedTokenizerFast, *texts: str) -> Row:
    return dict(tokenizer(*texts, truncation=True, max_length=LENGTH, padding="max_length"))


def _similar(row: Row, tokenizer: PreTrainedTokenizerFast) -> Row:
    return {**_pair(row, tokenizer), "labels": float(row["label"])}


def _entailed(row: Row, tokenizer: PreTrainedTokenizerFast) -> Row:
    labels = ("entailment", "contradiction", "neutral")
    return {**_pair(row, tokenizer), "labels": labels.index(row["label"])}


def _hiragana(row: Row, tokenizer: PreTrainedTokenizerFast) -> Row:
    encoded = _encode(tokenizer, row["sentence1"])
    tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    labels = [int("ぁ" <= token <= "ゖ") if len(token) == 1 else -100 for token in tokens]
    return {**encoded, "labels": labels}


def _masked(row: Row, tokenizer: PreTrainedTokenizerFast) -> Row:
    encoded = _encode(tokenizer, row["sentence1"])
    ids = encoded["input_ids"]
    labels = [token if place % 5 == 2 else -100 for place, token in enumerate(ids)]
    hidden = [
        tokenizer.mask_token_id if label >= 0 else token
        for token, label in zip(ids, labels, strict=True)
    ]
    return {**encoded, "input_ids": hidden, "labels": labels}


def _answered(row: Row, tokenizer: PreTrainedTokenizerFast) -> Row:
    start = len(row["question"]) + 2
    return {
        **_encode(tokenizer, row["question"], row["context"]),
        "start_positions": start,
        "end_positions": min(start + row["length"] - 1, LENGTH - 2),
    }


def _chosen(row: Row, tokenizer: PreTrainedTokenizerFast) -> Row:
    choices = [
        _encode(tokenizer, row["question"], row[f"choice{number}"]) for number in range(CHOICES)
    ]
    columns = {key: [choice[key] for choice in choices] for key in choices[0]}
    return {**columns, "labels": row["label"]}


CASES: dict[str, tuple[str, int, str, Callable[[Row, PreTrainedTokenizerFast], Row]]] = {
    "similarity": ("SequenceClassification", 1, "jsts", _similar),
    "inference": ("SequenceClassification", 3, "jnli", _entailed),
    "script": ("TokenClassification", 2, "jnli", _hiragana),
    "masks": ("MaskedLM", 2, "jnli", _masked),
    "answers": ("QuestionAnswering", 2, "jsquad", _answered),
    "choices": ("MultipleChoice", 2, "jcommonsenseqa", _chosen),
}


@pytest.mark.parametrize("case", CASES)
def test_trainer_fits_every_head_to_a_few_real_rows(
    case: str, shared_data: Path, tmp_path: Path
) -> None:
    head, labels, name, encode = CASES[case]
    rows = _answers(shared_data) if name == "jsquad" else _lines(shared_data, name)
    text = "".join(str(value) for row in rows for value in row.values())
    tokenizer = tiny_tokenizer("".join(sorted(set(text))))
    trainer = Trainer(
        model_init=lambda: HEADS[head](
            tiny_config(vocab_size=len(tokenizer), num_labels=labels, initializer_range=0.1)
        ),
        args=TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_steps=25,
            learning_rate=3e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=3,
        ),
        train_dataset=[encode(row, tokenizer) for row in rows],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 25
    assert losses[-1] < 0.5 * losses[0]

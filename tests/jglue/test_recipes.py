"""Rows of the tasks, and scores of logits."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from megatron_bert.jglue.recipes import RECIPES
from megatron_bert.jglue.task_files import Answer, Choice, Labelled, Question
from tests.huggingface.tiny_models import CLS_ID, SEP_ID


def test_a_pair_is_two_texts_between_separators(tokenizer: PreTrainedTokenizerFast) -> None:
    pair = Labelled(("吾輩", "猫"), 2.5)
    (row,) = RECIPES["jsts"].train_rows([pair], tokenizer, 64)
    a, b, c = (tokenizer.convert_tokens_to_ids(character) for character in "吾輩猫")
    assert row["input_ids"] == [CLS_ID, a, b, SEP_ID, c, SEP_ID]
    assert row["attention_mask"] == [1] * 6
    assert row["labels"] == 2.5
    assert "token_type_ids" not in row


@pytest.mark.parametrize(
    ("task", "example"),
    [
        ("marc_ja", Labelled(("a<SEP>b<CLS><PAD>",), 0)),
        ("jnli", Labelled(("a<SEP>b", "<CLS><PAD>"), 1)),
        ("jcommonsenseqa", Choice("<SEP>", ("<CLS>", "<PAD>", "a", "b", "c"), 1)),
    ],
)
def test_special_tokens_in_the_texts_are_text(
    tokenizer: PreTrainedTokenizerFast, task: str, example: object
) -> None:
    (row,) = RECIPES[task].train_rows([example], tokenizer, 64)
    ids = np.concatenate([np.atleast_1d(part) for part in row["input_ids"]])
    separators = {"marc_ja": 1, "jnli": 2, "jcommonsenseqa": 10}[task]
    assert (ids == SEP_ID).sum() == separators
    assert (ids == CLS_ID).sum() == max(1, separators // 2)
    assert not (ids == tokenizer.pad_token_id).any()


def test_inputs_are_cut_at_the_length_of_the_task(tokenizer: PreTrainedTokenizerFast) -> None:
    for task in ("marc_ja", "jsts", "jnli"):
        texts = ("猫" * 99,) * (1 if task == "marc_ja" else 2)
        (row,) = RECIPES[task].train_rows([Labelled(texts, 0)], tokenizer, 20)
        assert len(row["input_ids"]) == 20
    (row,) = RECIPES["jcommonsenseqa"].train_rows(
        [Choice("猫" * 99, ("猫",) * 5, 0)], tokenizer, 20
    )
    assert [len(ids) for ids in row["input_ids"]] == [20] * 5


def test_batches_are_padded_to_their_longest_row(tokenizer: PreTrainedTokenizerFast) -> None:
    examples = [Choice("猫" * n, ("名", "名前", "猫", "a", "b"), n) for n in (1, 3)]
    recipe = RECIPES["jcommonsenseqa"]
    batch = recipe.collator(tokenizer)(recipe.train_rows(examples, tokenizer, 64))
    assert batch["input_ids"].shape == (2, 5, 1 + 3 + 1 + 2 + 1)
    assert batch["labels"].tolist() == [1, 3]
    assert batch["attention_mask"].sum(-1)[0].tolist() == [5, 6, 5, 5, 5]


def test_scores_are_those_of_the_logits(tokenizer: PreTrainedTokenizerFast) -> None:
    similar = [Labelled(("a", "b"), label) for label in (0.0, 2.0, 5.0)]
    scores = RECIPES["jsts"].valid_set(similar, tokenizer, 64).score(np.array([[1], [2], [9]]))
    assert scores["spearman"] == pytest.approx(1)
    assert scores["pearson"] == pytest.approx(np.corrcoef([1, 2, 9], [0, 2, 5])[0, 1])
    classes = [Labelled(("a", "b"), label) for label in (0, 2)]
    logits = np.array([[3, 1, 2], [3, 1, 2]])
    assert RECIPES["jnli"].valid_set(classes, tokenizer, 64).score(logits) == {"acc": 0.5}
    choices = [Choice("a", ("a", "b", "c", "d", "e"), 4)]
    logits = np.array([[0, 0, 0, 0, 1]])
    assert RECIPES["jcommonsenseqa"].valid_set(choices, tokenizer, 64).score(logits) == {"acc": 1}


def test_jsquads_scores_are_means_over_questions_not_windows(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    context = "a" * 70 + "猫" + "a" * 130
    long = Question("b", context, (Answer("猫", 70),))
    short = Question("b", "名前", (Answer("名前", 0), Answer("前", 1)))
    wrong = Question("b", "吾輩は", (Answer("吾", 0),))
    valid = RECIPES["jsquad"].valid_set([long, short, wrong], tokenizer, 164)
    windows = [len(row["input_ids"]) for row in valid.rows]
    assert windows == [164, 77, 6, 7]
    starts, ends = np.zeros((4, 164)), np.zeros((4, 164))
    # Certain of the cat in the first window; `前`; and `輩は`, which shares nothing with `吾`.
    for number, (start, end) in enumerate([(3 + 70, 3 + 70), (3, 3), (4, 4), (4, 5)]):
        starts[number, start] = ends[number, end] = 1 if number == 1 else 9
    scores = valid.score((starts, ends))
    assert scores == {"EM": pytest.approx(2 / 3), "F1": pytest.approx(2 / 3)}

"""How each kind of task becomes a model's inputs, and how the model's outputs become scores."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean
from types import MappingProxyType
from typing import Any, Protocol, TypeAlias

from transformers import (
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    DataCollatorForMultipleChoice,
    DataCollatorWithPadding,
)

from megatron_bert.jglue.scoring import accuracy, character_f1, correlations, exact_match
from megatron_bert.jglue.task_files import Choice, Labelled, Question
from megatron_bert.jglue.tasks import JNLI_LABELS, MARC_JA_LABELS
from megatron_bert.jglue.windows import (
    answer_tokens,
    best_answer,
    cut_windows,
    is_locatable,
)

Row: TypeAlias = dict[str, Any]
Scores: TypeAlias = dict[str, float]


_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class ValidSet:
    """Rows to evaluate on.

    Attributes:
        rows: the model's inputs.
        score: computes the metrics from the model's logits for the rows, in their order.
    """

    rows: list[Row]
    score: Callable[[Any], Scores]


class Recipe(Protocol):
    """A kind of task.

    Attributes:
        auto_class: transformers' Auto class with the head.
        head: configuration keys that the head needs.
        needs_offsets: whether the tokenizer must tell which characters a token stands for.
    """

    auto_class: Any
    head: Mapping[str, Any]
    needs_offsets: bool

    def train_rows(self, examples: Sequence[Any], tokenizer: Any, max_length: int) -> list[Row]:
        """Return the training rows; examples that cannot be used are left out."""

    def valid_set(self, examples: Sequence[Any], tokenizer: Any, max_length: int) -> ValidSet:
        """Return the rows to evaluate on."""

    def collator(self, tokenizer: Any) -> Any:
        """Return a collator that makes a batch of rows, padded to the longest."""


class Classification:
    """Predict a class for a text or a pair of texts, or, without classes, a similarity."""

    auto_class = AutoModelForSequenceClassification
    needs_offsets = False

    def __init__(self, labels: Sequence[str] = ()) -> None:
        """`labels` are the names of the classes; none: a similarity is predicted."""
        self._is_regression = not labels
        self.head: Mapping[str, Any] = (
            {"num_labels": 1, "problem_type": "regression"}
            if self._is_regression
            else {"num_labels": len(labels), "problem_type": "single_label_classification"}
        )

    def train_rows(
        self, examples: Sequence[Labelled], tokenizer: Any, max_length: int
    ) -> list[Row]:
        """Encode the texts; an input that is too long loses the end of the longer text."""
        return [
            {
                **_encode(tokenizer, max_length, *example.texts),
                "labels": example.label if self._is_regression else int(example.label),
            }
            for example in examples
        ]

    def valid_set(self, examples: Sequence[Labelled], tokenizer: Any, max_length: int) -> ValidSet:
        """Rows scored by accuracy, or by the two correlations."""
        right = [example.label for example in examples]

        def score(logits: Any) -> Scores:
            if self._is_regression:
                pearson, spearman = correlations(logits.reshape(-1), right)
                return {"pearson": pearson, "spearman": spearman}
            return {"acc": accuracy(logits.argmax(-1), right)}

        return ValidSet(self.train_rows(examples, tokenizer, max_length), score)

    def collator(self, tokenizer: Any) -> Any:
        """Return a collator that pads the texts of a batch."""
        return DataCollatorWithPadding(tokenizer)


class MultipleChoice:
    """Choose the text that answers a question; each choice is encoded after the question."""

    auto_class = AutoModelForMultipleChoice
    head: Mapping[str, Any] = MappingProxyType({})
    needs_offsets = False

    def train_rows(self, examples: Sequence[Choice], tokenizer: Any, max_length: int) -> list[Row]:
        """Encode the question with each of its choices."""
        rows = []
        for example in examples:
            pairs = [
                _encode(tokenizer, max_length, example.question, choice)
                for choice in example.choices
            ]
            together = {name: [pair[name] for pair in pairs] for name in pairs[0]}
            rows.append({**together, "labels": example.label})
        return rows

    def valid_set(self, examples: Sequence[Choice], tokenizer: Any, max_length: int) -> ValidSet:
        """Rows scored by accuracy."""
        right = [example.label for example in examples]
        return ValidSet(
            self.train_rows(examples, tokenizer, max_length),
            lambda logits: {"acc": accuracy(logits.argmax(-1), right)},
        )

    def collator(self, tokenizer: Any) -> Any:
        """Return a collator that pads all choices of a batch."""
        return DataCollatorForMultipleChoice(tokenizer)


class AnswerExtraction:
    """Find the span of a context that answers a question; a row is a window of the context."""

    auto_class = AutoModelForQuestionAnswering
    head: Mapping[str, Any] = MappingProxyType({})
    needs_offsets = True

    def train_rows(
        self, examples: Sequence[Question], tokenizer: Any, max_length: int
    ) -> list[Row]:
        """Every window; the CLS token is the answer in windows that do not hold the right one."""
        usable = list(filter(is_locatable, examples))
        if left_out := len(examples) - len(usable):
            _LOGGER.warning(
                "%d of %d training questions are left out: their answer does not stand where its "
                "answer_start says",
                left_out,
                len(examples),
            )
        rows = []
        for example in usable:
            windows = cut_windows(example, tokenizer, max_length)
            for window, (start, end) in zip(windows, answer_tokens(example, windows), strict=True):
                rows.append({**window.inputs, "start_positions": start, "end_positions": end})
        return rows

    def valid_set(self, examples: Sequence[Question], tokenizer: Any, max_length: int) -> ValidSet:
        """Rows scored by exact match and F1 over characters, averaged over the questions."""
        cut = [cut_windows(example, tokenizer, max_length) for example in examples]

        def score(logits: Any) -> Scores:
            starts_and_ends = iter(zip(*logits, strict=True))
            exact, overlap = [], []
            for example, windows in zip(examples, cut, strict=True):
                own = list(islice(starts_and_ends, len(windows)))
                answer = best_answer(example, windows, own)
                golds = [gold.text for gold in example.answers]
                exact.append(exact_match(answer, golds))
                overlap.append(character_f1(answer, golds))
            return {"EM": fmean(exact), "F1": fmean(overlap)}

        return ValidSet([dict(window.inputs) for windows in cut for window in windows], score)

    def collator(self, tokenizer: Any) -> Any:
        """Return a collator that pads the windows of a batch."""
        return DataCollatorWithPadding(tokenizer)


RECIPES: Mapping[str, Recipe] = {
    "marc_ja": Classification(MARC_JA_LABELS),
    "jsts": Classification(),
    "jnli": Classification(JNLI_LABELS),
    "jsquad": AnswerExtraction(),
    "jcommonsenseqa": MultipleChoice(),
}
"""Recipes by name of the task."""


def _encode(tokenizer: Any, max_length: int, *texts: str) -> Row:
    # A special token's name within a text is encoded as text.
    encoded = tokenizer(*texts, truncation=True, max_length=max_length, split_special_tokens=True)
    return {name: encoded[name] for name in tokenizer.model_input_names if name in encoded}

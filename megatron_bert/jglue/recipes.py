"""How each kind of task becomes inputs of a model, and a model's outputs become scores."""

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
        rows: what a model is given.
        score: metrics of the model's logits for the rows, in their order.
    """

    rows: list[Row]
    score: Callable[[Any], Scores]


class Recipe(Protocol):
    """A kind of task.

    Attributes:
        auto_class: the Auto class of the head.
        head: keys of the configuration that the head depends on.
        needs_offsets: whether the tokenizer must tell which characters a token stands for.
    """

    auto_class: Any
    head: Mapping[str, Any]
    needs_offsets: bool

    def train_rows(self, examples: Sequence[Any], tokenizer: Any, max_length: int) -> list[Row]:
        """Return what the model is trained on; examples that cannot be used are left out."""

    def valid_set(self, examples: Sequence[Any], tokenizer: Any, max_length: int) -> ValidSet:
        """Return what the model is evaluated on."""

    def collator(self, tokenizer: Any) -> Any:
        """Return what makes a batch of rows, padded to its longest."""


class Classification:
    """One class of several for a text or a pair of texts; a similarity where there is no class."""

    auto_class = AutoModelForSequenceClassification
    needs_offsets = False

    def __init__(self, labels: Sequence[str] = ()) -> None:
        """`labels` name the classes."""
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
        """Scored by accuracy, or by the two correlations."""
        right = [example.label for example in examples]

        def score(logits: Any) -> Scores:
            if self._is_regression:
                pearson, spearman = correlations(logits.reshape(-1), right)
                return {"pearson": pearson, "spearman": spearman}
            return {"acc": accuracy(logits.argmax(-1), right)}

        return ValidSet(self.train_rows(examples, tokenizer, max_length), score)

    def collator(self, tokenizer: Any) -> Any:
        """Texts of a batch."""
        return DataCollatorWithPadding(tokenizer)


class MultipleChoice:
    """One of several texts that answers a question; each is encoded with the question before it."""

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
        """Scored by accuracy."""
        right = [example.label for example in examples]
        return ValidSet(
            self.train_rows(examples, tokenizer, max_length),
            lambda logits: {"acc": accuracy(logits.argmax(-1), right)},
        )

    def collator(self, tokenizer: Any) -> Any:
        """All choices of a batch."""
        return DataCollatorForMultipleChoice(tokenizer)


class AnswerExtraction:
    """A span of a context that answers a question; a row is a window of the context."""

    auto_class = AutoModelForQuestionAnswering
    head: Mapping[str, Any] = MappingProxyType({})
    needs_offsets = True

    def train_rows(
        self, examples: Sequence[Question], tokenizer: Any, max_length: int
    ) -> list[Row]:
        """Every window, with the CLS token as the answer where the right one is elsewhere."""
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
        """Scored by exact match and F1 over characters, means over the questions."""
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
        """Windows of a batch."""
        return DataCollatorWithPadding(tokenizer)


RECIPES: Mapping[str, Recipe] = {
    "marc_ja": Classification(MARC_JA_LABELS),
    "jsts": Classification(),
    "jnli": Classification(JNLI_LABELS),
    "jsquad": AnswerExtraction(),
    "jcommonsenseqa": MultipleChoice(),
}
"""By name of the task."""


def _encode(tokenizer: Any, max_length: int, *texts: str) -> Row:
    # What looks like a special token in a text is text.
    encoded = tokenizer(*texts, truncation=True, max_length=max_length, split_special_tokens=True)
    return {name: encoded[name] for name in tokenizer.model_input_names if name in encoded}

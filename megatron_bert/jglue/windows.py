"""JSQuAD's contexts as windows of tokens, and the answers in them.

A window is `[CLS] question [SEP] part of the context [SEP]`. Windows begin `DOC_STRIDE` tokens
apart. An answer is the text of the context from the first character of its first token to the last
character of its last one. If a tokenizer's pieces do not end where answers do, some right answers
cannot be given exactly (JGLUE leaves such models out of its table for that reason).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from megatron_bert.jglue.task_files import Answer, Question
from megatron_bert.jglue.tasks import DOC_STRIDE, MAX_ANSWER_TOKENS, MAX_QUESTION_TOKENS

Span: TypeAlias = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """A part of a context, with the question before it.

    Attributes:
        inputs: the model's inputs, each a list of one number per token.
        first: index of the context's first token in the window; the others follow without a gap.
        offsets: for each of the context's tokens in the window, the characters it stands for.
    """

    inputs: dict[str, list[int]]
    first: int
    offsets: list[Span]

    def locate(self, answer: Answer) -> Span | None:
        """Return the first and last token that share a character with an answer; None if none."""
        begin, end = answer.start, answer.start + len(answer.text)
        inside = [n for n, (a, b) in enumerate(self.offsets) if a < end and b > begin and a < b]
        return (self.first + inside[0], self.first + inside[-1]) if inside else None


def is_locatable(question: Question) -> bool:
    """Say whether the first answer is where its `answer_start` says."""
    answer = question.answers[0]
    return answer.start >= 0 and question.context.startswith(answer.text, answer.start)


def cut_windows(question: Question, tokenizer: Any, max_length: int) -> list[Window]:
    """Cut a context into windows of at most `max_length` tokens, in the order of the context.

    A long question is cut after `MAX_QUESTION_TOKENS` tokens. A special token's name within the
    texts (JSQuAD writes `[SEP]` after a title) is encoded as text.
    """
    asked, taken = _cut_question(question.question, tokenizer, max_length)
    room = max_length - taken - tokenizer.num_special_tokens_to_add(pair=True)
    encoded = tokenizer(
        asked,
        question.context,
        truncation="only_second",
        max_length=max_length,
        # The library's stride is the overlap of two windows.
        stride=max(0, room - DOC_STRIDE),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        split_special_tokens=True,
    )
    return [_window(encoded, number, tokenizer) for number in range(len(encoded["input_ids"]))]


def answer_tokens(question: Question, windows: Sequence[Window]) -> Iterator[Span]:
    """Yield the tokens of the first answer in each window; 0 and 0 if it is not in the window.

    Token 0 is the CLS token. An answer that a window's edge cuts is not in the window.
    """
    answer = question.answers[0]
    characters = [offset for window in windows for offset in window.offsets]
    # Characters before the first token or after the last belong to no token, and are not cut off.
    begin = max(answer.start, min((a for a, _ in characters), default=0))
    end = min(answer.start + len(answer.text), max((b for _, b in characters), default=0))
    for window in windows:
        reaches = window.offsets and window.offsets[0][0] <= begin and end <= window.offsets[-1][1]
        yield (window.locate(answer) if reaches else None) or (0, 0)


def best_answer(
    question: Question,
    windows: Sequence[Window],
    logits: Sequence[tuple[NDArray[np.floating[Any]], NDArray[np.floating[Any]]]],
) -> str:
    """Return the text of the most likely answer of at most `MAX_ANSWER_TOKENS` tokens.

    Args:
        question: what was asked.
        windows: of its context.
        logits: for each window, the logits of an answer's first and of its last token, each `[S]`
            with S at least the number of tokens in the window. The sum of the two decides, within
            windows and among them; the earlier answer wins if sums are equal.
    """
    best, text = -np.inf, ""
    for window, (starts, ends) in zip(windows, logits, strict=True):
        context = slice(window.first, window.first + len(window.offsets))
        score, (first, last) = _best_span(starts[context], ends[context])
        if score > best:
            best = score
            text = question.context[window.offsets[first][0] : window.offsets[last][1]]
    return text


def _best_span(
    starts: NDArray[np.floating[Any]], ends: NDArray[np.floating[Any]]
) -> tuple[float, Span]:
    best, span = -np.inf, (0, 0)
    for longer in range(min(MAX_ANSWER_TOKENS, len(starts))):
        sums = starts[: len(starts) - longer] + ends[longer:]
        first = int(np.argmax(sums))
        if sums[first] > best:
            best, span = float(sums[first]), (first, first + longer)
    return best, span


def _cut_question(text: str, tokenizer: Any, max_length: int) -> tuple[str, int]:
    """Return the part of a question that is used, and its number of tokens."""
    offsets = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True
    )["offset_mapping"]
    # Half of a short window is left for the context.
    limit = min(MAX_QUESTION_TOKENS, max_length // 2)
    if len(offsets) <= limit:
        return text, len(offsets)
    return text[: offsets[limit - 1][1]], limit


def _window(encoded: Any, number: int, tokenizer: Any) -> Window:
    places = [n for n, part in enumerate(encoded.sequence_ids(number)) if part == 1]
    offsets = encoded["offset_mapping"][number]
    return Window(
        inputs={
            name: encoded[name][number] for name in tokenizer.model_input_names if name in encoded
        },
        first=places[0] if places else 0,
        offsets=[tuple(offsets[place]) for place in places],
    )

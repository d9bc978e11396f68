"""JSQuAD's contexts as windows of tokens, and the answers in them.

A window is `[CLS] question [SEP] part of the context [SEP]`. Windows begin `DOC_STRIDE` tokens
after each other. An answer is what the context holds between the first character of its first token
and the last of its last one; with a tokenizer whose pieces are not cut where answers are, some
right answers cannot be given exactly (JGLUE leaves such models out of its table for that reason).
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
        inputs: what the model takes, each a list of one number a token.
        first: number of the first token of the context; the others follow without a gap.
        offsets: characters of the context that each of its tokens in the window stands for.
    """

    inputs: dict[str, list[int]]
    first: int
    offsets: list[Span]

    def locate(self, answer: Answer) -> Span | None:
        """Return the first and last token that share a character with an answer, if any does."""
        begin, end = answer.start, answer.start + len(answer.text)
        inside = [n for n, (a, b) in enumerate(self.offsets) if a < end and b > begin and a < b]
        return (self.first + inside[0], self.first + inside[-1]) if inside else None


def is_locatable(question: Question) -> bool:
    """Say whether the first answer stands where it is said to stand."""
    answer = question.answers[0]
    return answer.start >= 0 and question.context.startswith(answer.text, answer.start)


def cut_windows(question: Question, tokenizer: Any, max_length: int) -> list[Window]:
    """Cut a context into windows of at most `max_length` tokens, in the order of the context.

    A long question is cut after `MAX_QUESTION_TOKENS` tokens. What looks like a special token in
    the texts (JSQuAD writes `[SEP]` behind a title) is text.
    """
    asked, taken = _cut_question(question.question, tokenizer, max_length)
    room = max_length - taken - tokenizer.num_special_tokens_to_add(pair=True)
    encoded = tokenizer(
        asked,
        question.context,
        truncation="only_second",
        max_length=max_length,
        # The library's stride is what two windows share.
        stride=max(0, room - DOC_STRIDE),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        split_special_tokens=True,
    )
    return [_window(encoded, number, tokenizer) for number in range(len(encoded["input_ids"]))]


def answer_tokens(question: Question, windows: Sequence[Window]) -> Iterator[Span]:
    """Yield the tokens of the first answer in each window, 0 and 0 where it does not lie in it.

    Token 0 is the CLS token. An answer that a window's edge cuts does not lie in it.
    """
    answer = question.answers[0]
    characters = [offset for window in windows for offset in window.offsets]
    # Characters before the first token or behind the last belong to no token, and are not cut off.
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
        logits: of each window, of an answer's first and last token, each `[S]` with S at least the
            number of tokens in the window. The sum of the two decides, within windows and among
            them; the earlier answer goes first where sums are equal.
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
    """Return the part of a question that is used, and its tokens' number."""
    offsets = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True
    )["offset_mapping"]
    # Half of a short window is left to the context.
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

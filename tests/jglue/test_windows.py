"""JSQuAD's windows: what stands in them, and which answer comes out."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from megatron_bert.data.tokenizer_export import export_tokenizer
from megatron_bert.jglue.scoring import exact_match
from megatron_bert.jglue.task_files import Answer, Question, read_task_file
from megatron_bert.jglue.tasks import MAX_ANSWER_TOKENS
from megatron_bert.jglue.windows import (
    Window,
    answer_tokens,
    best_answer,
    cut_windows,
    is_locatable,
)
from tests.huggingface.tiny_models import CLS_ID, SEP_ID, tiny_tokenizer

CHARACTERS = "abcdefghijklmnopqrstuvwxyz[SEP] 猫。"


@functools.cache
def _characters() -> PreTrainedTokenizerFast:
    return tiny_tokenizer(CHARACTERS)


def _question(context: str, answer: str, question: str = "abc") -> Question:
    return Question(question, context, (Answer(answer, context.index(answer)),))


def _text(question: Question, window: Window, span: tuple[int, int]) -> str:
    first, last = (token - window.first for token in span)
    return question.context[window.offsets[first][0] : window.offsets[last][1]]


def test_a_window_is_the_question_and_a_part_of_the_context() -> None:
    question = _question("defg", "ef")
    (window,) = cut_windows(question, _characters(), 384)
    ids = window.inputs["input_ids"]
    assert (ids[0], ids[4], ids[-1]) == (CLS_ID, SEP_ID, SEP_ID)
    assert len(ids) == 3 + 3 + 4
    assert window.first == 5
    assert window.offsets == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert list(answer_tokens(question, [window])) == [(6, 7)]


def test_windows_begin_128_tokens_after_each_other() -> None:
    question = _question("ab" * 300, "ab")
    windows = cut_windows(question, _characters(), 384)
    begins = [window.offsets[0][0] for window in windows]
    assert begins == [0, 128, 256]
    assert [len(window.inputs["input_ids"]) for window in windows] == [384, 384, 600 - 256 + 6]
    assert [window.offsets[-1][1] for window in windows] == [378, 506, 600]


def test_an_answer_is_where_it_is_whole_and_token_0_elsewhere() -> None:
    context = "a" * 130 + "bcd" + "a" * 467
    question = _question(context, "bcd")
    windows = cut_windows(question, _characters(), 384)
    spans = list(answer_tokens(question, windows))
    assert [span == (0, 0) for span in spans] == [False, False, True]
    for window, span in list(zip(windows, spans, strict=True))[:2]:
        assert _text(question, window, span) == "bcd"
    cut = Question("abc", context, (Answer("a" * 10, 374),))
    # The first window ends after 378 characters, within the answer.
    assert [span == (0, 0) for span in answer_tokens(cut, windows)] == [True, False, False]


def test_a_long_question_loses_its_end() -> None:
    question = _question("def", "e", question="a" * 100)
    (window,) = cut_windows(question, _characters(), 384)
    assert window.first == 1 + 64 + 1
    # Half of a short window is the context's.
    short = cut_windows(question, _characters(), 40)[0]
    assert short.first == 1 + 20 + 1


def _word_pieces_with_brackets() -> PreTrainedTokenizerFast:
    """As BERT's tokenizers: `[SEP]` is their separator."""
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    vocabulary = {token: n for n, token in enumerate((*special, *"[]SEPabc "))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), special, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{f"{role}_token": token for role, token in names.items()},
    )


@pytest.mark.parametrize("text", ["a [SEP] b", "[SEP]", "[CLS]a[SEP]", "a [SEP] [MASK] b [PAD]"])
def test_what_looks_like_a_special_token_is_text(text: str) -> None:
    tokenizer = _word_pieces_with_brackets()
    question = Question(f"b {text}", text, (Answer(text, 0),))
    (window,) = cut_windows(question, tokenizer, 384)
    ids = window.inputs["input_ids"]
    assert [n for n, token in enumerate(ids) if token == 3] == [window.first - 1, len(ids) - 1]
    assert not {0, 2, 4} & set(ids[1:])
    assert window.inputs["token_type_ids"][window.first :] == [1] * (len(text) + 1)
    assert _text(question, window, next(answer_tokens(question, [window]))) == text


def test_answers_that_are_not_where_they_are_said_to_be_are_told() -> None:
    assert is_locatable(Question("a", "bcd", (Answer("cd", 1),)))
    for start in (0, 2, 3, -2, 99):
        assert not is_locatable(Question("a", "bcd", (Answer("cd", start),)))


def _logits(window: Window, token: int, value: float) -> Any:
    logits = np.zeros(len(window.inputs["input_ids"]), dtype=np.float32)
    logits[token] = value
    return logits


def test_the_best_answer_of_all_windows_is_taken() -> None:
    question = _question("ab" * 120 + "xyz" + "cd" * 130, "xyz")
    windows = cut_windows(question, _characters(), 384)
    spans = list(answer_tokens(question, windows))
    assert len(windows) == 2
    for chosen in (0, 1):
        logits = [
            (_logits(w, start, 2.0 + (n == chosen)), _logits(w, end - n % 2, 1.0))
            for n, (w, (start, end)) in enumerate(zip(windows, spans, strict=True))
        ]
        assert best_answer(question, windows, logits) == ("xyz", "xy")[chosen]


def test_an_answer_has_at_most_30_tokens_none_of_them_outside_the_context() -> None:
    question = _question("a" * 20 + "bc" * 40, "b")
    (window,) = cut_windows(question, _characters(), 384)
    starts, ends = _logits(window, window.first, 5.0), _logits(window, window.first + 29, 5.0)
    assert len(best_answer(question, [window], [(starts, ends)])) == MAX_ANSWER_TOKENS
    ends = _logits(window, window.first + 30, 5.0)
    assert len(best_answer(question, [window], [(starts, ends)])) < MAX_ANSWER_TOKENS
    # The question, the CLS token and an end before the start are no answers, however likely.
    starts, ends = _logits(window, 0, 9.0), _logits(window, 2, 9.0)
    starts[window.first + 5], ends[window.first + 4], ends[window.first + 6] = 4.0, 8.0, 1.0
    assert best_answer(question, [window], [(starts, ends)]) in ("a", "aa")


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 200), st.integers(1, 45), st.integers(0, 2**32 - 1))
def test_the_best_span_is_that_of_trying_all(length: int, extra: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    question = _question("".join(draw.choice(list("abcde"), length + extra)), "", "a")
    windows = cut_windows(question, _characters(), 384)
    logits = [tuple(draw.normal(size=(2, len(w.inputs["input_ids"])))) for w in windows]
    tried = [
        (starts[w.first + i] + ends[w.first + j], _text(question, w, (w.first + i, w.first + j)))
        for w, (starts, ends) in zip(windows, logits, strict=True)
        for i in range(len(w.offsets))
        for j in range(i, min(i + MAX_ANSWER_TOKENS, len(w.offsets)))
    ]
    assert best_answer(question, windows, logits) == max(tried)[1]


def _reached(questions: list[Question], tokenizer: Any) -> dict[str, int]:
    """How many first answers lie whole in a window, and what their tokens stand for."""
    counts = {"covered": 0, "exact": 0, "right": 0, "more than one window": 0}
    for question in questions:
        windows = cut_windows(question, tokenizer, 384)
        spans = list(answer_tokens(question, windows))
        texts = {
            _text(question, window, span)
            for window, span in zip(windows, spans, strict=True)
            if span != (0, 0)
        }
        assert len(texts) == 1, question
        (text,) = texts
        assert question.answers[0].text in text
        counts["covered"] += 1
        counts["exact"] += text == question.answers[0].text
        counts["more than one window"] += len(windows) > 1
        # The model can say so: it is short enough.
        certain = [
            (_logits(window, start, 9.0 if start else 0.0), _logits(window, end, 9.0))
            for window, (start, end) in zip(windows, spans, strict=True)
        ]
        golds = [gold.text for gold in question.answers]
        counts["right"] += exact_match(best_answer(question, windows, certain), golds) == 1
    return counts


def test_every_published_answer_comes_back_from_its_tokens(jglue: Path) -> None:
    questions = list(read_task_file("jsquad", jglue / "jsquad", "valid").examples)
    assert all(map(is_locatable, questions))
    characters = sorted({c for q in questions for c in q.context + q.question})
    counts = _reached(questions, tiny_tokenizer("".join(characters)))
    assert counts == {
        "covered": 4442,
        "exact": 4442,
        "right": 4442,
        "more than one window": 209,
    }


@pytest.mark.slow
def test_pieces_that_are_cut_elsewhere_leave_some_answers_out_of_reach(
    jglue: Path, shared_data: Path, tmp_path: Path
) -> None:
    model = shared_data / "tokenizer" / "llm-jp-tokenizer-100k.ver3.0b1.model"
    for name, text in export_tokenizer(model, 2048).files.items():
        (tmp_path / name).write_text(text)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    questions = list(read_task_file("jsquad", jglue / "jsquad", "valid").examples)
    counts = _reached(questions, tokenizer)
    assert counts["covered"] == 4442
    assert counts["exact"] == 3838
    assert counts["right"] == 4261

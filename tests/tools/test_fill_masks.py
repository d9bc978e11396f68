from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_bert.command_line.run import run_cli
from megatron_bert.data.tokenizer_export import export_tokenizer

transformers = pytest.importorskip("transformers")

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "fill_masks.py"
ENGLISH = "The quick brown fox jumps over a lazy dog."


@pytest.fixture(scope="module")
def example() -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("fill_masks", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclass looks its module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("exported")
    for name, text in export_tokenizer(tiny_tokenizer_path, 64).files.items():
        (folder / name).write_text(text, "utf-8")
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def test_a_question_hides_the_longest_word_that_is_one_token(example: Any, tokenizer: Any) -> None:
    (question,) = example.questions([ENGLISH], tokenizer, 1)
    answer = tokenizer.decode([question.answer]).strip()
    assert question.text.count(tokenizer.mask_token) == 1
    assert question.text.replace(tokenizer.mask_token, answer) == ENGLISH
    pieces = [p.strip("▁") for p in tokenizer.tokenize(ENGLISH)]
    assert len(answer) == max(len(piece) for piece in pieces if piece.isalpha())


def test_the_hidden_word_in_the_masks_place_gives_the_sentence_back(
    example: Any, tokenizer: Any, tiny_texts: list[str]
) -> None:
    asked = list(example.questions(tiny_texts, tokenizer, 100))
    assert len(asked) > 50
    lines = {line for text in tiny_texts for line in text.split("\n")}
    for question in asked:
        ids = tokenizer(question.text)["input_ids"]
        assert ids.count(tokenizer.mask_token_id) == 1
        ids[ids.index(tokenizer.mask_token_id)] = question.answer
        assert any(tokenizer.decode(ids[1:-1]).strip() in line for line in lines)


def test_questions_are_spread_over_the_corpus_and_at_most_as_many_as_asked_for(
    example: Any, tokenizer: Any
) -> None:
    texts = [f"{number} The quick brown fox jumps over the dog" for number in range(10)]
    numbers = [question.text.split()[0] for question in example.questions(texts, tokenizer, 5)]
    assert numbers == ["0", "2", "4", "6", "8"]
    assert len(list(example.questions(texts, tokenizer, 100))) == 10


def test_another_sentence_is_taken_from_each_text(example: Any, tokenizer: Any) -> None:
    text = "猫は薄暗いじめじめした所で泣いていた。人間の話はとんと見当がつかぬ東京の学校。"
    first, second = example.questions([text, text], tokenizer, 2)
    sentences = [
        question.text.replace(tokenizer.mask_token, tokenizer.decode([question.answer]).strip())
        for question in (first, second)
    ]
    assert sentences == [
        "猫は薄暗いじめじめした所で泣いていた。",
        "人間の話はとんと見当がつかぬ東京の学校。",
    ]


@pytest.mark.parametrize("text", ["", "短い。", "Too short.", "1868 1868 1868 1868 1868"])
def test_a_text_without_a_sentence_or_a_word_to_hide_is_passed_over(
    example: Any, tokenizer: Any, text: str
) -> None:
    assert list(example.questions([text], tokenizer, 1)) == []


def test_no_text_gives_no_question(example: Any, tokenizer: Any) -> None:
    assert list(example.questions([], tokenizer, 3)) == []


def test_a_folder_without_a_model_is_refused_with_exit_code_2(
    example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(tmp_path), "--input", "none.txt"]
    with pytest.raises(SystemExit) as left:
        run_cli(lambda: example.main(arguments))
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --model {tmp_path}: holds no config.json")
    assert "tools/convert_checkpoint.py" in error


def test_the_right_guess_stands_in_brackets_and_one_of_blanks_alone_is_visible(
    example: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill(_text: str, top_k: int) -> list[dict[str, Any]]:
        words = [" London", " ", "Paris"][:top_k]
        return [{"token": n, "token_str": word, "score": 0.5} for n, word in enumerate(words)]

    fill.tokenizer = SimpleNamespace(decode=lambda ids: [" London", " ", "Paris"][ids[0]])
    assert example._answer(fill, example.Question("I live in<MASK>.", 0))
    assert "London <- [London] 0.50  ▁ 0.50  Paris 0.50\n" in capsys.readouterr().out

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import pytest

from megatron_bert.data import dictionary_words
from megatron_bert.data.dictionary_words import Dictionary, WordFinder, token_starts
from megatron_bert.errors import DataError

DICTIONARIES: tuple[Dictionary, ...] = get_args(Dictionary)


def starts(text: str, words: Sequence[str], tokens: Sequence[str]) -> list[bool]:
    """Which of the tokens, that make up the text, begin one of the words."""
    begins, end = [], 0
    for word in words:
        begin = text.index(word, end)
        begins.append(begin)
        end = begin + len(word)
    ends = np.cumsum([len(token) for token in tokens])
    offsets = np.stack([np.append(0, ends[:-1]), ends], axis=1)
    return token_starts(text, np.array(begins), offsets).tolist()


def test_a_token_at_a_words_beginning_starts_it() -> None:
    assert starts("東京都に行く", ["東京都", "に", "行く"], ["東", "京都", "に", "行", "く"]) == [
        True,
        False,
        True,
        True,
        False,
    ]


def test_spaces_before_a_word_belong_to_the_token_but_do_not_hide_the_word() -> None:
    assert starts("a new  day", ["a", "new", "day"], ["a", " ne", "w", "  day"]) == [
        True,
        True,
        False,
        True,
    ]


def test_spaces_alone_are_a_unit_of_their_own() -> None:
    assert starts("行\nく\n", ["行", "く"], ["行", "\n", "く", "\n"]) == [True] * 4


def test_a_token_that_reaches_over_a_beginning_ties_two_words() -> None:
    assert starts("猫である", ["猫", "で", "ある"], ["猫", "であ", "る"]) == [True, True, False]
    assert starts("犬猫だ", ["犬", "猫", "だ"], ["犬猫", "だ"]) == [True, True]


def test_of_several_tokens_of_one_character_only_the_first_starts_a_word() -> None:
    offsets = np.array([(0, 0), (0, 0), (0, 1), (1, 2)])
    assert token_starts("𠮷野", np.array([0, 1]), offsets).tolist() == [True, False, False, True]


def test_a_text_without_tokens_has_no_starts() -> None:
    assert token_starts("", np.array([], dtype=int), np.empty((0, 2), dtype=int)).tolist() == []


def test_long_lines_are_cut_behind_a_mark_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dictionary_words, "_SUDACHI_CHARACTERS", 6)
    text = "東京に、行く。\nはい\nあいうえおかきくけこ"
    pieces = list(dictionary_words._pieces(text))
    assert pieces == ["東京に、", "行く。\n", "はい\n", "あいうえおか", "きくけこ"]
    assert "".join(pieces) == text


@pytest.mark.parametrize("dictionary", DICTIONARIES)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    dictionary: Dictionary, monkeypatch: pytest.MonkeyPatch
) -> None:
    def import_module(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr("importlib.import_module", import_module)
    with pytest.raises(DataError, match=r"pip install (fugashi|sudachipy) "):
        WordFinder(dictionary)


@pytest.mark.peers
@pytest.mark.parametrize("dictionary", DICTIONARIES)
def test_a_real_dictionary_finds_japanese_and_english_words(dictionary: Dictionary) -> None:
    pytest.importorskip("fugashi" if dictionary == "mecab" else "sudachipy")
    finder = WordFinder(dictionary)
    text = " 東京に行く。\n\0Hello  world\n" + "あいうえお。" * 10_000
    begins = set(finder.word_begins(text).tolist())
    assert {1, 3, 4, 6, 9, 16} <= begins
    assert begins.isdisjoint({2, 10, 11, 17})
    assert max(begins) == len(text) - 1
    assert finder.name.count(" ") >= 2

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models

from megatron_bert.data.tokenizer import SPECIAL_PIECES, Tokenizer
from megatron_bert.data.word_boundaries import (
    CharacterClass,
    character_class,
    word_mark,
    word_tables,
)
from megatron_bert.errors import DataError


def words(tokenizer: Tokenizer, text: str) -> list[str]:
    """Pieces joined into the words that the tables tell of."""
    tables = word_tables(tokenizer)
    joined: list[str] = []
    previous = None
    for token in tokenizer.encode_batch([text])[0]:
        begins = (
            previous is None
            or tables.starts_word[token]
            or tables.first_class[token] != tables.last_class[previous]
        )
        piece = tokenizer.id_to_piece(token)
        joined = [*joined, piece] if begins else [*joined[:-1], joined[-1] + piece]
        previous = token
    return joined


@pytest.mark.parametrize(
    ("characters", "expected"),
    [
        ("aZéßЯω9７①", CharacterClass.ALPHANUMERIC),
        ("ぁあん゛ゝ", CharacterClass.HIRAGANA),
        ("アンーヶｱﾝ", CharacterClass.KATAKANA),
        ("猫々〆〇龍\U00020000", CharacterClass.HAN),
        ("한국ㄱ", CharacterClass.HANGUL),
        ("。、「」・!<$+…", CharacterClass.PUNCTUATION),
        (" \n\x00　", CharacterClass.OTHER),
    ],
)
def test_a_character_has_the_class_of_its_script(characters: str, expected: CharacterClass) -> None:
    assert {character: character_class(character) for character in characters} == dict.fromkeys(
        characters, expected
    )


def test_special_and_byte_pieces_are_of_no_class(tiny_tokenizer: Tokenizer) -> None:
    tables = word_tables(tiny_tokenizer)
    plain = [*tiny_tokenizer.special_ids, *tiny_tokenizer.encode_batch(["\n"])[0]]
    for table in (tables.first_class, tables.last_class, tables.starts_word):
        assert table.shape == (tiny_tokenizer.vocab_size,)
        assert table.dtype == np.uint8
        assert not table[plain].any()


def test_all_sources_of_a_run_share_their_tokenizers_tables(tiny_tokenizer: Tokenizer) -> None:
    tables = word_tables(tiny_tokenizer)
    assert word_tables(tiny_tokenizer) is tables
    with pytest.raises(ValueError, match="read-only"):
        tables.starts_word[0] = 1


def test_words_of_real_pieces_end_at_spaces_and_changes_of_script(shared_data: Path) -> None:
    path = shared_data / "tokenizer" / "llm-jp-tokenizer-100k.ver3.0b1.model"
    tokenizer = Tokenizer.load(path)
    assert words(tokenizer, "東京タワーに登った") == ["▁東京", "タワー", "に", "登", "った"]
    assert words(tokenizer, "カレーライスを食べました") == ["▁カレーライス", "を", "食べました"]
    assert words(tokenizer, "tokenization of GPT4") == ["▁tokenization", "▁of", "▁GPT4"]
    # A piece of kanji and kana is never cut; two pieces join only within one script.
    assert words(tokenizer, "2024年、猫である") == ["▁2024", "年", "、", "猫", "である"]
    # The bytes of an unknown character stick together.
    assert words(tokenizer, "猫\U0001f9ab") == ["▁猫", "<0xF0><0x9F><0xA6><0xAB>"]


def with_pieces(folder: Path, *pieces: str) -> Tokenizer:
    vocabulary = {piece: i for i, piece in enumerate([*SPECIAL_PIECES, *pieces])}
    tokenizers.Tokenizer(models.BPE(vocabulary, [])).save(str(folder / "tokenizer.json"))
    return Tokenizer.load(folder / "tokenizer.json")


@pytest.mark.parametrize(
    "pieces",
    [
        ("Ġthe", "the"),
        # A vocabulary of web text holds the character itself.
        ("play", "##ing", "##ed", "▁", "##▁"),
        ("Ġthe", "Ġa", "▁"),
    ],
)
def test_pieces_that_mark_words_in_another_way_are_refused(
    tmp_path: Path, pieces: tuple[str, ...]
) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json does not mark .* mlm\.unit=token"):
        word_tables(with_pieces(tmp_path, *pieces))


@pytest.mark.parametrize(
    ("pieces", "mark"),
    [
        (("▁the", "▁a", "Ġ", "ing"), "space"),
        (("▁the", "##", "####"), "space"),
        (("吾輩", "##", "猫"), "none"),
    ],
)
def test_stray_pieces_with_another_mark_do_not_count(
    tmp_path: Path, pieces: tuple[str, ...], mark: str
) -> None:
    tokenizer = with_pieces(tmp_path, *pieces)
    assert word_mark(tokenizer) == mark
    starts = word_tables(tokenizer).starts_word[len(SPECIAL_PIECES) :]
    assert starts.tolist() == [piece.startswith("▁") for piece in pieces]

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers

from megatron_bert.data.tokenizer import SPECIAL_PIECES, Tokenizer
from megatron_bert.errors import DataError

LITERALS = [
    *SPECIAL_PIECES,
    "a<MASK>b",
    "<s>全部</s>",
    "こんにちは<CLS>世界<SEP>",
    "<MASK><MASK> <MASK>",
    "<<MASK>>",
    "<MASK|LLM-jp>",
    "<0x0A>",
]


def assert_no_special_token(tokenizer: Tokenizer, texts: list[str]) -> None:
    special = set(tokenizer.special_ids)
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert not special.intersection(ids), (text, [tokenizer.id_to_piece(i) for i in ids])


def train(texts: list[str], path: Path, **options: Any) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=512,
        byte_fallback=True,
        minloglevel=2,
        **options,
    )
    path.write_bytes(model.getvalue())
    return path


def test_special_tokens_are_found_by_piece_whatever_their_number(
    tiny_texts: list[str], tmp_path: Path
) -> None:
    pieces = ["<EOD>", "<SEP>", "<CLS>", "<PAD>", "<MASK>"]
    tokenizer = Tokenizer.load(train(tiny_texts, tmp_path / "t.model", control_symbols=pieces))
    assert tokenizer.mask_id == 7
    assert tokenizer.eod_id == 3
    assert tokenizer.special_ids == list(range(8))
    assert tokenizer.vocab_size == 512


def test_a_tokenizer_trained_here_has_the_ids_of_llm_jp(tiny_tokenizer: Tokenizer) -> None:
    assert [tiny_tokenizer.id_to_piece(i) for i in range(8)] == list(SPECIAL_PIECES)
    assert tiny_tokenizer.special_ids == list(range(8))
    ids = (tiny_tokenizer.mask_id, tiny_tokenizer.pad_id, tiny_tokenizer.cls_id)
    assert (*ids, tiny_tokenizer.sep_id, tiny_tokenizer.eod_id) == (3, 4, 5, 6, 7)


def test_a_missing_special_piece_is_named_with_the_way_to_get_it(
    tiny_texts: list[str], tmp_path: Path
) -> None:
    path = train(tiny_texts, tmp_path / "t.model", control_symbols=["<CLS>", "<SEP>", "<EOD>"])
    with pytest.raises(DataError, match=r"<MASK>, <PAD>.*train_tokenizer"):
        Tokenizer.load(path)


def test_literal_special_pieces_in_text_stay_text(tiny_tokenizer: Tokenizer) -> None:
    assert_no_special_token(tiny_tokenizer, LITERALS)
    for text in LITERALS:
        assert tiny_tokenizer.decode(tiny_tokenizer.encode_batch([text])[0]) == text


def test_user_defined_special_pieces_are_not_matched_in_text(
    tiny_texts: list[str], tmp_path: Path
) -> None:
    pieces = ["<MASK>", "<CLS>", "<SEP>", "<PAD>", "<EOD>"]
    path = train(
        tiny_texts,
        tmp_path / "t.model",
        user_defined_symbols=pieces,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
    )
    plain = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert plain.piece_to_id("<MASK>") in plain.encode("a<MASK>b")
    tokenizer = Tokenizer.load(path)
    assert_no_special_token(tokenizer, LITERALS)
    for text in LITERALS:
        assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text
    ordinary = "吾輩は猫である The quick fox"
    assert tokenizer.encode_batch([ordinary])[0] == plain.encode(ordinary)


def test_other_user_defined_pieces_remain_text(tiny_texts: list[str], tmp_path: Path) -> None:
    path = train(
        tiny_texts,
        tmp_path / "t.model",
        control_symbols=list(SPECIAL_PIECES[3:]),
        user_defined_symbols=["\t"],
    )
    tokenizer = Tokenizer.load(path)
    tab = next(i for i in range(512) if tokenizer.id_to_piece(i) == "\t")
    assert tab in tokenizer.encode_batch(["a\tb"])[0]
    assert tab not in tokenizer.special_ids


@settings(max_examples=60, derandomize=True, deadline=None)
@given(text=st.lists(st.sampled_from(["<MASK>", "</s>", " ", "\n", "猫", "a", "<"]) | st.text()))
def test_decoding_gives_the_text_back(tiny_tokenizer: Tokenizer, text: list[str]) -> None:
    joined = "".join(text).replace("▁", "_")
    ids = tiny_tokenizer.encode_batch([joined])[0]
    assert tiny_tokenizer.decode(ids) == joined
    assert not set(ids).intersection(tiny_tokenizer.special_ids)


def test_byte_pieces_are_told_from_others(tiny_tokenizer: Tokenizer) -> None:
    (ids,) = tiny_tokenizer.encode_batch(["\n"])
    assert [tiny_tokenizer.id_to_piece(i) for i in ids] == ["<0x0A>"]
    assert tiny_tokenizer.is_byte(ids[0])
    assert not tiny_tokenizer.is_byte(tiny_tokenizer.mask_id)


def test_special_tokens_are_left_out_of_decoded_text(tiny_tokenizer: Tokenizer) -> None:
    (ids,) = tiny_tokenizer.encode_batch(["吾輩は猫である"])
    assert tiny_tokenizer.decode([5, *ids, 3, 6, 4]) == "吾輩は猫である"


def test_the_hash_is_that_of_the_file(tiny_tokenizer: Tokenizer, tiny_tokenizer_path: Path) -> None:
    assert tiny_tokenizer.hash == hashlib.sha256(tiny_tokenizer_path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.model", None, "cannot read tokenizer .*train_tokenizer"),
        ("t" * 300 + ".model", None, "cannot read tokenizer .*too long"),
        ("t.vocab", b"", "ends in '.vocab'"),
        ("t.model", b"", "empty"),
        ("t.model", b"no model at all", "not a SentencePiece model"),
        ("t.json", b"{}", "not a tokenizer.json"),
        ("t.json", b"\xff", "not a tokenizer.json"),
        ("t.json", b"[]", "not a tokenizer.json"),
    ],
)
def test_an_unusable_file_is_refused_with_a_remedy(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        Tokenizer.load(tmp_path / name)


def test_a_folder_is_refused_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder; name the file in it"):
        Tokenizer.load(tmp_path)


def write_tokenizer_json(path: Path, *, special: bool, suffix: str) -> Path:
    """A converted SentencePiece vocabulary: the special pieces stand in the model as well."""
    pieces = [piece[:-1] + suffix + ">" for piece in SPECIAL_PIECES]
    characters = sorted(set("".join(pieces)) | set("▁abc猫世界"))
    vocabulary = [(piece, 0.0) for piece in pieces] + [(c, -4.0) for c in characters]
    vocabulary += [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    tokenizer = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    added = [tokenizers.AddedToken(piece, special=special, normalized=False) for piece in pieces]
    tokenizer.add_tokens(added)
    tokenizer.enable_padding(length=50)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("suffix", ["", "|LLM-jp"])
def test_a_tokenizer_json_never_turns_text_into_special_tokens(
    tmp_path: Path, special: bool, suffix: str
) -> None:
    path = write_tokenizer_json(tmp_path / "tokenizer.json", special=special, suffix=suffix)
    tokenizer = Tokenizer.load(path)
    assert tokenizer.mask_id == 3
    assert tokenizer.special_ids == list(range(8))
    plain = tokenizers.Tokenizer.from_file(str(path))
    assert 3 in plain.encode(f"a<MASK{suffix}>b", add_special_tokens=False).ids
    texts = [
        text
        for literal in SPECIAL_PIECES
        for piece in [literal[:-1] + suffix + ">"]
        for text in (piece, f"a{piece}b", piece + piece, f"猫 {piece}")
    ]
    # Full-width brackets become the piece only by normalization.
    assert_no_special_token(tokenizer, [*texts, f"＜MASK{suffix}＞"])


def test_a_tokenizer_json_is_encoded_whole_in_spite_of_its_truncation_and_padding(
    tmp_path: Path,
) -> None:
    path = write_tokenizer_json(tmp_path / "tokenizer.json", special=True, suffix="")
    tokenizer = Tokenizer.load(path)
    assert [len(ids) for ids in tokenizer.encode_batch(["abcabcabc", ""])] == [10, 0]


def test_a_missing_piece_of_a_tokenizer_json_is_named(tmp_path: Path) -> None:
    path = write_tokenizer_json(tmp_path / "tokenizer.json", special=True, suffix="")
    description = json.loads(path.read_text())
    text = json.dumps(description, ensure_ascii=False).replace("<CLS>", "<CLASS>")
    path.write_text(text)
    with pytest.raises(DataError, match="no special piece <CLS>"):
        Tokenizer.load(path)


def test_the_llm_jp_tokenizer_is_read_as_it_is(shared_data: Path) -> None:
    path = shared_data / "tokenizer" / "llm-jp-tokenizer-100k.ver3.0b1.model"
    tokenizer = Tokenizer.load(path)
    assert tokenizer.vocab_size == 99_574
    assert tokenizer.special_ids == list(range(8))
    assert_no_special_token(tokenizer, LITERALS)
    for text in LITERALS:
        assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text


def test_offsets_are_those_of_the_tokens_in_the_text(tiny_tokenizer: Tokenizer) -> None:
    texts = ["吾輩は猫である。 the  fox\n", "", "𠮷🦊 a"]
    encoded = tiny_tokenizer.encode_with_offsets(texts)
    lists = tiny_tokenizer.encode_batch(texts)
    for text, (tokens, offsets), expected in zip(texts, encoded, lists, strict=True):
        assert tokens.tolist() == expected
        assert offsets.shape == (len(tokens), 2)
        for token, (begin, end) in zip(tokens.tolist(), offsets.tolist(), strict=True):
            if not tiny_tokenizer.is_byte(token):
                piece = tiny_tokenizer.id_to_piece(token)
                assert text[begin:end] == piece.replace("▁", " ")
        assert not len(tokens) or offsets[-1, 1] == len(text)


def test_the_first_id_that_no_text_gives_is_found(tiny_tokenizer: Tokenizer) -> None:
    ids = np.array([20, 8, 511, 300], dtype=np.int32)
    assert tiny_tokenizer.find_foreign_id(ids) is None
    assert tiny_tokenizer.find_foreign_id(ids[:0]) is None
    for foreign in (*tiny_tokenizer.never_in_text, 512, 2**31 - 1, -1):
        assert tiny_tokenizer.find_foreign_id(np.append(ids, np.int32([foreign, 20]))) == 4

"""Special pieces in BERT's spelling, `[MASK]`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models

from megatron_bert.data.tokenizer import SPECIAL_PIECES, Tokenizer
from megatron_bert.data.tokenizer_export import export_tokenizer
from megatron_bert.errors import DataError
from tests.tokenizer.bert_style import KINDS, PIECES, write_bert_tokenizer

LITERALS = ["a [MASK] b", "[MASK][MASK]", "x[CLS]y[SEP]", "[PAD]", "猫[MASK]学校", "[EOD]"]


@pytest.mark.parametrize("kind", KINDS)
def test_berts_special_pieces_are_found_and_text_never_becomes_one(
    tmp_path: Path, tiny_texts: list[str], kind: str
) -> None:
    path = write_bert_tokenizer(tmp_path / "tokenizer.json", tiny_texts, kind)
    tokenizer = Tokenizer.load(path)
    ids = (tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id)
    assert ids == (0, 2, 3, 4)
    assert tokenizer.special_ids == list(range(len(PIECES)))
    assert tokenizer.eod_id is None
    plain = tokenizers.Tokenizer.from_file(str(path))
    assert 4 in plain.encode(LITERALS[0], add_special_tokens=False).ids
    for found in tokenizer.encode_batch(LITERALS):
        assert not set(found) & set(tokenizer.never_in_text)
    # Ordinary text has the ids that it always had.
    for text, found in zip(tiny_texts, tokenizer.encode_batch(tiny_texts), strict=True):
        assert found == plain.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("end", ["[EOD]", "<|endoftext|>"])
def test_the_end_of_a_document_is_optional_and_has_either_name(
    tmp_path: Path, tiny_texts: list[str], end: str
) -> None:
    path = write_bert_tokenizer(tmp_path / "tokenizer.json", tiny_texts, "byte_level", end)
    tokenizer = Tokenizer.load(path)
    assert tokenizer.eod_id == len(PIECES)
    assert not {tokenizer.eod_id} & {
        i for ids in tokenizer.encode_batch([end, f"a{end}"]) for i in ids
    }
    config = json.loads(export_tokenizer(path, 64).files["tokenizer_config.json"])
    assert config["additional_special_tokens"] == [end]


def test_berts_spelling_is_ordinary_text_to_a_vocabulary_with_another(tmp_path: Path) -> None:
    pieces = [*SPECIAL_PIECES, *"[]MASK", "[MA", "SK]", "[MASK]"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [("[", "M"), ("[M", "A"), ("S", "K"), ("SK", "]"), ("[MA", "SK]")]
    vocabulary |= {"[M": len(vocabulary), "SK": len(vocabulary) + 1}
    tokenizers.Tokenizer(models.BPE(vocabulary, merges)).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    assert tokenizer.mask_id == 3
    assert tokenizer.encode_batch(["[MASK]"]) == [[vocabulary["[MASK]"]]]


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_has_the_tokenizers_own_spelling(
    tmp_path: Path, tiny_texts: list[str], kind: str
) -> None:
    path = write_bert_tokenizer(tmp_path / "tokenizer.json", tiny_texts, kind)
    export = export_tokenizer(path, 64)
    config = json.loads(export.files["tokenizer_config.json"])
    roles = ("pad", "unk", "cls", "sep", "mask")
    assert {f"{role}_token": config[f"{role}_token"] for role in roles} == {
        f"{role}_token": piece for role, piece in zip(roles, PIECES, strict=True)
    }
    assert not config.keys() & {"bos_token", "eos_token", "additional_special_tokens"}
    assert export.mask_token == "[MASK]"
    assert (export.token_ids["bos_token_id"], export.token_ids["mask_token_id"]) == (None, 4)
    rebuilt = tokenizers.Tokenizer.from_str(export.files["tokenizer.json"])
    known = Tokenizer.load(path)
    for text in tiny_texts[:50]:
        assert rebuilt.encode(text).ids == [2, *known.encode_batch([text])[0], 3]
    before, after = known.encode_batch(["the tower", " of London"])
    assert rebuilt.encode("the tower [MASK] of London").ids == [2, *before, 4, *after, 3]


def test_a_missing_piece_is_told_with_the_path_and_a_remedy_that_works(
    tmp_path: Path, tiny_texts: list[str]
) -> None:
    path = write_bert_tokenizer(tmp_path / "tokenizer.json", tiny_texts, "wordpiece")
    before = Tokenizer.load(path).encode_batch(tiny_texts)
    renamed = path.read_text("utf-8").replace("[MASK]", "<mask>").replace("[PAD]", "<pad>")
    path.write_text(renamed, "utf-8")
    with pytest.raises(DataError) as error:
        Tokenizer.load(path)
    told = str(error.value)
    assert f"tokenizer {path} has no special piece <MASK>, <CLS>" in told
    assert "nor BERT's [MASK], [CLS]" in told
    assert "rename them in this file wherever they occur" in told
    path.write_text(renamed.replace("<mask>", "[MASK]"), "utf-8")
    with pytest.raises(DataError, match=r"no special piece \[PAD\], spelled just so"):
        Tokenizer.load(path)
    path.write_text(renamed.replace("<mask>", "[MASK]").replace("<pad>", "[PAD]"), "utf-8")
    assert Tokenizer.load(path).encode_batch(tiny_texts) == before

"""A pretraining tokenizer as the files that Hugging Face's fast tokenizers load.

SentencePiece and the tokenizers library segment alike if both run the same unigram model on the
same lattice, or join the same pairs in the same order (`bpe_export`). Only white space, bytes and
special pieces have to be rebuilt around it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from megatron_bert.data.bpe_export import bpe_model, bpe_obstacle
from megatron_bert.data.sentencepiece_model import (
    BYTE,
    NORMAL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    Piece,
    SentencePieceModel,
    parse_model,
    parse_settings,
)
from megatron_bert.data.tokenizer import CLS, EOD, MASK, PAD, SEP, Tokenizer
from megatron_bert.data.tokenizer_backends import split_inside_special_tokens
from megatron_bert.errors import DataError

_UNKNOWN_PIECE, _BEGIN, _END = "<unk>", "<s>", "</s>"
_ROLES = {
    "unk_token": _UNKNOWN_PIECE,
    "bos_token": _BEGIN,
    "eos_token": _END,
    "mask_token": MASK,
    "pad_token": PAD,
    "cls_token": CLS,
    "sep_token": SEP,
}
# The five pieces that LLM-jp's Hugging Face repositories spell `<MASK|LLM-jp>` and so on.
_RENAMED_BY_LLM_JP = (MASK, PAD, CLS, SEP, EOD)

_PLAIN = {f"{piece[:-1]}|LLM-jp>": piece for piece in _RENAMED_BY_LLM_JP}

# A log probability below that of any six pieces together: a literal <0x41> has six characters.
_NEVER = -1000.0


@dataclass(frozen=True)
class ExportedTokenizer:
    """What an exported model needs of its tokenizer.

    Attributes:
        files: text by file name: `tokenizer.json` and `tokenizer_config.json`.
        token_ids: `pad_token_id`, `bos_token_id`, `eos_token_id`, `cls_token_id`, `sep_token_id`
            and `mask_token_id`; None for a piece that the vocabulary lacks.
        mask_token: how a mask is written in text.
    """

    files: dict[str, str]
    token_ids: dict[str, int | None]
    mask_token: str


def export_tokenizer(path: Path, max_length: int) -> ExportedTokenizer:
    """Describe the tokenizer file at `path` for transformers' `AutoTokenizer`.

    A text becomes `<CLS> text <SEP>`, as in pretraining. Unlike in pretraining, special pieces are
    recognised in text: that is how a user writes a mask. With transformers' `split_special_tokens`
    they are ordinary text, with the ids of pretraining.

    Args:
        path: a SentencePiece `.model`, or a `tokenizer.json`.
        max_length: the longest row in tokens, special ones included.

    Raises:
        DataError: the file is missing or damaged, lacks a special piece, or has an
            `export_obstacle`.
    """
    known = Tokenizer.load(path)
    if path.suffix == ".model":
        tokenizer, names = _from_sentencepiece(path, known)
    else:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        names = {piece: known.id_to_piece(i) for piece, i in known.named_ids.items()}
    ids = {piece: tokenizer.token_to_id(name) for piece, name in names.items()}
    tokenizer.add_special_tokens([_special_token(piece, name) for piece, name in names.items()])
    split_inside_special_tokens(tokenizer, set(names.values()))
    cls, sep = names[CLS], names[SEP]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B {sep}",
        special_tokens=[(cls, ids[CLS]), (sep, ids[SEP])],
    )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    roles = {role: names[piece] for role, piece in _ROLES.items() if piece in names}
    settings: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        **roles,
    }
    if EOD in names:
        # It has no role in transformers, but is not text either. Release 5 reads this older key.
        settings["additional_special_tokens"] = [names[EOD]]
    return ExportedTokenizer(
        files={
            "tokenizer.json": tokenizer.to_str(pretty=False) + "\n",
            "tokenizer_config.json": json.dumps(settings, ensure_ascii=False, indent=2) + "\n",
        },
        token_ids={f"{role}_id": ids.get(piece) for role, piece in _ROLES.items()},
        mask_token=names[MASK],
    )


def export_obstacle(path: Path, tokenizer: Tokenizer) -> str | None:
    """Return why the tokenizer file at `path` cannot be exported; None if it can.

    Args:
        path: the file.
        tokenizer: what was loaded from it.
    """
    if path.suffix != ".model":
        return None
    content = path.read_bytes()
    settings = parse_settings(content)
    if settings.whitespace_as_suffix:
        return "is a SentencePiece model that puts spaces at the ends of words"
    if not settings.escape_whitespaces:
        return "is a SentencePiece model that leaves spaces as they are"
    if SPACE in settings.user_defined_symbols:
        return f"is a SentencePiece model with the user-defined piece {SPACE!r}"
    if settings.is_unigram:
        return None
    special = {tokenizer.id_to_piece(number) for number in tokenizer.special_ids}
    return bpe_obstacle(parse_model(content), special)


def plain_piece(piece: str) -> str:
    """A special piece in the spelling of tokenizers trained here; any other piece as it is."""
    return _PLAIN.get(piece, piece)


def _special_token(piece: str, name: str) -> tokenizers.AddedToken:
    # The space before a masked word belongs to the word's own piece (▁word).
    return tokenizers.AddedToken(name, lstrip=piece == MASK, normalized=False, special=True)


def _from_sentencepiece(
    path: Path, known: Tokenizer
) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """Rebuild a model; return it with the exported names of its special pieces."""
    obstacle = export_obstacle(path, known)
    if obstacle is not None:
        raise DataError(
            f"tokenizer {path} {obstacle}, for which no tokenizer.json gives the same ids; a run "
            "with it can go on and be evaluated, but not be exported. Begin a new run to have one "
            "that can, with a unigram model (tools/train_tokenizer.py), a plain BPE model or a "
            "tokenizer.json"
        )
    model = parse_model(path.read_bytes())
    names = _exported_names(model, known)
    exported = {known.id_to_piece(known.named_ids[piece]): name for piece, name in names.items()}
    tokenizer = tokenizers.Tokenizer(
        _unigram_model(model, exported) if model.is_unigram else bpe_model(model, exported)
    )
    tokenizer.normalizer = normalizers.Sequence(_normalization(model))
    tokenizer.pre_tokenizer = _pre_tokenizer(model, exported.keys())
    prefix = [decoders.Strip(SPACE, 1, 0)] if model.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        # The first space goes before the others become spaces, or text's own would go with it.
        [decoders.ByteFallback(), decoders.Fuse(), *prefix, decoders.Replace(SPACE, " ")]
    )
    return tokenizer, names


def _unigram_model(model: SentencePieceModel, names: Mapping[str, str]) -> models.Unigram:
    return models.Unigram(
        [(names.get(piece.text, piece.text), _score(piece)) for piece in model.pieces],
        unk_id=next(i for i, piece in enumerate(model.pieces) if piece.kind == UNKNOWN),
        byte_fallback=model.byte_fallback,
    )


def _score(piece: Piece) -> float:
    # The library's model matches any piece in raw text; SentencePiece never matches a byte piece.
    return _NEVER if piece.kind == BYTE else piece.score


def _exported_names(model: SentencePieceModel, known: Tokenizer) -> dict[str, str]:
    """Exported names of the special pieces.

    LLM-jp's models are recognised by how they were trained: their own pieces were declared as
    user-defined symbols, which no model trained here has.
    """
    is_llm_jp = {MASK, CLS, SEP, EOD} <= model.user_defined_symbols
    return {
        piece: f"{piece[:-1]}|LLM-jp>"
        if is_llm_jp and piece in _RENAMED_BY_LLM_JP
        else known.id_to_piece(number)
        for piece, number in known.named_ids.items()
    }


def _normalization(model: SentencePieceModel) -> list[normalizers.Normalizer]:
    steps = _rules(model.charsmap) if model.charsmap else []
    space = " "
    if model.remove_extra_whitespaces:
        # Not normalizers.Strip: it would take tabs, line ends and ideographic spaces too.
        steps += [
            normalizers.Replace(tokenizers.Regex(rf"[ {SPACE}]+\z"), ""),
            normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
        ]
        if model.add_dummy_prefix:
            # The first of a text's own spaces is its prefix; if it were removed, the pre-tokenizer
            # would no longer know where the text begins.
            space = r"(?!\A) "
        else:
            steps.append(normalizers.Replace(tokenizers.Regex(r"\A "), ""))
    # Done here already, so that the pre-tokenizer can tell the dummy prefix from a text's space.
    return [*steps, normalizers.Replace(tokenizers.Regex(space), SPACE)]


def _rules(charsmap: bytes) -> list[normalizers.Normalizer]:
    """SentencePiece's rules, which rewrite the longest sequence that has a rule.

    The library applies them to whole graphemes of a few bytes, but to the single characters of
    longer ones, so sequences are composed before and after it.
    """
    rules = normalizers.Precompiled(charsmap)
    steps: list[normalizers.Normalizer] = [rules]
    if rules.normalize_str("e\u0301") == "é":
        steps = [normalizers.NFC(), rules, normalizers.NFC()]
    line_end = rules.normalize_str("\r") + rules.normalize_str("\n")
    # \r\n is one grapheme, to which only the first character's rule would be applied.
    return [normalizers.Replace("\r\n", line_end), *steps] if line_end != "\r\n" else steps


def _pre_tokenizer(
    model: SentencePieceModel, special: Collection[str]
) -> pre_tokenizers.PreTokenizer:
    """Add the dummy prefix and isolate user-defined pieces, as SentencePiece does, and bytes."""
    steps: list[pre_tokenizers.PreTokenizer] = []
    if model.add_dummy_prefix:
        # A Metaspace omits its prefix if the text already begins with its replacement. So the first
        # one prepends a space, which no normalized text has, and the second rewrites it.
        steps += [
            pre_tokenizers.Metaspace(replacement=" ", prepend_scheme="first", split=False),
            pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never", split=False),
        ]
    defined = [p.text for p in model.pieces if p.kind == USER_DEFINED and p.text not in special]
    if defined:
        # Longest first: of two that begin alike, SentencePiece takes the longer one.
        either = "|".join(re.escape(text) for text in sorted(defined, key=len, reverse=True))
        steps.append(pre_tokenizers.Split(tokenizers.Regex(either), "isolated"))
    if model.byte_fallback:
        # The library gives a byte the offsets of a whole run of unknown characters. None of them is
        # part of a piece, so splitting there changes no segmentation.
        unknown = tokenizers.Regex(f"[^{_as_ranges(_known_characters(model))}]")
        steps.append(pre_tokenizers.Split(unknown, "isolated"))
    return pre_tokenizers.Sequence(steps)


def _known_characters(model: SentencePieceModel) -> set[str]:
    """The characters of all pieces that text can match."""
    matched = (p.text for p in model.pieces if p.kind in (NORMAL, USER_DEFINED))
    return {SPACE, *chain.from_iterable(matched)}


def _as_ranges(characters: set[str]) -> str:
    """These characters as the inside of a regular expression's character class."""
    points = sorted(map(ord, characters))
    begins = [point for before, point in pairwise([-2, *points]) if point != before + 1]
    ends = [point for point, after in pairwise([*points, -2]) if after != point + 1]
    return "".join(
        rf"\x{{{begin:x}}}-\x{{{end:x}}}" for begin, end in zip(begins, ends, strict=True)
    )

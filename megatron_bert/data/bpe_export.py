"""A SentencePiece BPE model as one of the tokenizers library.

SentencePiece joins, again and again, the two neighbours that make the piece with the highest score,
the leftmost of equal ones; the library takes the pair that comes first in a list of merges. A list
of every way to make each piece, by descending score, therefore gives the same segmentation.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from tokenizers import models

from megatron_bert.data.sentencepiece_model import (
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    SentencePieceModel,
)


def bpe_obstacle(model: SentencePieceModel, special: Collection[str]) -> str | None:
    """Return what the library cannot do as SentencePiece does it; None if there is nothing.

    Args:
        model: a model that is not unigram.
        special: its special pieces, which text never becomes.
    """
    if not model.is_bpe:
        return "is a SentencePiece model of words or characters"
    whole = [
        piece.text
        for piece in model.pieces
        if piece.kind == USER_DEFINED and len(piece.text) > 1 and piece.text not in special
    ]
    if whole:
        # No merge leads to such a piece.
        return f"is a BPE model with user-defined pieces of several characters ({whole[0]!r})"
    if any(piece.kind == UNUSED for piece in model.pieces):
        # SentencePiece joins them and then takes them apart.
        return "is a BPE model with pieces marked as unused"
    pieces = {piece.text: piece.score for piece in model.pieces if piece.kind == NORMAL}
    joined = [text for text in pieces if len(text) > 1]
    if len({pieces[text] for text in joined}) < len(joined):
        return "is a BPE model in which several pieces have one score"
    if not pieces.keys() >= set("".join(joined)):
        return "is a BPE model that lacks single characters of its longer pieces"
    return None


def bpe_model(model: SentencePieceModel, names: Mapping[str, str]) -> models.BPE:
    """Rebuild a model for which `bpe_obstacle` has found nothing.

    Args:
        model: the SentencePiece model.
        names: other names for some of its pieces.
    """
    pieces = [names.get(piece.text, piece.text) for piece in model.pieces]
    unknown = next(i for i, piece in enumerate(model.pieces) if piece.kind == UNKNOWN)
    return models.BPE(
        {piece: number for number, piece in enumerate(pieces)},
        list(_merges(model)),
        unk_token=pieces[unknown],
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
    )


def _merges(model: SentencePieceModel) -> Iterator[tuple[str, str]]:
    scores = {piece.text: piece.score for piece in model.pieces if piece.kind == NORMAL}
    for text in sorted(scores, key=lambda text: -scores[text]):
        for cut in range(1, len(text)):
            if text[:cut] in scores and text[cut:] in scores:
                yield text[:cut], text[cut:]

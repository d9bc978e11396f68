"""The documents of a corpus as other trainers take them: one piece per row, padded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_bert.benchmark.synthetic import CLS, MASK, PAD, SEP, Corpora

IGNORED = -100
"""The label of a token that is not to be predicted."""


@dataclass(frozen=True)
class PaddedRows:
    """Some rows of one length.

    Shape suffixes: B rows, S slots.

    Attributes:
        tokens_BS: int64, `[CLS] text [SEP] [PAD] ...`, masked.
        mask_BS: int64, 1 except for padding.
        labels_BS: int64, the original token where it is to be predicted, else `IGNORED`.
    """

    tokens_BS: NDArray[np.int64]
    mask_BS: NDArray[np.int64]
    labels_BS: NDArray[np.int64]


def document_pieces(corpora: Corpora, seq_length: int, count: int) -> list[NDArray[np.int32]]:
    """Cut documents into pieces that each fill a row; a document's last piece may be shorter.

    Args:
        corpora: where the documents come from, in order, starting over after the last.
        seq_length: slots of a row; a piece leaves two of them for CLS and SEP.
        count: number of pieces.

    Returns:
        Tokens of each piece, 1 to `seq_length` - 2.
    """
    pieces: list[NDArray[np.int32]] = []
    most = seq_length - 2
    datasets = corpora.open()
    while True:
        for dataset in datasets:
            for number in range(dataset.num_documents):
                document = dataset.document(number)
                pieces.extend(
                    document[begin : begin + most] for begin in range(0, len(document), most)
                )
                if len(pieces) >= count:
                    return pieces[:count]


def pad_and_mask(
    pieces: list[NDArray[np.int32]],
    seq_length: int,
    probability: float,
    vocab_size: int,
    random: np.random.Generator,
) -> PaddedRows:
    """Make rows from pieces; as in BERT, 80 % of the chosen tokens become MASK and 10 % another."""
    shape = (len(pieces), seq_length)
    tokens_BS = np.full(shape, PAD, dtype=np.int64)
    mask_BS = np.zeros(shape, dtype=np.int64)
    for row, piece in enumerate(pieces):
        end = len(piece) + 2
        tokens_BS[row, 0], tokens_BS[row, end - 1] = CLS, SEP
        tokens_BS[row, 1 : end - 1] = piece
        mask_BS[row, :end] = 1
    is_text_BS = (mask_BS == 1) & (tokens_BS != CLS) & (tokens_BS != SEP)
    chosen_BS = is_text_BS & (random.random(shape) < probability)
    labels_BS = np.where(chosen_BS, tokens_BS, IGNORED)
    fate_BS = random.random(shape)
    tokens_BS[chosen_BS & (fate_BS < 0.8)] = MASK
    others_BS = chosen_BS & (fate_BS >= 0.9)
    tokens_BS[others_BS] = random.integers(0, vocab_size, int(others_BS.sum()))
    return PaddedRows(tokens_BS, mask_BS, labels_BS)

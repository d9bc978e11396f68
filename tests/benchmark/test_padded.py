from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_bert.benchmark.peers.padded import IGNORED, document_pieces, pad_and_mask
from megatron_bert.benchmark.synthetic import (
    CLS,
    MASK,
    PAD,
    PARAGRAPHS,
    SEP,
    VOCAB_SIZE,
    write_corpora,
)

SEQ_LENGTH = 64


def test_pieces_are_the_documents_in_order_and_begin_anew_after_the_last(tmp_path: Path) -> None:
    corpora = write_corpora(tmp_path, PARAGRAPHS, 5_000, [1.0])
    (dataset,) = corpora.open()
    documents = [dataset.document(number) for number in range(dataset.num_documents)]
    count = sum(-(-len(document) // (SEQ_LENGTH - 2)) for document in documents)
    pieces = document_pieces(corpora, SEQ_LENGTH, count + 1)
    assert max(map(len, pieces)) == SEQ_LENGTH - 2
    assert np.array_equal(np.concatenate(pieces[:count]), np.concatenate(documents))
    assert np.array_equal(pieces[count], pieces[0])


def test_padded_rows_tell_their_text_and_what_is_to_be_predicted(tmp_path: Path) -> None:
    corpora = write_corpora(tmp_path, PARAGRAPHS, 50_000, [1.0])
    pieces = document_pieces(corpora, SEQ_LENGTH, 500)
    rows = pad_and_mask(pieces, SEQ_LENGTH, 0.15, VOCAB_SIZE, np.random.default_rng(0))
    text = sum(map(len, pieces))
    assert rows.mask_BS.sum() == text + 2 * len(pieces)
    assert ((rows.mask_BS == 0) == (rows.tokens_BS == PAD)).mean() > 0.9999
    chosen = rows.labels_BS != IGNORED
    assert abs(chosen.sum() / text - 0.15) < 0.01
    # Of 10 % a random token, which may be the same one.
    kept, masked = rows.tokens_BS == rows.labels_BS, rows.tokens_BS == MASK
    assert abs((masked & chosen).sum() / chosen.sum() - 0.8) < 0.02
    assert abs((kept & chosen).sum() / chosen.sum() - 0.1) < 0.02
    for row, piece in enumerate(pieces):
        whole = np.where(chosen[row], rows.labels_BS[row], rows.tokens_BS[row])
        assert whole[: len(piece) + 2].tolist() == [CLS, *piece, SEP]

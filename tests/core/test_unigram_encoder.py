"""The unigram encoder against one in plain Python, with SentencePiece's arithmetic."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from _megatron_bert_core import UnigramEncoder
from hypothesis import given, settings
from hypothesis import strategies as st

FIRST_ID = 300
BYTE_IDS = np.arange(256, dtype=np.int32)
PIECES = {"▁": -3.0, "a": -2.0, "ab": -2.5, "abc": -4.0, "b▁c": -6.0, "c": -1.0, "猫": -5.0,
          "猫a猫": -7.25, "𠮷": -5.5, "𠮷野": -5.75, "▁a": -2.5}  # fmt: skip


def encoder(pieces: dict[str, float], *, space_in_front: bool = False) -> UnigramEncoder:
    ids = FIRST_ID + np.arange(len(pieces), dtype=np.int32)
    scores = np.array(list(pieces.values()), dtype=np.float32)
    return UnigramEncoder(list(pieces), scores, ids, BYTE_IDS, space_in_front)


def segment(pieces: dict[str, float], text: str) -> list[int]:
    """Best segmentation of a text whose spaces are `▁`."""
    scores = {piece: np.float32(score) for piece, score in pieces.items()}
    numbers = {piece: FIRST_ID + number for number, piece in enumerate(pieces)}
    unknown = np.float32(min(scores.values()) - 10)
    best: list[tuple[np.float32, int] | None] = [(np.float32(0), 0)] + [None] * len(text)
    for begin in range(len(text)):
        here = best[begin]
        assert here is not None
        for end in range(begin + 1, len(text) + 1):
            score = scores.get(text[begin:end], unknown if end == begin + 1 else None)
            there = best[end]
            if score is not None and (there is None or here[0] + score > there[0]):
                best[end] = (here[0] + score, begin)
    ids: list[int] = []
    end = len(text)
    while end:
        step = best[end]
        assert step is not None
        piece = text[step[1] : end]
        ids[:0] = [numbers[piece]] if piece in numbers else list(piece.encode())
        end = step[1]
    return ids


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.lists(st.text(st.sampled_from("abc 猫𠮷野é\0\U0001f9ff"), max_size=12), max_size=4))
def test_ids_are_those_of_the_most_probable_segmentation(texts: list[str]) -> None:
    ids, lengths = encoder(PIECES).encode(texts)
    expected = [segment(PIECES, text.replace(" ", "▁")) for text in texts]
    assert ids.tolist() == [number for some in expected for number in some]
    assert lengths.tolist() == [len(some) for some in expected]
    assert (ids.dtype, lengths.dtype) == (np.int32, np.int64)


def test_characters_of_any_width_are_read_alike() -> None:
    # Python keeps a text in 1, 2 or 4 bytes a character, by its widest one.
    for widest in ("é", "猫", "𠮷"):
        text = "ab c" + widest
        ids, _ = encoder(PIECES).encode([text])
        assert ids.tolist() == segment(PIECES, "ab▁c" + widest)


def test_a_space_is_put_before_every_text_but_an_empty_one() -> None:
    ids, lengths = encoder(PIECES, space_in_front=True).encode(["a", "", " a"])
    assert ids.tolist() == [*segment(PIECES, "▁a"), *segment(PIECES, "▁▁a")]
    assert lengths.tolist() == [1, 0, 2]


def test_of_two_segmentations_alike_the_piece_that_begins_first_wins() -> None:
    ids, _ = encoder({"a": -1.0, "b": -1.0, "c": -1.0, "ab": -2.0, "bc": -2.0}).encode(["abc"])
    assert ids.tolist() == [FIRST_ID, FIRST_ID + 4]


def test_a_longer_text_than_a_float_can_add_up_is_segmented_to_its_end() -> None:
    # Without a new start of the sum, -1 more than 2^24 would be nothing more.
    pieces = {"a": -1000.0, "ab": -1000.25, "b": -0.5}
    ids, _ = encoder(pieces).encode(["ab" * 50_000])
    assert ids.tolist() == [FIRST_ID + 1] * 50_000


def test_threads_may_share_an_encoder() -> None:
    shared = encoder(PIECES)
    texts = ["".join(np.random.default_rng(seed).choice(list("abc 猫"), 500)) for seed in range(8)]
    alone = [shared.encode([text])[0].tolist() for text in texts]
    with ThreadPoolExecutor(4) as threads:
        together = threads.map(lambda text: shared.encode([text] * 20)[0].tolist(), texts)
        assert list(together) == [ids * 20 for ids in alone]


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="half a surrogate pair"):
        encoder(PIECES).encode(["a\ud83d"])


@pytest.mark.parametrize("texts", [[b"a"], [None], [["a"]]])
def test_only_strings_are_texts(texts: Any) -> None:
    with pytest.raises(TypeError, match="expected strings"):
        encoder(PIECES).encode(texts)


@pytest.mark.parametrize(
    "pieces", [{}, {"": -1.0}, {"a" * 256: -1.0}, {"a": float("nan")}, {"a": float("inf")}]
)
def test_a_vocabulary_that_cannot_be_used_is_refused(pieces: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"cannot be used|no piece"):
        encoder(pieces)


def test_the_longest_piece_is_found() -> None:
    ids, _ = encoder({"a": -1.0, "a" * 255: -2.0}).encode(["a" * 256])
    assert sorted(ids.tolist()) == [FIRST_ID, FIRST_ID + 1]


def test_pieces_scores_and_ids_must_fit_together() -> None:
    scores = np.array([-1.0, -1.0], dtype=np.float32)
    ids = np.array([5, 6], dtype=np.int32)
    with pytest.raises(ValueError, match="stands twice"):
        UnigramEncoder(["a", "a"], scores, ids, BYTE_IDS, False)
    with pytest.raises(ValueError, match="a score and an id for each piece"):
        UnigramEncoder(["a"], scores, ids, BYTE_IDS, False)
    with pytest.raises(ValueError, match="256 byte ids"):
        UnigramEncoder(["a", "b"], scores, ids, BYTE_IDS[:255], False)
    with pytest.raises(ValueError, match="piece -5"):
        UnigramEncoder(["a", "b"], scores, -ids, BYTE_IDS, False)

"""The core's own segmentation gives SentencePiece's ids, or stands back."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from _megatron_bert_core import UnigramEncoder
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bert.data import unigram
from megatron_bert.data.tokenizer_backends import SentencePieceBackend

# SentencePiece sets its sum of log probabilities back beyond 100,000: in about so many pieces.
LONG = 60_000

PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


def train(texts: list[str], **options: Any) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        **{"vocab_size": 512, "byte_fallback": True, "minloglevel": 2, **PLAIN, **options},
    )
    return model.getvalue()


def load(content: bytes) -> tuple[SentencePieceBackend, Any]:
    """The backend under test, and the library alone."""
    backend = SentencePieceBackend(content, set(), Path("t.model"))
    return backend, sentencepiece.SentencePieceProcessor(model_proto=content)


def assert_same_ids(backend: SentencePieceBackend, library: Any, texts: list[str]) -> None:
    ids, lengths = backend.encode(texts)
    expected = library.encode(texts, out_type=int)
    assert lengths.tolist() == [len(some) for some in expected]
    assert ids.tolist() == [token for some in expected for token in some]


@pytest.fixture(scope="module", params=[True, False], ids=["space in front", "as it is"])
def model(tiny_texts: list[str], request: pytest.FixtureRequest) -> bytes:
    return train(tiny_texts, add_dummy_prefix=request.param)


# Pieces of the vocabulary, spaces, and characters that it lacks, of one to four bytes.
characters = st.sampled_from(
    "東京吾輩は猫であるthe quick fox 1868、。 \t\n\0▁é¿ßЖ龘𠮷🧿\ufffd\U0010ffff"
)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.lists(st.text(characters, max_size=40) | st.text(max_size=10), max_size=5))
def test_any_text_has_the_librarys_ids(model: bytes, texts: list[str]) -> None:
    backend, library = load(model)
    assert backend._encoder is not None
    assert_same_ids(backend, library, texts)


def test_long_texts_have_the_librarys_ids(model: bytes, tiny_texts: list[str]) -> None:
    random = np.random.default_rng(4)
    words = np.array([word for text in tiny_texts for word in text.split()])
    long = " ".join(random.choice(words, LONG))
    unknown = "".join(map(chr, random.integers(0x4E00, 0x9FFF, LONG)))
    backend, library = load(model)
    assert_same_ids(backend, library, [long, unknown, long + unknown])


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "bpe"},
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
        {"byte_fallback": False},
        {"user_defined_symbols": ["東京"]},
        {"treat_whitespace_as_suffix": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_model_that_does_more_than_segment_is_left_to_the_library(
    tiny_texts: list[str], options: dict[str, Any]
) -> None:
    backend, library = load(train(tiny_texts, **options))
    assert backend._encoder is None
    assert_same_ids(backend, library, [" 東京  タワー ｱ", "the quick", ""])


def test_a_library_that_segments_otherwise_is_used_itself(
    model: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(unigram, "_gives_the_librarys_ids", lambda *_: False)
    backend, library = load(model)
    assert backend._encoder is None
    assert "segments in another way" in caplog.text
    assert_same_ids(backend, library, ["東京タワー"])


def test_the_probe_of_the_library_tells_other_ids(model: bytes) -> None:
    backend, library = load(model)
    pieces = backend.pieces

    class Other:
        def encode(self, text: str, out_type: str) -> Any:
            return library.encode(text, out_type=out_type)[::-1]

    assert backend._encoder is not None
    assert unigram._gives_the_librarys_ids(backend._encoder, library, pieces)
    assert not unigram._gives_the_librarys_ids(backend._encoder, Other(), pieces)


def test_half_a_surrogate_pair_is_refused(model: bytes) -> None:
    backend, _ = load(model)
    with pytest.raises(ValueError, match="half a surrogate pair"):
        backend.encode(["a\ud800b"])


@pytest.mark.parametrize(
    ("pieces", "message"),
    [([], "no piece"), (["a", "a"], "twice"), (["", "a"], "0 characters"), (["a" * 256], "256")],
)
def test_pieces_that_cannot_be_used_are_refused(pieces: list[str], message: str) -> None:
    count = len(pieces)
    with pytest.raises(ValueError, match=message):
        UnigramEncoder(
            pieces,
            np.zeros(count, dtype=np.float32),
            np.arange(count, dtype=np.int32),
            np.arange(256, dtype=np.int32),
            space_in_front=True,
        )


def test_real_texts_have_the_librarys_ids(shared_data: Path) -> None:
    content = (shared_data / "tokenizer" / "llm-jp-tokenizer-100k.ver3.0b1.model").read_bytes()
    with gzip.open(shared_data / "aozora" / "valid.jsonl.gz", "rt", encoding="utf-8") as file:
        works = [json.loads(line)["text"] for line in file]
    backend, library = load(content)
    assert backend._encoder is not None
    assert_same_ids(backend, library, works)
    assert_same_ids(backend, library, [line for work in works[:8] for line in work.split("\n")])

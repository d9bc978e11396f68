"""A tokenizer that cannot be exported is told of long before the export."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
import sentencepiece

from megatron_bert.data.preprocess import preprocess
from megatron_bert.data.preprocess_options import PreprocessOptions
from megatron_bert.data.tokenizer import SPECIAL_PIECES
from megatron_bert.training.dry_run import dry_run
from tests.distributed_harness import run_ranks
from tests.training.runs import run_config, train

STEPS = [{"seq_length": 32, "steps": 1}]


def _train_and_list(data: Path, run: Path) -> list[str]:
    """What a run of one step logs."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megatron_bert")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    train(run_config(data, run, curriculum=STEPS))
    return messages


@pytest.mark.parametrize(("model_type", "warned"), [("char", True), ("bpe", False)])
def test_preprocessing_dry_run_and_training_warn_of_a_tokenizer_that_cannot_be_exported(
    tiny_texts: list[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    model_type: str,
    warned: bool,
) -> None:
    caplog.set_level(logging.INFO)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tiny_texts),
        model_writer=model,
        model_type=model_type,
        vocab_size=400,
        hard_vocab_limit=False,
        control_symbols=list(SPECIAL_PIECES[3:]),
        minloglevel=2,
    )
    (tmp_path / "tiny.model").write_bytes(model.getvalue())
    for name in ("train", "valid"):
        source = tmp_path / f"{name}.txt"
        source.write_text("\n".join(text.replace("\n", " ") for text in tiny_texts[:60]), "utf-8")
        preprocess(
            PreprocessOptions(
                inputs=(source,),
                tokenizer=tmp_path / "tiny.model",
                output_prefix=tmp_path / name,
                workers=1,
            )
        )
    told = f"tokenizer {tmp_path / 'tiny.model'} is a SentencePiece model of words or characters"
    assert [told in message for message in caplog.messages].count(True) == 2 * warned
    caplog.clear()
    dry_run(run_config(tmp_path, tmp_path / "dry", curriculum=STEPS), 1)
    assert [told in message for message in caplog.messages].count(True) == warned
    messages = run_ranks(1, _train_and_list, tmp_path, tmp_path / "run")[0]
    assert [told in message for message in messages].count(True) == warned

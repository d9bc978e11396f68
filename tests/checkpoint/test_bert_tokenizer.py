"""From a ModernBERT with BERT's special pieces to pretraining, and back to transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    ModernBertConfig,
    ModernBertForMaskedLM,
    pipeline,
)

from megatron_bert.checkpoint.huggingface_export import export_checkpoint
from megatron_bert.checkpoint.huggingface_import import import_model
from megatron_bert.checkpoint.store import find_checkpoint
from megatron_bert.config.schema import Config
from megatron_bert.data.preprocess import preprocess
from megatron_bert.data.preprocess_options import PreprocessOptions
from megatron_bert.data.source import training_source
from megatron_bert.data.tokenizer import Tokenizer
from tests.distributed_harness import run_ranks
from tests.tokenizer.bert_style import KINDS, write_bert_tokenizer
from tests.training.runs import run_config, steps_of, train
from tools import inspect_data

VOCABULARY = 512


def _model_directory(folder: Path, texts: list[str], kind: str) -> Path:
    """A random ModernBERT as transformers saves it, with a `tokenizer.json`."""
    torch.manual_seed(3)
    config = ModernBertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        local_attention=6,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        cls_token_id=2,
        sep_token_id=3,
    )
    ModernBertForMaskedLM(config).save_pretrained(folder)
    write_bert_tokenizer(folder / "tokenizer.json", texts, kind)
    return folder


def _run(model: Path, texts: list[str], folder: Path) -> Config:
    """Preprocess `texts` and import the model; return a run that goes on from both."""
    tokenizer = model / "tokenizer.json"
    for name, some in (("train", [*texts[:60], "a [MASK] b [SEP]"]), ("valid", texts[250:])):
        source = folder / f"{name}.txt"
        source.write_text("\n".join(text.replace("\n", " ") for text in some) + "\n", "utf-8")
        preprocess(
            PreprocessOptions(
                inputs=(source,), tokenizer=tokenizer, output_prefix=folder / name, workers=1
            )
        )
    shape = import_model(model, folder / "start")
    return run_config(
        folder,
        folder / "run",
        model=shape.model_dump(mode="json", exclude={"preset"}),
        data={"tokenizer": str(tokenizer)},
        checkpoint={"resume": str(folder / "start")},
        curriculum=[{"seq_length": 32, "steps": 6}],
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_modernbert_with_berts_pieces_goes_on_and_comes_back(
    tiny_texts: list[str], tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = _model_directory(tmp_path / "model", tiny_texts, kind)
    config = _run(model, tiny_texts, tmp_path)
    known = Tokenizer.load(model / "tokenizer.json")
    batch = training_source(config, known).batch(np.arange(12), 0)
    labels = batch.labels_BM[batch.weights_BM > 0]
    assert len(labels) > 0
    assert not np.isin(labels, known.special_ids).any()
    seen = set(batch.tokens_BS.flatten().tolist())
    assert {known.cls_id, known.sep_id, known.mask_id} <= seen
    inspect_data.main(
        ["--prefix", str(tmp_path / "train"), "--tokenizer", str(model / "tokenizer.json")]
    )
    assert "61" in capsys.readouterr().out
    assert list(steps_of(run_ranks(1, train, config)[0])) == list(range(1, 7))
    exported = tmp_path / "exported"
    export_checkpoint(find_checkpoint(tmp_path / "run"), exported)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    names = (tokenizer.mask_token, tokenizer.cls_token, tokenizer.sep_token, tokenizer.pad_token)
    assert names == ("[MASK]", "[CLS]", "[SEP]", "[PAD]")
    for text in tiny_texts[:20]:
        (ids,) = known.encode_batch([text])
        assert tokenizer(text)["input_ids"] == [known.cls_id, *ids, known.sep_id]
    fill = pipeline("fill-mask", str(exported), tokenizer=tokenizer)
    assert len(fill("The quick brown [MASK] jumps")) == 5
    assert 'mask_token: "[MASK]"' in (exported / "README.md").read_text("utf-8")
    # And once more round.
    import_model(exported, tmp_path / "again")


def test_a_retrievabert_with_berts_pieces_is_exported_without_the_roles_it_lacks(
    tiny_texts: list[str], tmp_path: Path
) -> None:
    model = _model_directory(tmp_path / "model", tiny_texts, "wordpiece")
    imported = _run(model, tiny_texts, tmp_path)
    config = run_config(
        tmp_path,
        tmp_path / "run",
        data={"tokenizer": str(imported.data.tokenizer)},
        curriculum=[{"seq_length": 32, "steps": 1}],
    )
    run_ranks(1, train, config)
    exported = tmp_path / "exported"
    export_checkpoint(find_checkpoint(tmp_path / "run"), exported)
    loaded = AutoConfig.from_pretrained(exported, trust_remote_code=True)
    ids = (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id)
    assert ids == (0, None, None)
    fill = pipeline("fill-mask", str(exported), trust_remote_code=True)
    assert len(fill("The quick brown [MASK] jumps")) == 5

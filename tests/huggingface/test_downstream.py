from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, dynamic_module_utils, pipeline

from tests.huggingface.exported import write_exported
from tests.huggingface.tiny_models import HEADS, VOCABULARY, tiny_config

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

TEXTS = ["吾輩は猫である。名前はまだ無い。", "a cat", "the cat that has no name yet"]


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return str(write_exported(tmp_path / "exported"))


def test_a_pipeline_fills_masks(exported: str) -> None:
    fill = pipeline("fill-mask", exported, trust_remote_code=True)
    guesses = fill("吾輩は<MASK>である。")
    assert len(guesses) == 5
    for guess in guesses:
        assert guess["sequence"].replace(" ", "") == f"吾輩は{guess['token_str']}である。".replace(
            " ", ""
        )


def test_sentence_transformers_takes_the_mean_of_the_tokens(exported: str) -> None:
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(exported, trust_remote_code=True, device="cpu")
    found = encoder.encode(TEXTS)  # one padded batch
    tokenizer = AutoTokenizer.from_pretrained(exported)
    model = AutoModel.from_pretrained(exported, trust_remote_code=True).eval()
    for text, embedding in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state
        np.testing.assert_allclose(embedding, hidden[0].mean(0), atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_onnx_runtime_gives_equal_logits_for_any_batch(packed: bool, tmp_path: Path) -> None:
    import onnxruntime

    torch.manual_seed(9)
    model = HEADS["MaskedLM"](tiny_config()).eval()
    names = ["input_ids", "attention_mask", *(["position_ids"] if packed else [])]
    batch, slots = torch.export.Dim("batch"), torch.export.Dim("slots", max=64)
    torch.onnx.export(
        model,
        kwargs=_inputs(3, 10, packed),
        f=str(tmp_path / "model.onnx"),
        dynamo=True,
        dynamic_shapes={name: {0: batch, 1: slots} for name in names},
        input_names=names,
        output_names=["logits"],
        verbose=False,
    )
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert {given.name for given in session.get_inputs()} == set(names)
    for rows, length in ((3, 10), (2, 17)):
        inputs = _inputs(rows, length, packed)
        (found,) = session.run(["logits"], {key: value.numpy() for key, value in inputs.items()})
        with torch.no_grad():
            expected = model(**inputs).logits
        np.testing.assert_allclose(found, expected, atol=2e-5)


def _inputs(rows: int, slots: int, packed: bool) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(rows)
    ids = torch.randint(8, VOCABULARY, (rows, slots), generator=draw)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if packed:
        inputs["position_ids"] = (torch.arange(slots) % 6).expand(rows, -1).contiguous()
    return inputs

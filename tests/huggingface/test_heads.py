from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from tests.huggingface.tiny_models import (
    HEADS,
    VOCABULARY,
    RetrievaBertForMaskedLM,
    RetrievaBertModel,
    tiny_config,
)

ROWS, SLOTS, CHOICES = 3, 6, 4
# As CHANGELOG.md gives it.
OLDER_HEAD = {
    r"^pooler\.dense": "classifier.dense",
    r"^classifier\.(weight|bias)": r"classifier.out_proj.\1",
}


def _model(head: str, **changes: Any) -> Any:
    torch.manual_seed(5)
    model = HEADS[head](tiny_config(**changes)).eval()
    for parameter in model.parameters():  # biases and norms too make a difference
        nn.init.normal_(parameter, std=0.2)
    return model


def _ids(*shape: int) -> Tensor:
    return torch.randint(8, VOCABULARY, shape, generator=torch.Generator().manual_seed(2))


def _batch(head: str) -> dict[str, Tensor]:
    rows = torch.arange(ROWS)
    if head == "MultipleChoice":
        return {"input_ids": _ids(ROWS, CHOICES, SLOTS), "labels": rows}
    ids = _ids(ROWS, SLOTS)
    match head:
        case "QuestionAnswering":
            return {"input_ids": ids, "start_positions": rows, "end_positions": rows + 2}
        case "SequenceClassification":
            return {"input_ids": ids, "labels": rows % 2}
        case "TokenClassification":
            return {"input_ids": ids, "labels": ids % 2}
    return {"input_ids": ids, "labels": ids}


def test_a_number_a_label_or_several_labels_for_a_row_each_have_their_loss() -> None:
    ids = _ids(ROWS, SLOTS)
    cases: list[tuple[dict[str, Any], Tensor, Any]] = [
        ({"num_labels": 1}, torch.tensor([0.5, -1.0, 2.0]), _squared_error),
        ({"num_labels": 3}, torch.tensor([2, 0, 1]), F.cross_entropy),
        (
            {"num_labels": 3},
            torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 1]]),
            F.binary_cross_entropy_with_logits,
        ),
    ]
    for changes, labels, loss in cases:
        output = _model("SequenceClassification", **changes)(ids, labels=labels)
        assert output.logits.shape == (ROWS, changes["num_labels"])
        torch.testing.assert_close(output.loss, loss(output.logits, labels))


def _squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    return ((logits[:, 0] - labels) ** 2).mean()


def test_tokens_without_a_label_are_left_out_of_the_loss() -> None:
    ids = _ids(ROWS, SLOTS)
    labels = (ids % 3).masked_fill(torch.arange(SLOTS) > 2, -100)
    for head in ("TokenClassification", "MaskedLM"):
        model = _model(head, num_labels=3)
        output = model(ids, labels=labels)
        expected = F.cross_entropy(output.logits[:, :3].flatten(0, 1), labels[:, :3].flatten())
        torch.testing.assert_close(output.loss, expected)
        halved = model(ids, labels=labels, num_items_in_batch=torch.tensor(2 * 3 * ROWS)).loss
        torch.testing.assert_close(halved, expected / 2)


def test_an_answer_has_two_ends_and_one_outside_the_row_counts_as_none() -> None:
    starts, ends = torch.tensor([0, 3, SLOTS]), torch.tensor([2, 5, SLOTS])
    output = _model("QuestionAnswering")(
        _ids(ROWS, SLOTS), start_positions=starts, end_positions=ends
    )
    expected = (
        F.cross_entropy(output.start_logits[:2], starts[:2])
        + F.cross_entropy(output.end_logits[:2], ends[:2])
    ) / 2
    torch.testing.assert_close(output.loss, expected)


def test_choices_are_scored_as_rows_of_their_own() -> None:
    ids = _ids(ROWS, CHOICES, SLOTS)
    mask = torch.ones_like(ids)
    mask[0, 1, 4:] = 0
    model, labels = _model("MultipleChoice"), torch.tensor([0, 3, 1])
    output = model(ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels))
    one = model(ids[:1, 1:2, :4]).logits
    torch.testing.assert_close(one[0, 0], output.logits[0, 1])


@pytest.mark.parametrize("head", ["SequenceClassification", "MultipleChoice"])
def test_padding_on_the_left_changes_no_head_on_the_first_token(head: str) -> None:
    model, ids = _model(head), _batch(head)["input_ids"]
    logits = []
    for padding in ((0, 2), (2, 0)):
        mask = F.pad(torch.ones_like(ids), padding)
        logits.append(model(F.pad(ids, padding), attention_mask=mask).logits)
    torch.testing.assert_close(logits[1], logits[0])
    torch.testing.assert_close(logits[0], model(ids).logits)


# Its name before transformers 5.
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("head", HEADS)
def test_gradients_with_checkpointing_are_those_without(head: str) -> None:
    model = _model(head).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(**_batch(head)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("head", HEADS)
def test_a_configuration_may_ask_for_tuples(head: str) -> None:
    model, batch = _model(head), _batch(head)
    output = model(**batch)
    model.config.return_dict = False
    loss, logits = model(**batch)[:2]
    assert torch.equal(loss, output[0])
    assert torch.equal(logits, output[1])


@pytest.mark.filterwarnings("ignore")  # tracing, which transformers and PyTorch discourage
def test_a_model_of_tuples_can_be_traced() -> None:
    model, ids = _model("MaskedLM", return_dict=False), _ids(ROWS, SLOTS)
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    traced = torch.jit.trace(model, (ids, mask))
    torch.testing.assert_close(traced(ids, mask)[0], model(ids, mask)[0])


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_comes_back_with_every_parameter(tied: bool, tmp_path: Path) -> None:
    model = _model("MaskedLM", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert ("cls.predictions.decoder.weight" in names) is not tied
    again = RetrievaBertForMaskedLM.from_pretrained(tmp_path).eval()
    ids = _ids(ROWS, SLOTS)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) is tied


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [VOCABULARY + 5, VOCABULARY - 5])
def test_resizing_the_vocabulary_resizes_decoder_and_bias(
    size: int, tied: bool, tmp_path: Path
) -> None:
    model = _model("MaskedLM", tie_word_embeddings=tied)
    ids = _ids(ROWS, SLOTS).clamp(max=VOCABULARY - 6)
    with torch.no_grad():
        before = model(ids).logits
    model.resize_token_embeddings(size)
    output = model(ids, labels=ids)
    assert output.logits.shape == (ROWS, SLOTS, size)
    kept = min(size, VOCABULARY)
    torch.testing.assert_close(output.logits[..., :kept], before[..., :kept])
    output.loss.backward()
    model.save_pretrained(tmp_path)
    again = RetrievaBertForMaskedLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, output.logits)


def test_a_vocabulary_that_has_the_size_already_keeps_its_parameters() -> None:
    model = _model("MaskedLM")
    before = dict(model.named_parameters())
    model.resize_token_embeddings(VOCABULARY)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)


def test_a_checkpoint_that_stores_the_bias_twice_loads_quietly(tmp_path: Path) -> None:
    model = _model("MaskedLM")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again, report = RetrievaBertForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(again.cls.predictions.bias, model.cls.predictions.bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_load_in_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    model = _model("MaskedLM")
    model.save_pretrained(tmp_path)
    half = RetrievaBertForMaskedLM.from_pretrained(tmp_path, dtype=dtype).eval()
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    expected = model.bert.embeddings.word_embeddings.weight.to(dtype)
    assert torch.equal(half.get_input_embeddings().weight, expected)
    ids = _ids(ROWS, SLOTS)
    mask = torch.ones_like(ids)
    mask[0, 2:] = mask[1] = 0
    for attention in ("eager", "sdpa"):
        half.set_attn_implementation(attention)
        logits = half(ids, attention_mask=mask).logits
        assert logits.dtype == dtype
        assert logits.isfinite().all()
        torch.testing.assert_close(
            logits[0, :2].float(), model(ids[:1, :2]).logits[0], atol=0.5, rtol=0.1
        )


def test_parts_of_a_model_may_lie_on_the_disk(tmp_path: Path) -> None:
    model = _model("MaskedLM")
    model.save_pretrained(tmp_path)
    spread = RetrievaBertForMaskedLM.from_pretrained(
        tmp_path,
        device_map={"bert.embeddings": "cpu", "bert.encoder": "disk", "cls": "cpu"},
        offload_folder=tmp_path / "offloaded",
    )
    ids = _ids(ROWS, SLOTS)
    assert torch.equal(spread(ids).logits, model(ids).logits)


@pytest.mark.parametrize("head", [head for head in HEADS if head != "MaskedLM"])
def test_a_new_head_on_pretrained_weights_is_all_that_is_new(head: str, tmp_path: Path) -> None:
    pretrained = _model("MaskedLM")
    pretrained.save_pretrained(tmp_path)
    model, report = HEADS[head].from_pretrained(tmp_path, output_loading_info=True)
    # The names that PEFT trains and saves beside its adapters.
    assert all(name.startswith(("classifier.", "qa_outputs.")) for name in report["missing_keys"])
    assert not report["unexpected_keys"]
    for name, parameter in pretrained.bert.named_parameters():
        assert torch.equal(model.bert.get_parameter(name), parameter), name


@pytest.mark.parametrize("head", ["SequenceClassification", "MultipleChoice"])
def test_a_head_that_was_saved_under_its_older_names_loads(head: str, tmp_path: Path) -> None:
    model = _model(head)
    model.save_pretrained(tmp_path)
    older = {
        name.replace("classifier.dense", "pooler.dense").replace("out_proj.", ""): tensor
        for name, tensor in load_file(tmp_path / "model.safetensors").items()
    }
    save_file(older, tmp_path / "model.safetensors", {"format": "pt"})
    again, report = HEADS[head].from_pretrained(
        tmp_path, key_mapping=OLDER_HEAD, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = _batch(head)["input_ids"]
    assert torch.equal(again.eval()(ids).logits, model(ids).logits)


def test_the_encoder_alone_loads_from_a_masked_language_model(tmp_path: Path) -> None:
    pretrained = _model("MaskedLM")
    pretrained.save_pretrained(tmp_path)
    encoder, report = RetrievaBertModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    # Its head for masked words is no surprise, whereas a weight of another model is one.
    assert not report["unexpected_keys"]
    weights = load_file(tmp_path / "model.safetensors")
    weights["bert.encoder.layer.9.mlp.up_proj.weight"] = torch.zeros(1)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    _, report = RetrievaBertModel.from_pretrained(tmp_path, output_loading_info=True)
    assert len(report["unexpected_keys"]) == 1
    ids = _ids(ROWS, SLOTS)
    assert torch.equal(
        encoder.eval()(ids).last_hidden_state, pretrained.bert(ids).last_hidden_state
    )


def test_dropout_before_a_classifier_can_differ_from_the_encoders() -> None:
    model = _model("TokenClassification", classifier_dropout=0.5)
    assert model.dropout.p == 0.5
    assert _model("TokenClassification", hidden_dropout_prob=0.25).dropout.p == 0.25

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

from megatron_bert.huggingface.modeling_retrieva_bert import visibility_mask
from tests.huggingface.flash_reference import use_flash_reference
from tests.huggingface.tiny_models import PAD_ID, VOCABULARY, RetrievaBertModel, tiny_config

BACKENDS = ("eager", "sdpa", "flash")
LENGTHS = (7, 4, 6)
SLOTS = 9


def _model(backend: str, monkeypatch: pytest.MonkeyPatch) -> RetrievaBertModel:
    torch.manual_seed(3)
    model = RetrievaBertModel(tiny_config()).eval()
    if backend == "flash":
        use_flash_reference(monkeypatch, model)
    else:
        model.set_attn_implementation(backend)
    return model


def _texts() -> list[Tensor]:
    draw = torch.Generator().manual_seed(11)
    return [torch.randint(8, VOCABULARY, (length,), generator=draw) for length in LENGTHS]


def _alone(model: RetrievaBertModel, texts: list[Tensor]) -> list[Tensor]:
    return [model(text[None]).last_hidden_state[0] for text in texts]


def _assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.fixture(autouse=True)
def _no_grad() -> object:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_every_backend_gives_the_eager_hidden_states(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = _texts()
    expected = _alone(_model("eager", monkeypatch), texts)
    _assert_same(_alone(_model(backend, monkeypatch), texts), expected)


@pytest.mark.parametrize("pad_id", [PAD_ID, 0, 20])
@pytest.mark.parametrize("placed", [True, False])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_is_never_attended_whatever_its_id(
    backend: str, side: str, placed: bool, pad_id: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, texts = _model(backend, monkeypatch), _texts()
    ids = torch.full((len(texts), SLOTS), pad_id)
    mask, positions = torch.zeros_like(ids), torch.zeros_like(ids)
    places = [
        slice(0, length) if side == "right" else slice(SLOTS - length, SLOTS) for length in LENGTHS
    ]
    for row, (place, text) in enumerate(zip(places, texts, strict=True)):
        ids[row, place], mask[row, place] = text, 1
        positions[row, place] = torch.arange(len(text))
    hidden = model(
        ids, attention_mask=mask, position_ids=positions if placed else None
    ).last_hidden_state
    found = [hidden[row, place] for row, place in enumerate(places)]
    _assert_same(found, _alone(model, texts))
    assert hidden.isfinite().all()


def test_a_mask_that_hides_nothing_on_the_left_changes_no_position(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, text = _model("sdpa", monkeypatch), _texts()[0][None]
    counted = model(text, attention_mask=torch.ones_like(text)).last_hidden_state
    mask = torch.ones_like(text)
    mask[0, 3] = 0  # in the middle of a text, whose other tokens stay where they are
    hidden = model(text, attention_mask=mask).last_hidden_state
    places = torch.arange(text.shape[1])[None]
    assert torch.equal(counted, model(text, position_ids=places).last_hidden_state)
    placed = model(text, attention_mask=mask, position_ids=places).last_hidden_state
    torch.testing.assert_close(hidden, placed, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_nothing_but_padding_is_finite_and_touches_no_other(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = _model(backend, monkeypatch), _texts()[0]
    ids = torch.stack([torch.full_like(text, PAD_ID), text])
    mask = torch.stack([torch.zeros_like(text), torch.ones_like(text)])
    hidden = model(ids, attention_mask=mask).last_hidden_state
    assert hidden.isfinite().all()
    _assert_same([hidden[1]], _alone(model, [text]))


def _packed(texts: list[Tensor], padding: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two rows: the first two texts and `padding` slots, and the third text with padding."""
    rows = ((0, 1), (2,))
    slots = LENGTHS[0] + LENGTHS[1] + padding
    ids = torch.full((2, slots), PAD_ID)
    positions, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, numbers in enumerate(rows):
        end = 0
        for number in numbers:
            begin, end = end, end + LENGTHS[number]
            ids[row, begin:end] = texts[number]
            positions[row, begin:end] = torch.arange(LENGTHS[number])
            mask[row, begin:end] = 1
    return ids, positions, mask


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_texts_packed_into_a_row_do_not_see_each_other_nor_the_padding(
    backend: str, padding: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, texts = _model(backend, monkeypatch), _texts()
    ids, positions, mask = _packed(texts, padding)
    hidden = model(
        ids, attention_mask=mask if masked else None, position_ids=positions
    ).last_hidden_state
    first, second, third = LENGTHS
    found = [hidden[0, :first], hidden[0, first : first + second], hidden[1, :third]]
    _assert_same(found, _alone(model, texts))
    assert hidden.isfinite().all()


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_row_of_positions_serves_the_whole_batch(
    backend: str, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = _model(backend, monkeypatch), _texts()[0]
    ids = torch.stack([text, text.flip(0)])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    mask = torch.ones_like(ids) if masked else None
    hidden = model(ids, mask, positions).last_hidden_state
    expected = [model(row[None], position_ids=positions).last_hidden_state[0] for row in ids]
    _assert_same(list(hidden), expected)


def test_flash_attention_refuses_a_hole_in_a_packed_text(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, positions, mask = _packed(_texts(), padding=3)
    mask[0, 2] = 0
    with pytest.raises(ValueError, match=r"in the middle of a text.*sdpa"):
        _model("flash", monkeypatch)(ids, attention_mask=mask, position_ids=positions)


def test_borders_made_by_a_collator_are_taken_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model, texts = _model("flash", monkeypatch), _texts()
    borders = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    # Positions that never are 0 tell no borders.
    positions = [torch.arange(1, length + 1)[None] for length in LENGTHS]
    hidden = model(
        torch.cat(texts)[None],
        position_ids=torch.cat(positions, 1),
        cu_seq_lens_q=borders,
        cu_seq_lens_k=borders,
        max_length_q=max(LENGTHS),
        max_length_k=max(LENGTHS),
    ).last_hidden_state[0]
    expected = [
        model(text[None], position_ids=places).last_hidden_state[0]
        for text, places in zip(texts, positions, strict=True)
    ]
    _assert_same(list(hidden.split(LENGTHS)), expected)


def test_every_slot_sees_something() -> None:
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    for positions in (None, torch.tensor([[0, 1, 0], [0, 1, 2]])):
        visible = visibility_mask(mask, positions)
        assert visible is not None
        assert visible.any(-1).all()
        assert not visible[0, 0, 0, 2]


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_padded_batches_run_under_autocast(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(backend, monkeypatch)
    ids, positions, mask = _packed(_texts(), padding=3)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(ids, attention_mask=mask, position_ids=positions).last_hidden_state
    whole = model(ids, attention_mask=mask, position_ids=positions).last_hidden_state
    torch.testing.assert_close(half.float(), whole, atol=0.1, rtol=0.1)


def test_a_mask_of_another_shape_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 1, 4, 4\); give \[B, S\]"):
        _model("sdpa", monkeypatch)(torch.zeros(1, 4).long(), torch.ones(1, 1, 4, 4))


def test_a_row_longer_than_the_position_table_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"a row of 65 tokens .* 64; truncate"):
        _model("sdpa", monkeypatch)(torch.zeros(1, 65).long())


@pytest.mark.parametrize("position", [-1, 64])
def test_a_position_outside_the_table_is_refused_on_a_cpu(
    position: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = _texts()[0][None]
    positions = torch.zeros_like(text)
    positions[0, 1] = position
    with pytest.raises(ValueError, match=f"{position}.* position table from 0 to 63"):
        _model("sdpa", monkeypatch)(text, position_ids=positions)


def test_a_model_is_one_graph_with_positions_given(monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = _model("sdpa", monkeypatch), _texts()[0][None]
    inputs = {"input_ids": text, "position_ids": torch.arange(text.shape[1])[None]}
    exported = torch.export.export(model, (), inputs)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    expected = model(**inputs).last_hidden_state
    for graph in (exported.module(), compiled):
        _assert_same([graph(**inputs).last_hidden_state], [expected])


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_attention_weights_leave_out_padding_and_other_texts(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, positions, mask = _packed(_texts(), padding=3)
    model = _model(backend, monkeypatch)
    output = model(ids, mask, positions, output_attentions=True, output_hidden_states=True)
    assert len(output.attentions) == 2
    assert len(output.hidden_states) == 3
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    first, second, _ = LENGTHS
    for weights in output.attentions:
        assert weights.shape == (2, 4, ids.shape[1], ids.shape[1])
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))
        assert not weights[0, :, :first, first:].any()
        assert not weights[0, :, first : first + second, :first].any()
        assert not weights[0, :, : first + second, first + second :].any()


def test_weights_of_an_attention_that_has_none_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = _model("flash", monkeypatch)
    with pytest.raises(ValueError, match=r"'flash.*' has no attention weights; call model.set_"):
        model(_texts()[0][None], output_attentions=True)


@pytest.mark.parametrize("asked", [True, False])
def test_states_and_weights_that_nobody_asked_for_are_let_go(
    asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model("eager", monkeypatch)
    first, left = model.encoder.layer[0], []
    first.attention.self.register_forward_hook(
        lambda module, inputs, output: left.append(weakref.ref(output[1]))
    )
    first.register_forward_hook(lambda module, inputs, output: left.append(weakref.ref(output[0])))
    alive: list[bool] = []
    model.encoder.ln.register_forward_pre_hook(
        lambda module, inputs: alive.extend(tensor() is not None for tensor in left)
    )
    output = model(_texts()[0][None], output_attentions=asked, output_hidden_states=asked)
    assert alive == [asked, asked]
    assert (output.attentions is not None, output.hidden_states is not None) == (asked, asked)

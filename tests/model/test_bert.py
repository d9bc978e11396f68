from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from megatron_bert.config.block_matrices import block_matrices
from megatron_bert.config.flops import row_flops
from megatron_bert.config.parameters import parameter_count
from megatron_bert.config.presets import PRESETS
from megatron_bert.config.schema import ModelConfig
from megatron_bert.model.bert import BertForPretraining, ModelPart
from megatron_bert.model.block import Block, BlockDropout
from megatron_bert.parallel.random import dropout_keys, element_draws, vector_draws
from megatron_bert.parallel.sharding import local_part
from megatron_bert.parallel.token_share import TokenShare
from tests.distributed_harness import run_ranks
from tests.small_model import (
    MASKED,
    SLOTS,
    VOCABULARY,
    cpu_topology,
    packed_inputs,
    small_config,
    small_model,
    whole_model,
)

T = TypeVar("T")


def test_the_model_has_the_parameters_that_the_configuration_predicts() -> None:
    run_ranks(1, _check_parameter_counts)


def _check_parameter_counts() -> None:
    tp = cpu_topology().tensor_parallel
    retrievabert = ModelConfig(**PRESETS["retrievabert-1.3b"])
    modernbert = ModelConfig(**PRESETS["modernbert-base"])
    for config, vocabulary in (
        (retrievabert, 99584),
        (modernbert, 50368),
        (small_config().model, VOCABULARY),
    ):
        with torch.device("meta"):
            model = BertForPretraining(config, vocabulary, tp, seed=0)
        counted = sum(parameter.numel() for parameter in model.parameters())
        assert counted == parameter_count(config, vocabulary)
    assert parameter_count(retrievabert, 99584) == 1_301_388_032
    assert parameter_count(modernbert, 50368) == 149_655_232


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_block_has_the_matrices_that_the_configuration_lists(ranks: int) -> None:
    run_ranks(ranks, _check_block_matrices, ranks)


def _check_block_matrices(ranks: int) -> None:
    tp = cpu_topology(tensor=ranks).tensor_parallel
    for groups in (1, 2):
        config = small_config(model={"num_query_groups": groups}).model
        with torch.device("meta"):
            block = Block(config, tp, layer=0)
        held = [
            (name.split(".")[-2], *local_part(parameter).shape)
            for name, parameter in block.named_parameters()
            if parameter.dim() == 2
        ]
        listed = block_matrices(config, ranks)
        assert held == [(matrix.name, matrix.outputs, matrix.inputs) for matrix in listed]


def test_segments_of_a_packed_row_do_not_see_each_other() -> None:
    run_ranks(1, _check_no_leak)


def _check_no_leak() -> None:
    model = whole_model(small_config(), cpu_topology()).eval()
    inputs = packed_inputs(1)
    begin = (inputs.positions[0] == 0).nonzero()[1, 0]
    with torch.no_grad():
        before = model.encode(inputs.tokens, inputs.positions, inputs.rows)
        inputs.tokens[0, begin:] = 9
        after = model.encode(inputs.tokens, inputs.positions, inputs.rows)
        alone = model.encode(inputs.tokens[:, :begin], inputs.positions[:, :begin], inputs.rows)
    assert torch.equal(before[:begin], after[:begin])
    assert not torch.allclose(before[begin:], after[begin:])
    torch.testing.assert_close(before[:begin], alone)


def test_the_loss_is_the_cross_entropy_of_the_masked_positions() -> None:
    run_ranks(1, _check_loss)


def _check_loss() -> None:
    model = whole_model(small_config(), cpu_topology()).eval()
    inputs = packed_inputs(3)
    with torch.no_grad():
        loss, correct_N = model(*inputs)
        hidden = model.encode(inputs.tokens, inputs.positions, inputs.rows)
        hidden = hidden.unflatten(0, inputs.tokens.shape)
        table, bias = model.embeddings.word.weight, model.head.bias
        logits = model.head.transform(hidden) @ table.T + bias
    masked = logits.gather(1, inputs.masked.long()[..., None].expand(-1, -1, VOCABULARY))
    labels = inputs.labels.long()
    each = F.cross_entropy(masked.flatten(0, 1), labels.flatten(), reduction="none")
    torch.testing.assert_close(loss, (each * inputs.weights.flatten()).sum())
    right = (masked.argmax(-1) == labels) * inputs.weights
    assert torch.equal(correct_N, right.flatten())


def test_rows_are_computed_alike_in_any_company_dropout_included() -> None:
    run_ranks(1, _check_company)


def _check_company() -> None:
    config = small_config(model={"hidden_dropout": 0.3, "attention_dropout": 0.2})
    model = whole_model(config, cpu_topology()).train()
    together = packed_inputs(4, first_row=10)
    alone = packed_inputs(1, first_row=12)
    with torch.no_grad():
        whole = model.encode(together.tokens, together.positions, together.rows)
        part = model.encode(alone.tokens, alone.positions, alone.rows)
        undropped = model.eval().encode(alone.tokens, alone.positions, alone.rows)
    torch.testing.assert_close(whole[2 * SLOTS : 3 * SLOTS], part)
    assert not torch.allclose(part, undropped)


class _Operators(TorchDispatchMode):
    """Counts what is computed."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def _operators(compute: Callable[[], T]) -> tuple[T, int]:
    """What it returns, and how many operators it takes."""
    with _Operators() as operators:
        result = compute()
    return result, operators.count


def test_the_draws_of_all_layers_are_made_together_each_as_if_alone() -> None:
    run_ranks(1, _check_draws_together)


def _check_draws_together() -> None:
    tp, rows = cpu_topology().tensor_parallel, torch.tensor([3, 2**40 + 1, 5])
    config = small_config(model={"num_layers": 8, "hidden_dropout": 0.3}).model
    # The end of the second row and most of the third, as a rank that shares the tokens may have.
    share = TokenShare(rows=3, slots=SLOTS, first=2 * SLOTS - 7, count=SLOTS)
    slots = (torch.arange(SLOTS) + SLOTS - 7) % SLOTS
    row_of_token = (torch.arange(SLOTS) + 2 * SLOTS - 7) // SLOTS
    counts = set()
    for layers in (range(8), range(3, 5)):
        with torch.device("meta"):
            part = ModelPart(layers, is_first=False, is_last=False)
            model = BertForPretraining(config, VOCABULARY, tp, seed=7, part=part).train()

        def dropouts(model: BertForPretraining = model) -> list[BlockDropout]:
            return list(model._block_dropouts(rows, share, 32))

        found, count = _operators(dropouts)
        counts.add(count)
        for layer, dropout in zip(layers, found, strict=True):
            for site, draws in (
                ("attention", dropout.attention_T),
                ("feed_forward", dropout.feed_forward_T),
            ):
                (keys,) = dropout_keys(rows, 7, site, range(layer, layer + 1))
                expected = vector_draws(keys[row_of_token], slots)
                assert draws.dtype == expected.dtype
                assert draws.is_contiguous()
                assert torch.equal(draws, expected)
            assert torch.equal(dropout.channels_D, element_draws(32, rows.device))
            keys = dropout_keys(rows, 7, "attention_weights", layers)[layer - layers.start]
            assert torch.equal(dropout.attention_weights_B, keys)
        none, without = _operators(lambda model=model: dropouts(model.eval()))
        assert without < count / 2
        assert {len(dropout.attention_T) for dropout in none} == {0}
    assert len(counts) == 1


def test_initial_weights_follow_the_configuration() -> None:
    run_ranks(1, _check_initialization)


def _check_initialization() -> None:
    model = whole_model(small_config(model={"num_layers": 8, "init_std": 0.02}), cpu_topology())
    for name, parameter in model.named_parameters():
        whole = parameter.detach()
        if name.endswith("norm.weight"):
            assert (whole == 1).all(), name
        elif whole.dim() == 1:
            assert (whole == 0).all(), name
        else:
            residual = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
            expected = 0.02 / math.sqrt(16) if residual else 0.02
            tolerance = 5 / math.sqrt(2 * whole.numel())
            assert whole.std() / expected == pytest.approx(1, abs=tolerance), name


def test_flops_are_those_that_pytorch_counts() -> None:
    run_ranks(1, _check_flops)


def _check_flops() -> None:
    # With dropout attention is written out as matrix products, which the counter knows.
    config = small_config(model={"attention_dropout": 0.1})
    model = whole_model(config, cpu_topology())
    inputs = packed_inputs(3)
    with FlopCounterMode(display=False) as counter:
        model(*inputs).loss.backward()
    assert counter.get_total_flops() == 3 * row_flops(config.model, VOCABULARY, SLOTS, MASKED)


@pytest.mark.parametrize("seed", [7, 8])
def test_dropout_and_weights_follow_the_seed(seed: int) -> None:
    (loss,) = run_ranks(1, _loss_of_seed, seed)
    (again,) = run_ranks(1, _loss_of_seed, seed)
    (other,) = run_ranks(1, _loss_of_seed, seed + 10)
    assert loss == again != other


def _loss_of_seed(seed: int) -> float:
    config = small_config(run={"seed": seed}, model={"hidden_dropout": 0.3})
    model = small_model(config, cpu_topology())
    return float(model.runner.train([packed_inputs(2)], torch.ones(())))

"""Sharded weights: gathered, and their gradients reduced, once a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron_bert.parallel.sharded_unit import ShardedUnit
from megatron_bert.training.optimizer import build_optimizer
from tests.distributed_harness import run_ranks
from tests.small_model import (
    cpu_topology,
    packed_inputs,
    small_config,
    small_model,
    whole_model,
)

MICRO_BATCHES = 2


def _whole_gradient(parameter: Tensor) -> Tensor:
    assert isinstance(parameter.grad, DTensor)
    return parameter.grad.full_tensor()


def _check_gradients() -> None:
    topology = cpu_topology()
    model = small_model(small_config(), topology)
    first_row = 2 * MICRO_BATCHES * dist.get_rank()
    micro_batches = [packed_inputs(2, first_row + 2 * index) for index in range(MICRO_BATCHES)]
    model.runner.train(micro_batches, torch.ones(()))
    reference = whole_model(small_config(), topology).train()
    rows = 2 * MICRO_BATCHES * dist.get_world_size()
    reference(*packed_inputs(rows)).loss.backward()
    for (name, parameter), expected in zip(
        model.named_parameters().items(), reference.parameters(), strict=True
    ):
        torch.testing.assert_close(
            _whole_gradient(parameter), expected.grad, rtol=1e-4, atol=1e-4, msg=name
        )


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_gradients_are_summed_over_ranks_and_micro_batches(world_size: int) -> None:
    run_ranks(world_size, _check_gradients)


def _check_reduction_in_bf16(sizes: dict[str, int], micro_batches: int) -> None:
    first_row = 2 * micro_batches * dist.get_rank()
    inputs = [packed_inputs(2, first_row + 2 * index) for index in range(micro_batches)]
    exact, rounded = (
        small_model(small_config(precision={"reduce": reduce}), cpu_topology(**sizes))
        for reduce in ("fp32", "bf16")
    )
    for model in (exact, rounded):
        model.runner.train(inputs, torch.ones(()))
    others = rounded.named_parameters()
    errors = {}
    for name, one in exact.named_parameters().items():
        gradient, other = _whole_gradient(one), _whole_gradient(others[name])
        assert other.dtype == torch.float32
        errors[name] = float((gradient - other).norm() / gradient.norm())
        # The key's bias has no true gradient.
        assert name.endswith("key.bias") or errors[name] < 0.02, name
    assert any(error > 1e-4 for error in errors.values())


@pytest.mark.parametrize(
    ("world_size", "sizes"), [(2, {}), (4, {"replicate": 2}), (2, {"replicate": 2})], ids=str
)
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_gradients_reduced_in_bf16_are_fp32_s_up_to_its_rounding(
    world_size: int, sizes: dict[str, int], micro_batches: int
) -> None:
    run_ranks(world_size, _check_reduction_in_bf16, sizes, micro_batches)


def _check_alone() -> None:
    gradients = []
    for reduce in ("fp32", "bf16"):
        model = small_model(small_config(precision={"reduce": reduce}), cpu_topology())
        model.runner.train([packed_inputs(2), packed_inputs(2, 2)], torch.ones(()))
        gradients.append([_whole_gradient(p) for p in model.named_parameters().values()])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_a_rank_that_has_all_rows_rounds_no_gradient_for_nothing() -> None:
    run_ranks(1, _check_alone)


def _losses(evaluate: bool) -> list[float]:
    config, topology = small_config(), cpu_topology()
    model = small_model(config, topology)
    optimizer = build_optimizer(config, model)
    inputs = packed_inputs(4, first_row=4 * dist.get_rank())
    losses = []
    for _ in range(3):
        losses.append(model.runner.train([inputs], torch.ones(())).item())
        optimizer.step(0.05)
        if evaluate:
            model.runner.evaluate([inputs])
    return losses


def _check_evaluation_between_steps() -> None:
    losses = _losses(evaluate=False)
    assert len(set(losses)) == 3, "an update did not reach the gathered weights"
    assert _losses(evaluate=True) == losses


def test_no_step_computes_with_weights_gathered_before_the_last_update() -> None:
    run_ranks(2, _check_evaluation_between_steps)


def _types_of_gradients(changes: dict[str, Any], sizes: dict[str, int]) -> list[list[str]]:
    """Of what is reduced, in steps of three micro-batches, of one and again of three."""
    config = small_config(**changes)
    model = small_model(config, cpu_topology(**sizes))
    reduction = ShardedUnit.reduction
    found: list[list[str]] = []
    types = set[str]()

    def watched(unit: ShardedUnit) -> Iterator[None]:
        types.update(str(weight.grad.dtype) for weight in unit.weights() if weight.grad is not None)
        return reduction(unit)

    gradients = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardedUnit, "reduction", watched)
        for count in (3, 1, 3):
            batches = [packed_inputs(2, 2 * index) for index in range(count)]
            model.runner.train(batches, torch.ones(()))
            model.runner.evaluate(batches[:1])
            found.append(sorted(types))
            parameters = list(model.named_parameters().values())
            gradients.append([_whole_gradient(parameter) for parameter in parameters])
            for parameter in parameters:
                parameter.grad = None
            types.clear()
    assert all(map(torch.equal, gradients[0], gradients[2]))
    return found


@pytest.mark.parametrize(
    ("ranks", "reduce", "parallel", "dtype"),
    [
        (1, "fp32", {}, "torch.float32"),
        (1, "bf16", {}, "torch.float32"),
        (2, "bf16", {}, "torch.bfloat16"),
        (2, "fp32", {}, "torch.float32"),
        (1, "fp32", {"reshard_after_forward": True}, "torch.float32"),
        (2, "fp32", {"tensor": 2}, "torch.float32"),
    ],
    ids=str,
)
def test_gradients_of_several_micro_batches_are_had_in_the_type_of_their_sum(
    ranks: int, reduce: str, parallel: dict[str, Any], dtype: str
) -> None:
    changes = {"precision": {"compute": "bf16", "reduce": reduce}, "parallel": parallel}
    sizes = {"tensor": 2} if "tensor" in parallel else {}
    types = run_ranks(ranks, _types_of_gradients, changes, sizes)[0]
    # A single one's are sent in the type in which they are computed, and summed in the other.
    assert types == [[dtype], ["torch.bfloat16"], [dtype]]


def _check_addresses(reshard: bool) -> None:
    config = small_config(parallel={"reshard_after_forward": reshard})
    model = small_model(config, cpu_topology())
    optimizer = build_optimizer(config, model)
    (chunk,) = model.chunks
    inputs = packed_inputs(2)
    found = []

    def note(*_: Any) -> None:
        weights = list(chunk.blocks.parameters())
        assert not any(isinstance(weight, DTensor) for weight in weights)
        first = chunk.blocks["0"].attention.query.weight
        found.append(([w.data_ptr() for w in weights], first.untyped_storage().size()))

    chunk.blocks["1"].register_forward_hook(note)
    for _ in range(2):
        model.runner.train([inputs, inputs], torch.ones(()))
        optimizer.step(1e-2)
        model.runner.evaluate([inputs])
    if reshard:
        # Behind the last block the first one's are gone.
        assert {size for _, size in found} == {0}
    else:
        assert len({tuple(addresses) for addresses, _ in found}) == 1
        assert all(size > 0 for _, size in found)
    assert all(isinstance(parameter, DTensor) for parameter in chunk.parameters())


@pytest.mark.parametrize("reshard", [False, True])
def test_gathered_weights_keep_their_addresses_or_are_freed_behind_each_block(
    reshard: bool,
) -> None:
    run_ranks(2, _check_addresses, reshard)


def _check_memory_of_weights() -> None:
    model = small_model(
        small_config(precision={"compute": "bf16"}, parallel={"reshard_after_forward": True}),
        cpu_topology(),
    )
    (chunk,) = model.chunks
    assert chunk.embeddings is not None
    weights: set[Tensor] = set()

    def held(*_: Any) -> int:
        weights.update(p for p in chunk.blocks.parameters() if not isinstance(p, DTensor))
        return sum({w.data_ptr(): w.untyped_storage().size() for w in weights}.values())

    sizes = []
    # Before the blocks, and behind them.
    chunk.embeddings.register_forward_pre_hook(lambda *_: sizes.append(held()))
    chunk.register_forward_hook(lambda *_: sizes.append(held()))
    # The type of the sums changes from step to step.
    for count in (1, 2, 1):
        model.runner.train([packed_inputs(2)] * count, torch.ones(()))
        sizes.append(held())
    assert not any(sizes)


def test_freed_weights_take_no_memory_between_passes_and_steps() -> None:
    run_ranks(2, _check_memory_of_weights)


def _check_nothing_evaluated() -> None:
    model = small_model(small_config(), cpu_topology())
    before = {name: p.to_local().clone() for name, p in model.named_parameters().items()}
    assert model.runner.evaluate([]) == []
    for name, parameter in model.named_parameters().items():
        assert torch.equal(parameter.to_local(), before[name])
    model.runner.train([packed_inputs(2)], torch.ones(()))


def test_an_evaluation_of_nothing_leaves_the_weights() -> None:
    run_ranks(2, _check_nothing_evaluated)


class _BrokenError(Exception):
    """Stands for memory that did not suffice, say."""


def _check_failed_steps(reshard: bool) -> None:
    config = small_config(model={"num_layers": 4}, parallel={"reshard_after_forward": reshard})
    model, clean = (small_model(config, cpu_topology()) for _ in range(2))
    batches = [packed_inputs(2, 2 * index) for index in range(4)]
    blocks = list(model.chunks[-1].blocks.values())
    calls = 0

    def fail_at(call: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == call:
                raise _BrokenError

        return hook

    for work in (model.runner.evaluate, lambda b: model.runner.train(b, torch.tensor(9.0))):
        calls = 0
        # In the second micro-batch, on all ranks.
        hook = blocks[-1].register_forward_hook(fail_at(2))
        with pytest.raises(_BrokenError):
            work(batches)
        hook.remove()
        for name, parameter in model.named_parameters().items():
            assert isinstance(parameter, DTensor), name
            assert parameter.grad is None, name
    for each in (model, clean):
        each.runner.train(batches, torch.tensor(9.0))
    for (name, one), other in zip(
        model.named_parameters().items(), clean.named_parameters().values(), strict=True
    ):
        assert torch.equal(_whole_gradient(one), _whole_gradient(other)), name


@pytest.mark.parametrize("reshard", [False, True])
def test_a_failed_step_leaves_shards_and_nothing_for_the_next(reshard: bool) -> None:
    run_ranks(2, _check_failed_steps, reshard)


def _outputs_that_are_views() -> list[bool]:
    parallel = {"pipeline": 2, "reshard_after_forward": True}
    config = small_config(model={"num_layers": 4}, parallel=parallel)
    model = small_model(config, cpu_topology(pipeline=2))
    views = []
    for chunk in model.chunks:
        if not chunk.part.is_last:
            chunk.register_forward_hook(lambda _, __, output: views.append(output._is_view()))
    model.runner.train([packed_inputs(2), packed_inputs(2, 2)], torch.tensor(9.0))
    return views


def test_a_stages_output_is_no_view_of_something_that_would_stay() -> None:
    # The last stage's is the head's.
    first, _ = run_ranks(2, _outputs_that_are_views)
    assert first == [False, False]


def _check_alignment() -> None:
    # Sides that are not a multiple of anything.
    config = small_config(
        model={"hidden_size": 36, "num_attention_heads": 3, "ffn_hidden_size": 50}
    )
    model = small_model(config, cpu_topology())
    (chunk,) = model.chunks
    chunk(*packed_inputs(2))
    assert {weight.data_ptr() % 16 for weight in chunk.parameters()} == {0}


def test_gathered_weights_begin_where_products_can_load_them() -> None:
    run_ranks(3, _check_alignment)


def _check_what_stands_between_passes() -> None:
    config = small_config()
    model = small_model(config, cpu_topology())
    batches = [packed_inputs(2, 2 * index) for index in range(4)]
    functions: list[int] = []

    def count(share: Tensor) -> None:
        names, waiting, seen = [], [share.grad_fn], set()
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            names.append(node.name())
            waiting += [following for following, _ in node.next_functions]
        functions.append(sum("RunBackward" in name for name in names))

    model.chunks[0].register_forward_hook(lambda _, __, output: count(output.loss))
    model.runner.train(batches, torch.ones(()))
    assert functions == [0, 0, 0, 2]


def test_only_the_last_pass_of_a_step_has_anything_between_blocks() -> None:
    run_ranks(2, _check_what_stands_between_passes)

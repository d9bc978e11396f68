"""`fully_shard` with this project's policy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron_bert.parallel import data_parallel
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
    reference(*packed_inputs(rows))[0, 0].backward()
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


def _types_of_gradients(reduce: str, reshard: bool) -> list[tuple[list[str], list[str]]]:
    """Of steps of three micro-batches, of one and again of three, with evaluations between.

    Those that parameters ask for, and of the gradients that wait for the next micro-batch.
    """
    config = small_config(
        precision={"compute": "bf16", "reduce": reduce},
        parallel={"reshard_after_forward": reshard},
    )
    model = small_model(config, cpu_topology())
    (chunk,) = model.chunks
    add_up, sync = data_parallel.add_up_gradients, data_parallel.set_gradient_sync
    asked, waiting = set[str](), set[str]()

    def gathered() -> list[Tensor]:
        return [p for p in chunk.parameters() if not isinstance(p, DTensor)]

    def watch_types(*arguments: Any) -> None:
        add_up(*arguments)
        asked.update(str(p.grad_dtype) for p in gathered())

    def watch_gradients(*arguments: Any, **options: Any) -> None:
        waiting.update(str(p.grad.dtype) for p in gathered() if p.grad is not None)
        sync(*arguments, **options)

    found, gradients = [], []
    with pytest.MonkeyPatch.context() as patch:
        module = "megatron_bert.parallel.micro_batches"
        patch.setattr(f"{module}.add_up_gradients", watch_types)
        patch.setattr(f"{module}.set_gradient_sync", watch_gradients)
        for count in (3, 1, 3):
            batches = [packed_inputs(2, 2 * index) for index in range(count)]
            model.runner.train(batches, torch.ones(()))
            model.runner.evaluate(batches[:1])
            found.append((sorted(asked), sorted(waiting)))
            parameters = list(model.named_parameters().values())
            gradients.append([_whole_gradient(parameter) for parameter in parameters])
            for parameter in parameters:
                parameter.grad = None
            asked.clear()
            waiting.clear()
    assert all(map(torch.equal, gradients[0], gradients[2]))
    return found


@pytest.mark.parametrize(
    ("ranks", "reduce", "dtype"),
    [(1, "fp32", "torch.float32"), (1, "bf16", "torch.float32"), (2, "bf16", "torch.bfloat16")],
)
def test_gradients_of_several_micro_batches_are_had_in_the_type_of_their_sum(
    ranks: int, reduce: str, dtype: str
) -> None:
    types = run_ranks(ranks, _types_of_gradients, reduce, False)[0]
    several = ([dtype], [dtype])
    assert types == [several, (["torch.bfloat16"], []), several]


def test_where_weights_are_gathered_again_gradients_keep_their_type() -> None:
    for asked, _ in run_ranks(1, _types_of_gradients, "fp32", True)[0]:
        assert asked == ["torch.bfloat16"]

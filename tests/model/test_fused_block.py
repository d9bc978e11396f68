"""Models whose blocks the fused kernels compute, against the same without them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_bert.errors import ConfigError
from megatron_bert.model import attention, kernels
from megatron_bert.model.build import build_model
from tests.distributed_harness import run_ranks
from tests.model.lone_block import DROPOUT, held_bytes, lone_block, two_rows
from tests.small_model import (
    VOCABULARY,
    cpu_topology,
    packed_inputs,
    small_config,
    small_model,
)

pytest.importorskip("triton", reason="needs Triton (tests/run.sh --peers installs it)")

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(torch.cuda.is_available(), reason="blocks on the CPU need the interpreter"),
]


def _train(
    name: str, changes: dict[str, Any], sizes: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    """Loss and gradients of a step of two micro-batches, and what evaluation gives."""
    config = small_config(**{"kernels": name, **changes})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_check_device", lambda *_, **__: None)
        if name == "fused" and config.recompute != "selective":
            # As on a GPU: attention's kernels too.
            patch.setattr(attention, "has_kernel", lambda *_: True)
        model = small_model(config, cpu_topology(**sizes))
        batches = [packed_inputs(2), packed_inputs(2, first_row=2)]
        loss = model.runner.train(batches, torch.tensor(7.0))
        model.sum_shared_gradients()
        evaluated = model.runner.evaluate(batches)
    gradients = {name: p.grad for name, p in model.named_parameters().items()}
    whole = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in gradients.items()}
    return loss, whole, evaluated


MODERNBERT = {"architecture": "modernbert", "num_layers": 3, **DROPOUT}


@pytest.mark.parametrize(
    ("ranks", "changes", "sizes"),
    [
        (1, {"model": DROPOUT}, {}),
        (1, {"model": {"hidden_dropout": 0.0}}, {}),
        (1, {"model": MODERNBERT}, {}),
        (1, {"model": DROPOUT, "recompute": "full"}, {}),
        (1, {"model": DROPOUT, "recompute": "selective"}, {}),
        (2, {"model": DROPOUT}, {"tensor": 2}),
        (2, {"model": DROPOUT}, {"tensor": 2, "sequence_parallel": True}),
        (
            2,
            {"model": MODERNBERT, "recompute": "full"},
            {"tensor": 2, "sequence_parallel": True},
        ),
        (2, {"model": DROPOUT, "parallel": {"reshard_after_forward": True}}, {}),
        (
            2,
            {"model": DROPOUT, "recompute": "full", "parallel": {"reshard_after_forward": True}},
            {},
        ),
        # Nothing is dropped: a branch's gradient is the residual stream's.
        (2, {}, {"tensor": 2, "sequence_parallel": True}),
        # Each rank holds both keys' heads, and uses one.
        (4, {"model": {**DROPOUT, "num_query_groups": 2}}, {"tensor": 4}),
    ],
)
def test_losses_and_gradients_are_those_without_the_kernels(
    ranks: int, changes: dict[str, Any], sizes: dict[str, Any]
) -> None:
    _compare(ranks, changes, sizes)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zero_bubble"])
def test_so_they_are_through_a_pipeline(schedule: str) -> None:
    parallel = {"pipeline": 2, "pipeline_schedule": schedule}
    if schedule != "1f1b":
        parallel["virtual_stages"] = 2
    _compare(2, {"model": {**DROPOUT, "num_layers": 4}, "parallel": parallel}, {"pipeline": 2})


@pytest.mark.parametrize("sequence", [False, True])
def test_so_they_are_where_products_are_left_by_tensor_parallel_stages(sequence: bool) -> None:
    parallel = {"pipeline": 2, "pipeline_schedule": "zero_bubble", "virtual_stages": 2}
    changes = {"model": {**DROPOUT, "num_layers": 4}, "parallel": parallel}
    _compare(4, changes, {"pipeline": 2, "tensor": 2, "sequence_parallel": sequence})


def _compare(ranks: int, changes: dict[str, Any], sizes: dict[str, Any]) -> None:
    for found, expected in zip(
        run_ranks(ranks, _train, "fused", changes, sizes),
        run_ranks(ranks, _train, "torch", changes, sizes),
        strict=True,
    ):
        torch.testing.assert_close(found[0], expected[0])
        assert list(found[1]) == list(expected[1])
        for name, gradient in expected[1].items():
            torch.testing.assert_close(
                found[1][name],
                gradient,
                rtol=1e-4,
                atol=1e-5,
                msg=lambda m, name=name: f"{name}: {m}",
            )
        for ours, theirs in zip(found[2], expected[2], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


class _Operators(TorchDispatchMode):
    """Operators that made a row for each token, by name, but for products and what makes none.

    What Triton's interpreter copies beside has one dimension.
    """

    # Products, storage that is written by a kernel, and views.
    _OTHERS = ("mm", "addmm", "empty", "empty_like", "new_empty", "set_", "detach", "view")

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self._tokens = tokens
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().split("::")[1].split(".")[0]
        if name not in self._OTHERS and isinstance(result, Tensor) and result.dim() == 2:
            self.names += [name] if len(result) == self._tokens else []
        return result


def _architecture(biases: bool) -> str:
    return "retrievabert" if biases else "modernbert"


def _held_bytes(name: str, recompute: str, biases: bool) -> int:
    architecture = _architecture(biases)
    return held_bytes(*lone_block(name, recompute=recompute, architecture=architecture))


@pytest.mark.parametrize("biases", [True, False])
def test_neither_norms_nor_activations_are_kept(biases: bool) -> None:
    tokens, hidden, wide = 64, 32, 48
    kept = run_ranks(1, _held_bytes, "fused", "none", biases)[0]
    # Queries, attention's output, the residual stream behind it and behind the block; keys and
    # values; gate and up; mean and deviation of two norms; the four heads' sums of exponentials.
    assert kept == 4 * tokens * (4 * hidden + 2 * 8 + 2 * wide + 2 * 2 + 4)
    assert run_ranks(1, _held_bytes, "torch", "none", biases)[0] > 1.5 * kept


@pytest.mark.parametrize("name", ["fused", "torch"])
def test_with_full_recomputation_nothing_is_kept_but_the_block_s_output(name: str) -> None:
    assert run_ranks(1, _held_bytes, name, "full", True)[0] == 4 * 64 * 32


def _operators(biases: bool) -> tuple[list[str], list[str]]:
    block, dropout = lone_block("fused", architecture=_architecture(biases))
    layout = two_rows()
    x, y_grad = torch.randn(64, 32, requires_grad=True), torch.randn(64, 32)
    with _Operators(64) as forward:
        y = block(x, layout, dropout)
    with _Operators(64) as backward:
        y.backward(y_grad)
    return forward.names, backward.names


@pytest.mark.parametrize("biases", [True, False])
def test_between_products_and_kernels_nothing_is_copied_or_added(biases: bool) -> None:
    assert run_ranks(1, _operators, biases)[0] == ([], [])


class _Sums(TorchDispatchMode):
    """Counts operators that add gradients up, or lay weights end to end."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        if name in ("add_", "_foreach_add_", "cat"):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def _additions(layers: int) -> Counter[str]:
    """Of a backward pass whose gradients have sums already."""
    config = small_config(kernels="fused", model={**DROPOUT, "num_layers": layers})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_check_device", lambda *_, **__: None)
        patch.setattr(attention, "has_kernel", lambda *_: True)
        model = small_model(config, cpu_topology())
        sharded = model.runner.model  # type: ignore[attr-defined]
        with sharded.step(1, keeps_sums=True), _Sums() as sums:
            sharded.module(*packed_inputs(2)).loss.backward()
        assert all(p.grad.any() for p in sharded.units[0].parameters())
    return sums.counts


def test_gradients_are_added_to_their_sums_by_products_and_few_operators_else() -> None:
    few, more = (run_ranks(1, _additions, layers)[0] for layers in (2, 3))
    # A CPU adds the four products' gradients by themselves; biases' of attention, of norm and
    # network, and the first norm's are added together; biases of queries, keys and values, which
    # stand further apart than their sizes, are laid end to end.
    assert more - few == {"add_": 4, "_foreach_add_": 3, "cat": 1}


def _made_again(tensor: int, sequence: bool) -> list[int]:
    """How often a training step makes norms again."""
    from megatron_bert.model import fused_block, fused_feed_forward

    calls: list[int] = []
    again = fused_block.norm_again

    def counted(*arguments: Any) -> Tensor:
        calls.append(1)
        return again(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        for module in (fused_block, fused_feed_forward):
            patch.setattr(module, "norm_again", counted)
        _train("fused", {}, {"tensor": tensor, "sequence_parallel": sequence})
    return calls


@pytest.mark.parametrize(("tensor", "sequence"), [(1, False), (2, False), (2, True)])
def test_a_norm_is_made_again_once(tensor: int, sequence: bool) -> None:
    # Two micro-batches through two layers of two norms each.
    assert len(run_ranks(tensor, _made_again, tensor, sequence)[0]) == 2 * 2 * 2


def _refusal() -> str:
    with pytest.raises(ConfigError) as refused:
        build_model(small_config(kernels="fused"), VOCABULARY, cpu_topology())
    return str(refused.value)


def test_a_machine_without_cuda_is_refused_when_the_model_is_built() -> None:
    assert "kernels = fused: it computes on CUDA only" in run_ranks(1, _refusal)[0]

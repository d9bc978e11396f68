"""How many messages a step sends: what docs/parallelism.md states, counted."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_bert.model import kernels
from megatron_bert.training.optimizer import build_optimizer
from tests.distributed_harness import run_ranks
from tests.parallel.test_recomputation import kept_bytes
from tests.small_model import cpu_topology, packed_inputs, small_config, small_model

_KINDS = {
    "all_reduce": "all_reduce",
    "allreduce_": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "_allgather_base_": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
}


class _Messages(TorchDispatchMode):
    """Counts collectives, those of functional operators and of process groups, and their types."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.dtypes: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.name():
            kind = _KINDS[func.name().partition("::")[2]]
            self.counts[kind] += 1
            sent = {leaf.dtype for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)}
            self.dtypes[kind] = self.dtypes.get(kind, set()) | sent
        return func(*args, **(kwargs or {}))


def _messages(
    layers: int, micro_batches: int, sizes: dict[str, Any], changes: dict[str, Any]
) -> Counter[str]:
    config = small_config(model={"num_layers": layers}, **changes)
    model = small_model(config, cpu_topology(**sizes))
    inputs = [packed_inputs(2, first_row=2 * index) for index in range(micro_batches)]
    model.runner.train(inputs, torch.tensor(9.0))  # sets up what later steps find
    with _Messages() as messages:
        model.runner.train(inputs, torch.tensor(9.0))
    return messages.counts


def _per_block(sequence: bool, recompute: str, name: str) -> Counter[str]:
    kernels._check_device = lambda *_, **__: None  # `fused` by Triton's interpreter
    sizes = {"tensor": 2, "sequence_parallel": sequence}
    changes = {"recompute": recompute, "kernels": name}
    few, many = (_messages(layers, 1, sizes, changes) for layers in (1, 2))
    many.subtract(few)
    return +many


@pytest.mark.parametrize("name", ["torch", pytest.param("fused", marks=pytest.mark.peers)])
@pytest.mark.parametrize(
    ("sequence", "recompute", "expected"),
    [
        # Forward a sum after attention and one after the feed-forward network; the same backward.
        (False, "none", {"all_reduce": 4}),
        # Both sums again when the block is computed again, less the last one of each checkpoint,
        # whose result nothing backward asks for.
        (False, "full", {"all_reduce": 5}),
        # In the sums' place a gathering before and a scattering behind; backward a second
        # gathering of the input, which is kept only in part.
        (True, "none", {"all_gather": 6, "reduce_scatter": 4}),
        (True, "full", {"all_gather": 8, "reduce_scatter": 5}),
    ],
)
def test_messages_of_a_block_over_tensor_parallel_ranks(
    sequence: bool, recompute: str, expected: dict[str, int], name: str
) -> None:
    if name == "fused":
        pytest.importorskip("triton", reason="needs Triton (tests/run.sh --peers installs it)")
        if torch.cuda.is_available():
            pytest.skip("blocks on the CPU need the interpreter")
    if name == "fused" and recompute == "full":
        # The last sum too: what backward needs behind attention is kept by one function.
        last = "reduce_scatter" if sequence else "all_reduce"
        expected = {**expected, last: expected[last] + 1}
    assert run_ranks(2, _per_block, sequence, recompute, name)[0] == Counter(expected)


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_weights_are_gathered_and_gradients_reduced_once_a_step(micro_batches: int) -> None:
    counts = run_ranks(2, _messages, 3, micro_batches, {}, {})[0]
    units = 3 + 1  # the blocks, and what stands around them
    assert counts == Counter({"all_gather": units, "reduce_scatter": units})


def test_zero_3_gathers_each_block_twice_a_micro_batch_and_reduces_once_a_step() -> None:
    changes = {"parallel": {"reshard_after_forward": True}}
    counts = run_ranks(2, _messages, 3, 2, {}, changes)[0]
    # What stands around the blocks is needed first and last, and stays gathered in between.
    assert counts == Counter({"all_gather": 2 * 2 * 3 + 1, "reduce_scatter": 3 + 1})


def test_copies_of_the_shards_are_summed_once_a_step() -> None:
    counts = run_ranks(4, _messages, 3, 2, {"replicate": 2}, {})[0]
    assert counts["all_reduce"] == 3 + 1


def _gradient_types(sizes: dict[str, Any], precision: dict[str, str]) -> set[torch.dtype]:
    model = small_model(small_config(precision=precision), cpu_topology(**sizes))
    inputs = [packed_inputs(2, first_row=2 * index) for index in range(2)]
    with _Messages() as messages:
        model.runner.train(inputs, torch.tensor(9.0))
    # Of the sums those of the shards' copies: there is no tensor parallelism.
    return {t for kind in ("reduce_scatter", "all_reduce") for t in messages.dtypes.get(kind, ())}


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize(("ranks", "sizes"), [(2, {}), (4, {"replicate": 2})], ids=str)
def test_gradients_are_sent_in_fp32_and_in_bf16_on_request(
    ranks: int, sizes: dict[str, Any], compute: str
) -> None:
    default, bf16 = (
        run_ranks(ranks, _gradient_types, sizes, {"compute": compute, **reduce})[0]
        for reduce in ({}, {"reduce": "bf16"})
    )
    assert default == {torch.float32}
    assert bf16 == {torch.bfloat16}


def _messages_of_muon(sizes: dict[str, Any], compute: str) -> tuple[Counter[str], set[torch.dtype]]:
    config = small_config(optimizer={"name": "muon"}, precision={"compute": compute})
    model = small_model(config, cpu_topology(**sizes))
    optimizer = build_optimizer(config, model)
    model.runner.train([packed_inputs(2)], torch.tensor(9.0))
    with _Messages() as messages:
        optimizer.step(1e-3)
    return messages.counts, messages.dtypes.get("all_to_all", set())


@pytest.mark.parametrize(
    ("ranks", "sizes", "axes"),
    [(1, {}, 0), (2, {}, 1), (4, {"tensor": 2}, 2), (4, {"replicate": 2}, 2)],
    ids=str,
)
def test_muon_sends_matrices_there_and_back_once_an_axis_and_step(
    ranks: int, sizes: dict[str, Any], axes: int
) -> None:
    counts, dtypes = run_ranks(ranks, _messages_of_muon, sizes, "bf16")[0]
    # The sum is the norm's.
    assert counts == +Counter({"all_to_all": 2 * axes, "all_reduce": 1})
    assert dtypes <= {torch.bfloat16}


def test_sequence_parallelism_keeps_fewer_activations() -> None:
    changes = {"model": {"hidden_dropout": 0.2, "attention_dropout": 0.0, "num_layers": 4}}
    alone, shared = (run_ranks(4, _kept_bytes, changes, sequence)[0] for sequence in (False, True))
    assert shared < 0.75 * alone


def _kept_bytes(changes: dict[str, Any], sequence: bool) -> int:
    return kept_bytes(changes, tensor=4, sequence_parallel=sequence)

"""Every matrix comes together whole on one rank, and its parts find their way back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from megatron_bert.parallel.sharding import local_part
from megatron_bert.parallel.whole_matrices import MatrixOwners
from tests.distributed_harness import run_ranks
from tests.small_model import cpu_topology, small_config, small_model


def _owned(sizes: dict[str, Any]) -> tuple[set[str], set[str], list[int]]:
    """Go there and back on this rank: all matrices, those that it owns, their costs."""
    config, topology = small_config(model={"num_query_groups": 2}), cpu_topology(**sizes)
    matrices = small_model(config, topology).block_matrices()
    parts = {name: local_part(matrix).detach() for name, matrix in matrices.items()}
    owners = MatrixOwners(matrices, topology, torch.float32)
    gathered = owners.gather(parts)
    for name, matrix in matrices.items():
        whole = matrix.full_tensor() if isinstance(matrix, DTensor) else matrix
        if name in gathered:
            assert torch.equal(gathered[name], whole), name
    returned = owners.scatter({name: 2 * whole for name, whole in gathered.items()})
    assert returned.keys() == parts.keys()
    for name, part in parts.items():
        assert torch.equal(returned[name], 2 * part), name
    sides = [sorted(whole.shape) for whole in gathered.values()]
    costs = [4 * shorter**2 * longer + 2 * shorter**3 for shorter, longer in sides]
    return set(matrices), set(gathered), costs


@pytest.mark.parametrize(
    ("ranks", "sizes"),
    [
        (1, {}),
        (3, {}),
        (2, {"tensor": 2}),
        (4, {"tensor": 4}),
        (4, {"tensor": 2}),
        (4, {"replicate": 2}),
        (4, {"replicate": 2, "tensor": 2}),
        (6, {"tensor": 2}),
        (8, {"replicate": 2, "tensor": 2}),
    ],
    ids=str,
)
def test_each_matrix_is_whole_on_one_rank_and_every_rank_gets_its_parts_back(
    ranks: int, sizes: dict[str, Any]
) -> None:
    results = run_ranks(ranks, _owned, sizes)
    names = results[0][0]
    assert len(names) == 14
    owned = [name for _, mine, _ in results for name in mine]
    assert sorted(owned) == sorted(names)
    loads = [sum(costs) for _, _, costs in results]
    largest = max(cost for _, _, costs in results for cost in costs)
    assert max(loads) - min(loads) <= largest


def _more_ranks_than_rows() -> int:
    topology = cpu_topology()
    config = small_config(model={"num_layers": 1, "hidden_size": 4, "num_attention_heads": 4})
    matrices = small_model(config, topology).block_matrices()
    parts = {name: local_part(matrix).detach().bfloat16() for name, matrix in matrices.items()}
    owners = MatrixOwners(matrices, topology, torch.bfloat16)
    gathered = owners.gather(parts)
    assert {whole.dtype for whole in gathered.values()} <= {torch.bfloat16}
    for name, part in owners.scatter(gathered).items():
        assert torch.equal(part, parts[name]), name
    return len(gathered)


def test_ranks_that_hold_no_row_of_a_matrix_or_own_none_take_part() -> None:
    assert sum(run_ranks(8, _more_ranks_than_rows)) == 7

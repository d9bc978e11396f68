"""What plans take from the code that trains: both have it from the same place."""

from __future__ import annotations

import pytest
import torch

from megatron_bert.config.parameters import rank_parameters
from megatron_bert.config.pipeline_schedules import ScheduleName
from megatron_bert.config.pipeline_stages import stage_layers
from megatron_bert.distributed import device_facts
from megatron_bert.model import attention
from megatron_bert.parallel import vocabulary
from megatron_bert.planner import activations
from megatron_bert.planner.job import Work
from megatron_bert.planner.layouts import Layout, Split
from megatron_bert.planner.rank_parts import rank_parts
from tests.planner.jobs import VOCABULARY, job


@pytest.mark.parametrize("head_dim", [8, 16, 32, 48, 64, 128, 256])
def test_plans_count_on_an_attention_kernel_where_training_has_one(
    head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(device_facts, "find_spec", lambda _: object())
    size = f"model.hidden_size={16 * head_dim}"
    heads = ("model.num_attention_heads=16", "model.num_query_groups=16")
    planned = job(1, size, *heads).has_kernel
    assert planned == attention.has_kernel(torch.device("cuda"), torch.bfloat16, head_dim)


def test_plans_count_as_many_logits_as_training_holds() -> None:
    for name in ("logits_per_chunk", "CPU_SOFTMAX_ELEMENTS"):
        assert getattr(activations, name) == getattr(vocabulary, name)


@pytest.mark.parametrize(("compute", "size", "products"), [("bf16", 2, 0), ("fp32", 4, 1)])
def test_plans_count_the_table_s_product_where_it_stands_beside_its_sum(
    compute: str, size: int, products: int
) -> None:
    planned = job(1, f"precision.compute={compute}")
    work = Work(planned, Split(1, False, 1, "1f1b", 1, 1), "none", 512, planned.spans[0])
    chunk = min(work.masked, activations.logits_per_chunk("cuda") // VOCABULARY)
    assert chunk < work.masked
    product = products * VOCABULARY * planned.config.model.hidden_size
    assert activations.head_bytes(work).logits == size * (chunk * VOCABULARY + product)


@pytest.mark.parametrize(
    "shape", [(), ("model.architecture=modernbert", "model.num_query_groups=24")], ids=len
)
@pytest.mark.parametrize(
    ("tensor", "pipeline", "schedule"),
    [(1, 1, "1f1b"), (2, 1, "1f1b"), (4, 2, "1f1b"), (1, 4, "1f1b"), (2, 2, "interleaved")],
)
def test_plans_divide_the_blocks_over_ranks_as_training_does(
    shape: tuple[str, ...], tensor: int, pipeline: int, schedule: ScheduleName
) -> None:
    planned = job(tensor * pipeline, *shape)
    split = Split(tensor, False, pipeline, schedule, 2 if schedule == "interleaved" else 1, 1)
    config = Layout(split, 4096, "none").put_into(planned.config)
    layers = stage_layers(config, VOCABULARY)
    held = [part.layers for part in rank_parts(planned, split)]
    assert held == [sum(map(len, layers[rank::pipeline])) for rank in range(pipeline)]
    assert rank_parts(planned, split) == rank_parameters(config, VOCABULARY)

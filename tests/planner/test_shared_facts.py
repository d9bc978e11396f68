"""What plans take from the code that trains: both have it from the same place."""

from __future__ import annotations

import pytest
import torch

from megatron_bert.model import attention
from megatron_bert.parallel import vocabulary
from megatron_bert.planner import activations
from tests.planner.jobs import job


@pytest.mark.parametrize("head_dim", [8, 16, 32, 48, 64, 128, 256])
def test_plans_count_on_an_attention_kernel_where_training_has_one(
    head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(attention, "find_spec", lambda _: object())
    size = f"model.hidden_size={16 * head_dim}"
    heads = ("model.num_attention_heads=16", "model.num_query_groups=16")
    planned = job(1, size, *heads).has_kernel
    assert planned == attention.has_kernel(torch.device("cuda"), torch.bfloat16, head_dim)


def test_plans_count_as_many_logits_as_training_holds() -> None:
    for name in ("LOGITS_PER_CHUNK", "CPU_SOFTMAX_ELEMENTS"):
        assert getattr(activations, name) == getattr(vocabulary, name)

"""On one GPU: an update is asked for and not waited for."""

from __future__ import annotations

import pytest
import torch

from megatron_bert.distributed.launch import process_group
from megatron_bert.distributed.topology import Topology
from megatron_bert.training.optimizer import build_optimizer
from tests.optim.shards import RATE
from tests.small_model import small_config, small_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


# Which is said when a mode is first set, whichever: it does not see collectives, for one.
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_update_does_not_wait_for_the_device(name: str) -> None:
    device = torch.device("cuda", 0)
    with process_group(device, 60.0):
        config = small_config(optimizer={"name": name, "clip_grad": 0.5})
        model = small_model(config, Topology.build(device))
        optimizer = build_optimizer(config, model)
        loss = torch.ones((), device=device)
        # Libraries may wait when they are first called.
        for mode in ("default", "error"):
            for parameter in model.named_parameters().values():
                parameter.grad = torch.ones_like(parameter)
            torch.cuda.set_sync_debug_mode(mode)
            try:
                optimizer.step(RATE, loss)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert optimizer.updates == 2

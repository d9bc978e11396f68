"""Modules that stand in for optional packages which are not installed, or need a GPU."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor


def install(patch: pytest.MonkeyPatch, name: str, **attributes: Any) -> ModuleType:
    """Have a module of this name found and imported, with these attributes, until the test ends.

    The packages that it lies in are made where they are not there.
    """
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, is_package=True)
    vars(module).update(attributes)
    patch.setitem(sys.modules, name, module)
    parent, _, last = name.rpartition(".")
    if parent:
        if not isinstance(sys.modules.get(parent), ModuleType):
            install(patch, parent)
        patch.setattr(sys.modules[parent], last, module, raising=False)
    return module


class FusedAdam(torch.optim.Optimizer):
    """Apex's optimizer, in the form that CUDA graphs can capture, written out."""

    def __init__(self, tensors: list[Tensor], lr: float, **options: Any) -> None:
        assert options.pop("capturable")
        assert options.pop("adam_w_mode")
        # Theirs loses updates, or writes out of bounds, where there are.
        assert all(shard.numel() for shard in tensors)
        super().__init__(tensors, {"lr": torch.tensor(lr), **options})
        self.overflow = torch.zeros(1, dtype=torch.int32)

    @torch.no_grad()
    def step(self, grad_scaler: Any) -> None:  # type: ignore[override]
        for group in self.param_groups:
            # By what was found in the update before: this one's comes next.
            group["step"] += (self.overflow != 1).to(torch.int)
            device = group["params"][0].device
            self.overflow.copy_(grad_scaler._check_inf_per_device(self)[device])
            inverse = grad_scaler._get_scale_async().double().reciprocal().float()
            if self.overflow:
                continue
            assert group["step"].dtype == torch.int32
            beta1, beta2 = group["betas"]
            for shard in group["params"]:
                gradient, state = shard.grad * inverse, self.state[shard]
                mean = state["exp_avg"].lerp_(gradient, 1 - beta1) / (1 - beta1 ** group["step"])
                square = (
                    state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                )
                square = square / (1 - beta2 ** group["step"])
                change = mean / (square.sqrt() + group["eps"]) + group["weight_decay"] * shard
                shard -= group["lr"] * change

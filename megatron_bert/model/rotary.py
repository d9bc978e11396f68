"""Rotary position embeddings (Su et al. 2021, "RoFormer", section 3.4.2).

Shape suffixes: B rows, S slots, H heads, K head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """How far the slots' positions rotate the channels of queries and keys.

    Channel i is turned together with channel i + K / 2, as Hugging Face's models do it.

    Attributes:
        cos_B1SK: fp32 [B, 1, S, K].
        sin_B1SK: fp32 [B, 1, S, K].
    """

    cos_B1SK: Tensor
    sin_B1SK: Tensor

    @classmethod
    def from_positions(cls, positions_BS: Tensor, head_dim: int, theta: float) -> Rotation:
        """Positions restart at 0 in each segment; `theta` is the base of the wavelengths."""
        channels = torch.arange(0, head_dim, 2, device=positions_BS.device, dtype=torch.float32)
        angles = positions_BS[:, None, :, None].float() * theta ** (-channels / head_dim)
        angles = torch.cat([angles, angles], dim=-1)
        return cls(angles.cos(), angles.sin())

    def apply(self, x_BHSK: Tensor) -> Tensor:
        """[B, H, S, K] -> [B, H, S, K], computed in fp32."""
        x = x_BHSK.float()
        first, second = x.chunk(2, dim=-1)
        turned = x * self.cos_B1SK + torch.cat([-second, first], dim=-1) * self.sin_B1SK
        return turned.to(x_BHSK.dtype)

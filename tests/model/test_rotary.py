from __future__ import annotations

import math

import torch

from megatron_bert.model.rotary import Rotation


def test_scores_of_turned_queries_and_keys_depend_on_their_distance_alone() -> None:
    random = torch.Generator().manual_seed(0)
    q, k = (torch.randn(8, generator=random).expand(1, 1, 10, 8) for _ in range(2))
    rotation = Rotation.from_positions(torch.arange(10)[None], head_dim=8, theta=100.0)
    scores = (rotation.apply(q) @ rotation.apply(k).mT)[0, 0]
    for distance in range(-9, 10):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert not torch.allclose(scores[0], scores[0, :1])


def test_channels_are_turned_in_pairs_by_waves_from_one_to_theta() -> None:
    rotation = Rotation.from_positions(torch.tensor([[0, 3]]), head_dim=4, theta=100.0)
    turned = rotation.apply(torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(1, 1, 2, 4))[0, 0]
    assert turned[0].tolist() == [1, 1, 0, 0]
    angles = (3.0, 3.0 * 100.0**-0.5)
    expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
    torch.testing.assert_close(turned[1], torch.tensor(expected))


def test_bf16_is_turned_in_fp32() -> None:
    rotation = Rotation.from_positions(torch.arange(64)[None], head_dim=8, theta=100.0)
    x = torch.randn(1, 2, 64, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    torch.testing.assert_close(rotation.apply(x), rotation.apply(x.float()).bfloat16())

from __future__ import annotations

import pytest
import torch

from megatron_bert.parallel.random import (
    dropout_keys,
    element_draws,
    fill_normal,
    hash_dropout,
    key32,
    mix32,
    vector_draws,
)

ROWS = torch.tensor([3, 11, 2**40 + 3])


CPU = torch.device("cpu")


def _drop(x: torch.Tensor, probability: float, keys: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Drop from rows [N, vectors, C]."""
    numbers = torch.arange(x.shape[1]) + first
    draws = vector_draws(keys[:, None], numbers)
    return hash_dropout(x, probability, draws, element_draws(x.shape[2], CPU))


def _masks(rows: torch.Tensor, probability: float = 0.3, site: str = "x") -> torch.Tensor:
    keys = dropout_keys(rows, seed=1, site=site, layers=range(2))
    return _drop(torch.ones(len(rows), 64, 32), probability, keys[1]) != 0


def test_the_hash_is_one_to_one() -> None:
    numbers = torch.cat([torch.arange(2**16), torch.arange(2**32 - 2**16, 2**32)])
    assert mix32(numbers).unique().numel() == numbers.numel()
    assert mix32(numbers).min() >= 0
    assert mix32(numbers).max() < 2**32


def test_keys_are_the_same_on_every_machine() -> None:
    assert key32(1234, "embeddings") == 3858534831


def test_a_rows_dropout_does_not_depend_on_the_rows_beside_it() -> None:
    together = _masks(ROWS)
    alone = torch.cat([_masks(row[None]) for row in ROWS])
    assert torch.equal(together, alone)


def test_rows_layers_and_sites_have_unrelated_dropout() -> None:
    keys = dropout_keys(ROWS, seed=1, site="x", layers=range(2))
    ones = torch.ones(1, 2**10, 2**8)
    masks = [_drop(ones, 0.5, key[None]) != 0 for key in keys.flatten()]
    masks.append(_drop(ones, 0.5, dropout_keys(ROWS, 1, "y", range(1))[0, :1]) != 0)
    flat = torch.stack(masks).flatten(1).double() - 0.5
    agreement = (flat @ flat.T) / flat.shape[1] * 4
    # 2^18 fair coins agree beyond chance by at most 5 standard deviations.
    assert (agreement - torch.eye(len(flat))).abs().max() < 5 / 2**9


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(probability: float) -> None:
    keys = dropout_keys(torch.arange(16), seed=5, site="x", layers=range(1))[0]
    y = _drop(torch.ones(16, 256, 64), probability, keys)
    dropped = (y == 0).double().mean()
    deviation = (probability * (1 - probability) / y.numel()) ** 0.5
    assert abs(dropped - probability) < 5 * deviation
    assert y.max() == pytest.approx(1 / (1 - probability))


def test_a_part_of_a_row_gets_its_part_of_the_mask() -> None:
    keys = dropout_keys(ROWS, seed=1, site="x", layers=range(1))[0]
    x = torch.ones(3, 8, 16)
    whole = _drop(x, 0.5, keys)
    part = _drop(x[:, 4:], 0.5, keys, first=4)
    assert torch.equal(part, whole[:, 4:])


def test_no_dropout_returns_the_input_itself() -> None:
    x = torch.ones(3, 4)
    assert hash_dropout(x, 0.0, torch.zeros(3), torch.zeros(4)) is x


def test_channels_and_tokens_are_dropped_independently() -> None:
    keys = dropout_keys(ROWS[:1], seed=2, site="x", layers=range(1))[0]
    kept = _drop(torch.ones(1, 4096, 1024), 0.1, keys)[0] != 0
    z = (kept.double() - 0.9) / 0.3
    for table in (z, z.T):
        count = table.shape[0]
        correlation = table.T @ table / count
        correlation.fill_diagonal_(0.0)
        # Pairs of fair coins: 1 / sqrt(count) on average. A sum of two hashes that were mixed too
        # little would show as pairs that agree throughout.
        assert correlation.square().mean().sqrt() * count**0.5 < 1.02
        assert correlation.abs().max() < 0.4
        shares = table.mean(0)
        assert shares.square().mean().sqrt() * count**0.5 < 1.2


def test_words_of_32_bits_drop_the_same() -> None:
    """What CUDA computes with, whose integers wrap like the CPU's."""
    keys = dropout_keys(ROWS, seed=1, site="x", layers=range(1))[0]
    draws, elements = vector_draws(keys[:, None], torch.arange(256)), element_draws(512, CPU)
    x = torch.ones(3, 256, 512)
    for probability in (0.1, 0.5, 0.9):
        words = [t.to(torch.int32) for t in (draws, elements)]
        expected = hash_dropout(x, probability, draws, elements)
        assert torch.equal(hash_dropout(x, probability, *words), expected)


def _normal(shape: tuple[int, ...], **changes: object) -> torch.Tensor:
    arguments: dict[str, object] = {
        "global_shape": shape,
        "offset": (0,) * len(shape),
        "std": 0.02,
        "seed": 3,
        "name": "w",
    }
    shard = torch.empty(shape)
    fill_normal(shard, **(arguments | changes))  # type: ignore[arg-type]
    return shard


def test_shards_filled_apart_are_the_whole_to_the_bit() -> None:
    whole = _normal((37, 53))
    rows = [
        _normal((end - begin, 53), global_shape=(37, 53), offset=(begin, 0))
        for begin, end in ((0, 13), (13, 14), (14, 37))
    ]
    columns = [
        _normal((37, end - begin), global_shape=(37, 53), offset=(0, begin))
        for begin, end in ((0, 7), (7, 53))
    ]
    assert torch.equal(torch.cat(rows), whole)
    assert torch.equal(torch.cat(columns, 1), whole)


def test_initial_weights_are_normal_and_differ_by_name_and_seed() -> None:
    x = _normal((512, 512))
    z = (x / 0.02).double()
    n = z.numel()
    assert abs(z.mean()) < 5 / n**0.5
    assert abs(z.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 5 * (96 / n) ** 0.5
    neighbours = (z[:, 1:] * z[:, :-1]).mean()
    assert abs(neighbours) < 5 / n**0.5
    for changed in (_normal((512, 512), name="v"), _normal((512, 512), seed=4)):
        assert abs((z * changed / 0.02).mean()) < 5 / n**0.5


def test_an_empty_shard_is_left_alone() -> None:
    assert _normal((0, 4), global_shape=(2, 4), offset=(2, 0)).numel() == 0

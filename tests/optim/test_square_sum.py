from __future__ import annotations

import pytest
import torch

from megatron_bert.optim.square_sum import square_sum


@pytest.mark.parametrize("shape", [(4_000, 1_000), (200_000,), (3, 5)])
def test_no_number_of_elements_makes_a_norm_too_small(shape: tuple[int, ...]) -> None:
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = square_sum([gradient, gradient])
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, 2 * gradient.double().square().sum(), rtol=3e-7, atol=0.0)


def test_a_rank_without_rows_of_a_tensor_adds_nothing_for_it() -> None:
    gradients = [torch.empty(0, 4), torch.empty(0), torch.tensor([[3.0, 4.0]])]
    assert square_sum(gradients).item() == 25.0


def test_what_is_not_finite_shows() -> None:
    assert square_sum([torch.tensor([[1.0, torch.inf]])]).isinf()
    assert square_sum([torch.tensor([[1.0, torch.nan]]), torch.ones(2)]).isnan()

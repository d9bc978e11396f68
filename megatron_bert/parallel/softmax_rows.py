"""Softmax of rows of logits over a vocabulary, and its gradient: by PyTorch or our kernels.

Shape suffixes: n tokens, V this rank's part of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_bert.config.arithmetic import ceil_div
from megatron_bert.distributed.device_facts import facts_of

_COLUMNS, _WARPS = 4096, 8


@dataclass(frozen=True)
class Statistics:
    """Statistics of each row over this rank's part of the vocabulary; fp32.

    Attributes:
        largest_n: the largest logit.
        log_sum_n: the logarithm of the sum of exponentials.
        label_n: the label's logit, 0 where another rank has it.
    """

    largest_n: Tensor
    log_sum_n: Tensor
    label_n: Tensor


class SoftmaxRows(Protocol):
    """Rows of logits."""

    @property
    def statistics(self) -> Statistics:
        """What all ranks must know of each other's parts."""
        ...

    def write_gradient(self, log_sum_n: Tensor, weights_n: Tensor) -> Tensor:
        """Write (softmax - one-hot label) x weight over the logits, in their type.

        Args:
            log_sum_n: fp32 [n], as in `Statistics`, but over the whole vocabulary.
            weights_n: fp32 [n].

        Returns:
            Its sum over the rows, fp32 [V].
        """
        ...


def has_softmax_kernels(logits_nV: Tensor) -> bool:
    """Whether our kernels can take these logits."""
    return facts_of(logits_nV.device).runs_our_kernels


def softmax_rows(logits_nV: Tensor, labels_n: Tensor) -> SoftmaxRows:
    """Compute the statistics of rows of logits, by our kernels where these can run.

    Args:
        logits_nV: [n, V] dense, which `write_gradient` writes to.
        labels_n: int [n], counted from this part's first id; outside the part on the ranks that do
            not have it.
    """
    rows = _KernelRows if has_softmax_kernels(logits_nV) else _PlainRows
    return rows(logits_nV, labels_n)


class _PlainRows:
    """By PyTorch, in few passes over the logits.

    The fused softmax reads them once in their own dtype, into an fp32 copy. Its normaliser is
    recovered from the largest logit, whose probability is at least 1 / V, far from underflow.
    """

    def __init__(self, logits_nV: Tensor, labels_n: Tensor) -> None:
        self._logits_nV = logits_nV
        self._present_n = (labels_n >= 0) & (labels_n < logits_nV.shape[1])
        self._labels_n = labels_n.masked_fill(~self._present_n, 0).long()
        self._softmax_nV = logits_nV.softmax(1, dtype=torch.float32)
        largest_n = logits_nV.amax(1).float()
        label_n = logits_nV.gather(1, self._labels_n[:, None])[:, 0].float()
        self.statistics = Statistics(
            largest_n,
            largest_n - self._softmax_nV.amax(1).log(),
            label_n.masked_fill(~self._present_n, 0.0),
        )

    def write_gradient(self, log_sum_n: Tensor, weights_n: Tensor) -> Tensor:
        scale_n = (self.statistics.log_sum_n - log_sum_n).exp() * weights_n
        at_label_n = self._softmax_nV.gather(1, self._labels_n[:, None])[:, 0] * scale_n
        at_label_n -= weights_n * self._present_n
        grad_nV = self._softmax_nV.mul_(scale_n[:, None])
        grad_nV.scatter_(1, self._labels_n[:, None], at_label_n[:, None])
        self._logits_nV.copy_(grad_nV)
        return grad_nV.sum(0)


class _KernelRows:
    """By Triton kernels: logits are read twice and written once, without an fp32 copy."""

    def __init__(self, logits_nV: Tensor, labels_n: Tensor) -> None:
        from megatron_bert.parallel import softmax_kernels

        assert logits_nV.is_contiguous()
        self._logits_nV, self._labels_n = logits_nV, labels_n.int()
        n, V = logits_nV.shape
        self.statistics = Statistics(
            *(logits_nV.new_empty(n, dtype=torch.float32) for _ in range(3))
        )
        softmax_kernels.softmax_statistics_kernel[(n,)](
            logits_nV, self._labels_n, self.statistics.largest_n, self.statistics.log_sum_n,
            self.statistics.label_n, V, COLUMNS=_COLUMNS, num_warps=_WARPS, enable_fp_fusion=True,
        )  # fmt: skip

    def write_gradient(self, log_sum_n: Tensor, weights_n: Tensor) -> Tensor:
        from megatron_bert.parallel import softmax_kernels
        from megatron_bert.parallel.column_sums import column_sums

        n, V = self._logits_nV.shape
        softmax_kernels.softmax_gradient_kernel[(n * ceil_div(V, _COLUMNS),)](
            self._logits_nV, self._labels_n, log_sum_n.contiguous(), weights_n.contiguous(), V,
            COLUMNS=_COLUMNS, num_warps=_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
        return column_sums(self._logits_nV, torch.float32)

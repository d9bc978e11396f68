"""Embedding and cross-entropy over a vocabulary that is split over the tensor-parallel ranks.

Shape suffixes: N tokens, T of them on this rank, D hidden, V this rank's part of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_bert.config.logits import CPU_SOFTMAX_ELEMENTS, LOGITS_PER_CHUNK, logits_per_chunk
from megatron_bert.distributed.collectives import (
    all_reduce,
    reduce_from_group,
    reduce_scatter_from_group,
)
from megatron_bert.distributed.topology import TensorParallelGroup
from megatron_bert.parallel.gradient_sums import (
    add_weight_product,
    embedding_gradient,
    gradient_dtype,
    scaled,
    scaled_gradient,
    weight_product,
)
from megatron_bert.parallel.sharding import local_part, make_parameter
from megatron_bert.parallel.softmax_rows import Statistics, has_softmax_kernels, softmax_rows


class VocabParallelEmbedding(nn.Module):
    """Embedding table whose rows are split over the ranks."""

    def __init__(self, vocab_size: int, hidden_size: int, tp: TensorParallelGroup) -> None:
        super().__init__()
        self.weight = make_parameter((vocab_size, hidden_size), tp, 0)
        self.group = tp.group
        self.shards_tokens = tp.shards_tokens
        self.first_id = vocab_size // tp.size * tp.rank

    def forward(self, tokens_N: Tensor) -> Tensor:
        """[N] ids of the micro-batch's tokens -> [T, D], the tokens that this rank holds."""
        weight_VD = local_part(self.weight)
        if self.group.size() == 1:
            return _looked_up(tokens_N, weight_VD)
        local_N = tokens_N - self.first_id
        absent_N = (local_N < 0) | (local_N >= weight_VD.shape[0])
        hidden_ND = _looked_up(local_N.masked_fill(absent_N, 0), weight_VD)
        hidden_ND = hidden_ND.masked_fill(absent_N[:, None], 0.0)
        reduce = reduce_scatter_from_group if self.shards_tokens else reduce_from_group
        return reduce(hidden_ND, self.group)


def _looked_up(ids_N: Tensor, table_VD: Tensor) -> Tensor:
    """[N] ids -> [N, D], rows of the table."""
    hidden_ND: Tensor = _Lookup.apply(table_VD, ids_N)  # type: ignore[no-untyped-call]
    return hidden_ND


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table_VD: Tensor, ids_N: Tensor) -> Tensor:
        ctx.known = table_VD
        ctx.save_for_backward(ids_N)
        return F.embedding(ids_N, table_VD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        (ids_N,) = ctx.saved_tensors
        return embedding_gradient(grads[0].contiguous(), ids_N, ctx.known), None


def vocab_parallel_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    labels_N: Tensor,
    weights_N: Tensor,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor]:
    """Project onto the vocabulary and sum the weighted cross-entropy, never gathering the softmax.

    Projection and loss are one function, so that the fp32 logits of a micro-batch are never in
    memory: chunks of tokens are projected and, while their logits are at hand, the gradients of
    hidden states, table and bias are computed too, not recomputed backward.

    Args:
        hidden_ND: [N, D], the same on every rank of the group.
        weight_VD: this rank's rows of the table.
        bias_V: this rank's part of the bias.
        labels_N: int [N], ids in the whole vocabulary.
        weights_N: float [N], 0 for unused slots.
        group: the tensor-parallel group.

    Returns:
        The summed loss (fp32, scalar), and for each token its weight where its label has the
        largest logit, else 0 (fp32 [N], no gradient); both over the whole vocabulary.
    """
    with_grad = torch.is_grad_enabled() and hidden_ND.requires_grad
    return _ProjectedCrossEntropy.apply(  # type: ignore[no-any-return,no-untyped-call]
        hidden_ND, weight_VD, bias_V, labels_N, weights_N, group, with_grad
    )


class _ProjectedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor,
        labels_N: Tensor,
        weights_N: Tensor,
        group: dist.ProcessGroup,
        with_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        count, vocab = hidden_ND.shape[0], weight_VD.shape[0]
        chunk = max(1, logits_per_chunk(hidden_ND.device.type) // vocab)
        first_id = group.rank() * vocab
        loss = hidden_ND.new_zeros((), dtype=torch.float32)
        correct_N = hidden_ND.new_empty(count, dtype=torch.float32)
        gradients = _HeadGradients(hidden_ND, weight_VD) if with_grad else None
        for part in _slices(0, count, chunk):
            logits_nV = F.linear(hidden_ND[part], weight_VD, bias_V)
            for rows, slice_nV in _softmax_slices(part, logits_nV):
                weights_n = weights_N[rows].float()
                softmax = softmax_rows(slice_nV, labels_N[rows] - first_id)
                whole = _of_all_ranks(softmax.statistics, group)
                loss += ((whole.log_sum_n - whole.label_n) * weights_n).sum()
                correct_N[rows] = (whole.label_n >= whole.largest_n) * weights_n
                if gradients is not None:
                    gradients.bias_V += softmax.write_gradient(whole.log_sum_n, weights_n)
            if gradients is not None:
                gradients.add(part, logits_nV)
        if gradients is not None:
            # Every rank projects the same hidden states onto its own part of the vocabulary.
            hidden_grad = gradients.hidden_ND
            if group.size() > 1:
                hidden_grad = all_reduce(hidden_grad, group)
            ctx.known = weight_VD
            ctx.save_for_backward(hidden_grad, gradients.weight_VD, gradients.bias_V)
        ctx.mark_non_differentiable(correct_N)
        return loss, correct_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V = ctx.saved_tensors
        # Nobody else holds the saved gradients: scaling them in place saves a pass and a copy.
        scale = grads[0].float().view(1)
        table_grad = scaled_gradient(ctx.known, weight_VD, scale)
        hidden_grad, bias_grad = scaled(hidden_ND, scale), scaled(bias_V, scale)
        return hidden_grad, table_grad, bias_grad, None, None, None, None


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


def _softmax_slices(part: slice, logits_nV: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Cut a chunk's logits into slices of tokens; each comes with its place in the micro-batch."""
    count, vocab = logits_nV.shape
    # PyTorch's softmax makes a copy in fp32, our kernels do not.
    most = LOGITS_PER_CHUNK if logits_nV.is_cuda else CPU_SOFTMAX_ELEMENTS
    size = count if has_softmax_kernels(logits_nV) else max(1, most // vocab)
    for rows in _slices(0, count, size):
        yield slice(part.start + rows.start, part.start + rows.stop), logits_nV[rows]


class _HeadGradients:
    """Accumulates the gradients of the projection over chunks of tokens."""

    def __init__(self, hidden_ND: Tensor, weight_VD: Tensor) -> None:
        self._source_ND, self._table_VD = hidden_ND, weight_VD
        self.hidden_ND = torch.empty_like(hidden_ND)
        self.bias_V = weight_VD.new_zeros(weight_VD.shape[0], dtype=torch.float32)
        self.weight_VD = weight_VD.new_zeros(0)

    def add(self, part: slice, logits_grad_nV: Tensor) -> None:
        """Add one chunk's share; several are added in fp32, as bf16 would lose the small ones."""
        self.hidden_ND[part] = logits_grad_nV @ self._table_VD
        source_nD = self._source_ND[part]
        if self.weight_VD.numel() > 0:
            self.weight_VD = self.weight_VD.float()
            add_weight_product(self.weight_VD, logits_grad_nV, source_nD)
            return
        is_all = len(source_nD) == len(self._source_ND)
        unrounded = not is_all or gradient_dtype(self._table_VD) == torch.float32
        self.weight_VD = weight_product(logits_grad_nV, source_nD, unrounded=unrounded)


def _of_all_ranks(here: Statistics, group: dist.ProcessGroup) -> Statistics:
    """The statistics over the whole vocabulary."""
    if group.size() == 1:
        return here
    largest_n, reference_n = all_reduce(torch.stack([here.largest_n, here.log_sum_n]), group, "max")
    sums_2n = torch.stack([(here.log_sum_n - reference_n).exp(), here.label_n])
    sum_n, label_n = all_reduce(sums_2n, group)
    return Statistics(largest_n, reference_n + sum_n.log(), label_n)

"""Attention over packed rows, by every implementation available.

Shape suffixes: B rows, S slots, N = B x S, H query heads, G key/value heads, K head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_bert.benchmark.kernels.measure import Compute, Piece, made_at_first_call
from megatron_bert.benchmark.rows import keys_per_query
from megatron_bert.config.schema import ModelConfig
from megatron_bert.data.batch import Batch
from megatron_bert.model.attention import PackedLayout, attend, has_kernel, written_out_attention
from megatron_bert.parallel.random import dropout_keys


@dataclass(frozen=True)
class _Case:
    """Queries, keys and values [B, S, heads, K], as the linear layers give them.

    Attributes:
        q_BSHK: queries.
        k_BSGK: keys.
        v_BSGK: values.
        layout: the segments, with the bias that separates them.
        ends: int32 [segments + 1], 0 and then where each segment of all rows ends.
        longest: slots of the longest segment.
        dropout: of attention weights.
        keys_B: random keys of dropout.
    """

    q_BSHK: Tensor
    k_BSGK: Tensor
    v_BSGK: Tensor
    layout: PackedLayout
    ends: Tensor
    longest: int
    dropout: float
    keys_B: Tensor

    @classmethod
    def make(
        cls,
        model: ModelConfig,
        batch: Batch,
        dropout: float,
        dtype: torch.dtype,
        device: torch.device,
    ) -> _Case:
        positions_BS = batch.positions_BS.to(device).long()
        rows, slots = positions_BS.shape
        heads = (model.num_attention_heads, model.num_query_groups, model.num_query_groups)
        q, k, v = (
            torch.randn(
                rows, slots, count, model.head_dim, dtype=dtype, device=device
            ).requires_grad_()
            for count in heads
        )
        begins = torch.nonzero(positions_BS.flatten() == 0).flatten()
        ends = torch.cat([begins, begins.new_tensor([rows * slots])])
        return cls(
            q,
            k,
            v,
            layout=PackedLayout.from_positions(positions_BS).with_bias(dtype),
            ends=ends.int(),
            longest=int(ends.diff().max()),
            dropout=dropout,
            keys_B=dropout_keys(torch.arange(rows, device=device), 0, "benchmark", range(1))[0],
        )

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tensors that get a gradient."""
        return self.q_BSHK, self.k_BSGK, self.v_BSGK

    def heads_first(self) -> tuple[Tensor, Tensor, Tensor]:
        """[B, heads, S, K] each."""
        q, k, v = (x.transpose(1, 2) for x in self.inputs)
        return q, k, v

    def all_slots(self) -> tuple[Tensor, Tensor, Tensor]:
        """[N, heads, K] each: rows concatenated, the layout for segments of variable length."""
        q, k, v = (x.flatten(0, 1) for x in self.inputs)
        return q, k, v


def own_attention(
    model: ModelConfig, batch: Batch, dropout: float, dtype: torch.dtype, device: torch.device
) -> tuple[tuple[Tensor, ...], Compute]:
    """Queries, keys and values, and attention as training computes it; see `attention_piece`."""
    case = _Case.make(model, batch, dropout, dtype, device)
    is_ours = has_kernel(device, dtype, model.head_dim)
    return case.inputs, partial(_ours if is_ours else _written_out, case)


def attention_piece(
    model: ModelConfig, batch: Batch, dropout: float, dtype: torch.dtype, device: torch.device
) -> Piece:
    """Attention of a layer whose tokens see their whole segment.

    Args:
        model: determines the heads.
        batch: rows; only their segments matter.
        dropout: of attention weights.
        dtype: of the tensors.
        device: of the tensors.
    """
    case = _Case.make(model, batch, dropout, dtype, device)
    rows, slots = batch.positions_BS.shape
    alternatives: dict[str, Compute] = {"written out": partial(_written_out, case)}
    absent: dict[str, str] = {}
    if has_kernel(device, dtype, model.head_dim):
        alternatives["triton (ours)"] = partial(_ours, case)
    else:
        absent["triton (ours)"] = "takes bf16 on CUDA, compute capability 8.0 and up, with Triton"
    alternatives["sdpa"] = partial(_sdpa, case)
    if device.type == "cuda":
        alternatives["sdpa cudnn"] = partial(_cudnn, case)
        alternatives["aten flash varlen"] = partial(_aten_flash, case)
    else:
        absent |= dict.fromkeys(("sdpa cudnn", "aten flash varlen"), "takes CUDA")
    for name, package, takes in (
        ("flash-attn 3", "flash_attn_interface", _flash_3),
        ("transformer engine", "transformer_engine", _transformer_engine),
    ):
        if find_spec(package) is None:
            absent[name] = f"the package {package} is not installed"
        elif takes is _flash_3 and dropout > 0.0:
            absent[name] = "has no dropout"
        else:
            alternatives[name] = made_at_first_call(partial(takes, case))
    seen = keys_per_query([batch])
    return Piece(
        "attention",
        f"{rows} rows of {slots}, {seen:.0f} keys a query, {model.num_attention_heads} heads, "
        f"{model.num_query_groups} of keys, of {model.head_dim}, dropout {dropout:g}",
        case.inputs,
        alternatives,
        absent,
        products=4.0 * rows * slots * seen * model.hidden_size,
        is_random=dropout > 0.0,
    )


def _written_out(case: _Case) -> Tensor:
    bias = case.layout.bias_B1SS
    assert bias is not None
    out_BHSK = written_out_attention(*case.heads_first(), bias, case.dropout, case.keys_B, 0)
    return out_BHSK.transpose(1, 2)


def _ours(case: _Case) -> Tensor:
    layout = PackedLayout(case.layout.begins_BS, case.layout.ends_BS)
    return attend(*case.heads_first(), layout, case.dropout, case.keys_B).transpose(1, 2)


def _sdpa(case: _Case) -> Tensor:
    q, k, v = case.heads_first()
    # Only some of the kernels take fewer key/value heads than query heads.
    sharing = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(sharing, dim=1) if sharing > 1 else x for x in (k, v))
    out_BHSK = F.scaled_dot_product_attention(q, k, v, case.layout.bias_B1SS, case.dropout)
    return out_BHSK.transpose(1, 2)


def _cudnn(case: _Case) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _sdpa(case)


def _aten_flash(case: _Case) -> Tensor:
    out_NHK: Tensor = torch.ops.aten._flash_attention_forward(
        *case.all_slots(),
        case.ends,
        case.ends,
        case.longest,
        case.longest,
        case.dropout,
        False,
        False,
        scale=1.0 / math.sqrt(case.q_BSHK.shape[-1]),
    )[0]
    return out_NHK.view_as(case.q_BSHK)


def _flash_3(case: _Case) -> Compute:
    function = import_module("flash_attn_interface").flash_attn_varlen_func

    def compute() -> Tensor:
        arguments = (case.ends, case.ends, case.longest, case.longest)
        out = function(*case.all_slots(), *arguments)
        # Some versions also return the softmax's sums.
        out_NHK: Tensor = out[0] if isinstance(out, tuple) else out
        return out_NHK.view_as(case.q_BSHK)

    return compute


def _transformer_engine(case: _Case) -> Compute:
    heads, size = case.q_BSHK.shape[2:]
    module = import_module("transformer_engine.pytorch").DotProductAttention(
        heads,
        size,
        num_gqa_groups=case.k_BSGK.shape[2],
        attention_dropout=case.dropout,
        qkv_format="thd",
        attn_mask_type="padding",
    )

    def compute() -> Tensor:
        out_ND: Tensor = module(
            *case.all_slots(),
            cu_seqlens_q=case.ends,
            cu_seqlens_kv=case.ends,
            max_seqlen_q=case.longest,
            max_seqlen_kv=case.longest,
        )
        return out_ND.view_as(case.q_BSHK)

    return compute

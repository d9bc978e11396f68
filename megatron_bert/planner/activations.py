"""Bytes that a forward pass keeps for the backward pass, tensor by tensor.

Names of sizes: N tokens of the micro-batch, T tokens that the rank's residual stream holds, M
masked slots, D hidden, F feed-forward, V this rank's part of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bert.config.logits import CPU_SOFTMAX_ELEMENTS, logits_per_chunk
from megatron_bert.planner.job import Work


@dataclass(frozen=True)
class BlockBytes:
    """Bytes for one block and micro-batch.

    Attributes:
        kept: held from the block's forward pass to its backward pass.
        forward: held in addition at the worst moment of its forward pass.
        backward: held in addition at the worst moment of its backward pass.
    """

    kept: float
    forward: float
    backward: float


def block_bytes(work: Work) -> BlockBytes:
    """Bytes that a block keeps, and those that it holds in addition at its worst moments."""
    attention, feed_forward = _Sublayer.attention(work), _Sublayer.feed_forward(work)
    kept = attention.kept + feed_forward.kept
    # While attention computes, the other sub-layer's kept tensors do not exist yet, or no longer.
    forward = max(attention.forward - feed_forward.kept, feed_forward.forward)
    backward = max(attention.backward - feed_forward.kept, feed_forward.backward)
    if work.recompute != "full":
        return BlockBytes(kept, max(0.0, forward), max(0.0, backward))
    entry = work.job.element_bytes * work.tokens * work.share * work.job.config.model.hidden_size
    # In the backward pass everything recomputed is held in addition to the incoming gradient.
    again = kept - entry + max(0.0, forward, backward) + entry
    return BlockBytes(entry, again, again)


@dataclass(frozen=True)
class _Sublayer:
    """Attention or the feed-forward layer; attributes as in `BlockBytes`."""

    kept: float
    forward: float
    backward: float

    @classmethod
    def attention(cls, work: Work) -> _Sublayer:
        """Norm, projections, attention, dropout."""
        model, e = work.job.config.model, work.job.element_bytes
        heads = model.num_attention_heads / work.split.tensor
        mixed = e * work.tokens * model.hidden_size / work.split.tensor
        # Queries, keys, values, and attention's result, which the output's product reads.
        kept = _norm_bytes(work) + 2 * mixed + 2 * e * work.tokens * work.kv_size
        incoming = e * work.tokens * work.share * model.hidden_size
        if not work.writes_scores:
            # A kernel keeps a logarithm for each query and head.
            return cls(kept + 4 * work.tokens * heads, 0.0, 2 * mixed + 2 * incoming)
        scores = work.rows * heads * work.span.seq_length**2
        # The softmax; with dropout also its mask, and the weights that are left.
        softmax = scores * (e + ((1 + e) if model.attention_dropout else 0))
        forward, backward = _score_temporaries(work, scores, mixed)
        if work.recompute == "selective":
            forward += softmax
            again = max(softmax + backward, forward + mixed)
            return cls(kept, forward, again + 2 * incoming)
        return cls(kept + softmax, forward, backward + 2 * incoming)

    @classmethod
    def feed_forward(cls, work: Work) -> _Sublayer:
        """Norm, gate, up, activation, down, dropout."""
        model, e = work.job.config.model, work.job.element_bytes
        wide = e * work.tokens * model.ffn_hidden_size / work.split.tensor
        incoming = e * work.tokens * work.share * model.hidden_size
        if work.job.is_fused(work.split.tensor):
            # The activation and its product with the up projection are recomputed.
            return cls(_norm_bytes(work) + 2 * wide, wide, 3 * wide + 2 * incoming)
        return cls(_norm_bytes(work) + 4 * wide, 0.0, 2 * wide + incoming)


def _norm_bytes(work: Work) -> float:
    """A norm's input and two fp32 statistics a token; its output; the mask of dropout.

    Fused kernels recompute the output and the mask.
    """
    model, e = work.job.config.model, work.job.element_bytes
    tokens, hidden = work.tokens * work.share, model.hidden_size
    if work.job.is_fused(work.split.tensor):
        return tokens * (e * hidden + 8)
    return tokens * (2 * e * hidden + 8 + (hidden if model.hidden_dropout else 0))


def _score_temporaries(work: Work, scores: float, mixed: float) -> tuple[float, float]:
    """How much attention that writes its scores exceeds what it keeps, forward and backward."""
    e = work.job.element_bytes
    if not work.job.config.model.attention_dropout:
        # The scores before and after what is added to them; attention's result does not exist yet.
        return scores * 2 * e - mixed, scores * 2 * e
    # Dropout's random numbers, three at a time: 64 bits each on the CPU, 32 on CUDA.
    draws = 3 * (8 if work.job.machine.gpu.kind == "cpu" else 4)
    # The scores exist; dropout's mask and the weights that are left do not exist yet.
    forward = scores * (e + draws - (1 + e)) - mixed
    return forward, scores * 2 * e


@dataclass(frozen=True)
class HeadBytes:
    """Bytes for the head on one micro-batch.

    Attributes:
        kept: held until its backward pass: hidden states, gradients computed on the way.
        logits: logits that are held while it computes.
        table: the decoder's gradient, which is held until the embeddings' backward pass.
    """

    kept: float
    logits: float
    table: float


def head_bytes(work: Work) -> HeadBytes:
    """Bytes of the head: kept tensors, logits, and the decoder's gradient."""
    model, e = work.job.config.model, work.job.element_bytes
    M, D, V = work.masked, model.hidden_size, work.job.vocab_size / work.split.tensor
    on_cpu = work.job.machine.gpu.kind == "cpu"
    chunk = min(M, max(1, logits_per_chunk("cpu" if on_cpu else "cuda") // max(1, int(V))))
    many = chunk < M
    # Dense, GELU and norm keep their inputs; the projection keeps its finished gradient.
    kept = e * 5 * M * D
    table = V * D * (4 if many else e)
    logits = chunk * V * e
    if on_cpu:
        # The logits' softmax in fp32.
        logits += 4 * min(chunk * V, CPU_SOFTMAX_ELEMENTS)
    if many and (on_cpu or e == 4):
        # With several chunks a new product is held beside the sum; in BF16 on CUDA it is added
        # directly.
        logits += V * D * e
    return HeadBytes(kept, logits, table)

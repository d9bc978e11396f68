"""How long a rank computes: products by shape, attention, and work bound by memory traffic."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from math import ceil

from megatron_bert.config.block_matrices import BlockMatrix, block_matrices, joined_matrices
from megatron_bert.config.logits import logits_per_chunk
from megatron_bert.parallel.actions import StageTime
from megatron_bert.planner.job import Work

# The fixed time of attention's backward pass, however few the keys, as a multiple of the time to
# read queries, keys and values once and write the result: from lengths 128 to 2,048 on one H100.
ATTENTION_BACKWARD_MOVES = 6


@dataclass(frozen=True)
class Seconds:
    """Time by what it is spent on.

    Attributes:
        gemm: matrix products.
        attention: softmax attention.
        elementwise: norms, activations, dropout, sums of gradients.
        tensor: messages of tensor parallelism that no computation hides.
        host: the device waits for the host to launch work.
    """

    gemm: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    tensor: float = 0.0
    host: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.gemm + self.attention + self.elementwise + self.tensor + self.host

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(
            self.gemm + other.gemm,
            self.attention + other.attention,
            self.elementwise + other.elementwise,
            self.tensor + other.tensor,
            self.host + other.host,
        )

    def __mul__(self, factor: float) -> Seconds:
        return Seconds(
            factor * self.gemm,
            factor * self.attention,
            factor * self.elementwise,
            factor * self.tensor,
            factor * self.host,
        )


@dataclass(frozen=True)
class Passes:
    """Time of a part of the model on one micro-batch.

    Attributes:
        forward: its forward pass.
        backward_input: the backward pass to its input, including recomputation for it.
        backward_weight: the products for the weights' gradients.
    """

    forward: Seconds
    backward_input: Seconds
    backward_weight: Seconds

    @cached_property
    def total(self) -> Seconds:
        """The sum of all three."""
        return self.forward + self.backward_input + self.backward_weight

    @cached_property
    def times(self) -> StageTime:
        """The total of each."""
        return StageTime(self.forward.total, self.backward_input.total, self.backward_weight.total)


def product_seconds(work: Work, rows: float, inner: float, columns: float) -> float:
    """Seconds of [rows, inner] times [inner, columns], bound by the peak or by the bytes moved."""
    machine, e = work.job.machine, work.job.element_bytes
    peak = machine.peak(work.job.config.precision.compute) * machine.rates.gemm
    moved = moved_once(work, e * (rows * inner + inner * columns + rows * columns))
    return max(2 * rows * inner * columns / peak, moved) + machine.rates.gemm_seconds


def moved_seconds(work: Work, moved_bytes: float) -> float:
    """Seconds to read and write `moved_bytes` outside the blocks."""
    return _streamed(work, moved_bytes, work.job.machine.rates.elementwise)


def _streamed(work: Work, moved_bytes: float, share: float) -> float:
    return moved_bytes / (1e9 * work.job.machine.gpu.bandwidth * share)


def block_passes(work: Work, tensor_forward: float, tensor_backward: float) -> Passes:
    """Time of a block.

    Args:
        work: the micro-batch.
        tensor_forward: seconds of tensor parallelism's forward messages.
        tensor_backward: seconds of its backward messages that no computation hides.
    """
    rates = work.job.machine.rates
    forward_products, input_products, weight_products = _products(work)
    attention_forward, attention_backward = _attention(work)
    forward_moved, backward_moved = _elementwise(work)
    share = rates.fused if work.job.has_fused_kernels(work.split.tensor) else rates.elementwise
    forward = Seconds(
        gemm=forward_products,
        attention=attention_forward,
        elementwise=_streamed(work, forward_moved, share),
        tensor=tensor_forward,
    )
    backward = Seconds(
        gemm=input_products,
        attention=attention_backward,
        elementwise=_streamed(work, backward_moved, share),
        tensor=tensor_backward,
    )
    weight = Seconds(gemm=weight_products)
    if work.recompute == "full":
        backward += forward
    elif work.recompute == "selective" and work.writes_scores:
        backward += Seconds(attention=attention_forward)
    busy = (forward + backward + weight).total
    # The device's waiting time is divided evenly among the three passes.
    waiting = rates.idle_recorded if work.is_recorded else max(rates.idle, _launches(work) - busy)
    return Passes(
        forward + Seconds(host=waiting / 3),
        backward + Seconds(host=waiting / 3),
        weight + Seconds(host=waiting / 3),
    )


def _launches(work: Work) -> float:
    """Seconds that the host, running alongside the device, takes to launch kernels one by one."""
    rates = work.job.machine.rates
    seconds = rates.host_compiled if work.job.config.compile.enabled else rates.host
    seconds *= 4 / 3 if work.recompute == "full" else 1.0
    return seconds + rates.host_message * _messages_of(work)


def _messages_of(work: Work) -> int:
    """Number of a block's messages over the tensor-parallel group, forward and backward."""
    if work.split.tensor == 1:
        return 0
    # All-reduces; with sequence parallelism two all-gathers and two reduce-scatters instead, and in
    # the backward pass the inputs are gathered once more.
    forward, backward = (4, 6) if work.split.sequence else (2, 2)
    return forward * (2 if work.recompute == "full" else 1) + backward


def _products(work: Work) -> tuple[float, float, float]:
    """Seconds of a block's products: forward, to the inputs, to the weights."""
    N, layers = work.tokens, _multiplied(work)
    forward = sum(product_seconds(work, N, layer.inputs, layer.outputs) for layer in layers)
    to_input = sum(product_seconds(work, N, layer.outputs, layer.inputs) for layer in layers)
    return forward, to_input, sum(_weight_product(work, layer) for layer in layers)


def weight_product_seconds(work: Work) -> tuple[float, ...]:
    """Seconds of the weights' products for each norm's output: attention's, then the gate's.

    Meanwhile tensor-parallel ranks exchange the gradients of these outputs.
    """
    layers = (layer for layer in _multiplied(work) if layer.is_column_parallel)
    return tuple(
        sum(_weight_product(work, layer) for layer in group)
        for _, group in groupby(layers, lambda layer: layer.reads)
    )


def _weight_product(work: Work, layer: BlockMatrix) -> float:
    return product_seconds(work, layer.outputs, work.tokens, layer.inputs)


def _multiplied(work: Work) -> tuple[BlockMatrix, ...]:
    """This rank's matrices as multiplied: fused, layers that read the same input are joined."""
    matrices = _matrices(work)
    return joined_matrices(matrices) if work.job.has_fused_kernels(work.split.tensor) else matrices


def _matrices(work: Work) -> tuple[BlockMatrix, ...]:
    return block_matrices(work.job.config.model, work.split.tensor)


def _attention(work: Work) -> tuple[float, float]:
    """Softmax attention over whole rows: an upper bound if rows have several segments."""
    job, model, tensor = work.job, work.job.config.model, work.split.tensor
    machine, rates, e = job.machine, job.machine.rates, job.element_bytes
    peak = machine.peak(job.config.precision.compute)
    faster = 1.0 if model.attention_dropout else rates.no_dropout
    keys = _keys_per_query(work)
    flops = 4 * work.tokens * keys * model.hidden_size / tensor
    moved = moved_once(work, e * work.tokens * (2 * model.hidden_size / tensor + 2 * work.kv_size))
    forward = flops / (peak * rates.attention_forward * faster) + moved
    backward = 2.5 * flops / (peak * rates.attention_backward * faster)
    backward += ATTENTION_BACKWARD_MOVES * moved
    return forward, backward


def moved_once(work: Work, moved_bytes: float) -> float:
    """Seconds to stream bytes in a kernel that multiplies, at nearly the memory's full rate."""
    return _streamed(work, moved_bytes, 0.95)


def _keys_per_query(work: Work) -> float:
    """Average number of slots that a slot sees, over all layers."""
    model, length = work.job.config.model, work.span.seq_length
    if not model.family.alternates:
        return float(length)
    local = sum(model.is_local(layer) for layer in range(model.num_layers))
    near = min(length, model.local_attention + 1)
    return (local * near + (model.num_layers - local) * length) / model.num_layers


def _elementwise(work: Work) -> tuple[float, float]:
    """Bytes that a block's kernels between products read and write, forward and backward.

    These were measured before products accumulated gradients directly, and before weights that one
    product reads were stored contiguously.

    Forward, in the order of the block: norm (read, write), residual sum with dropout and the next
    norm (2 read, 2 written), activation (2 read, 1 written), residual sum (2 read, 1 written).
    """
    forward = 9 * work.tokens * work.share * work.job.config.model.hidden_size
    forward += 3 * work.tokens * work.job.config.model.ffn_hidden_size / work.split.tensor
    forward *= work.job.element_bytes
    if work.job.has_fused_kernels(work.split.tensor):
        joined = _joined_bytes(work)
        return forward + joined, _fused_backward(work) + joined
    factor = 1.0 if work.job.is_fused(work.split.tensor) else work.job.machine.rates.eager
    backward = factor * work.job.element_bytes * _compiled_backward(work)
    # Weights' gradients are accumulated in fp32.
    return factor * forward, backward + (8 + work.job.element_bytes) * _weights(work)


def _compiled_backward(work: Work) -> float:
    """Elements that compiled kernels move in the backward pass.

    The activation recomputed (3 read, 3 written); sums for biases; dropout (read, write); sums of
    the gradients that come back from query, key and value, and from gate and up; norms (3 read, 1
    written, their output recomputed, and the weights' sums).
    """
    model, tensor = work.job.config.model, work.split.tensor
    N, T = work.tokens, work.tokens * work.share
    D, F = model.hidden_size, model.ffn_hidden_size / tensor
    biases = sum(m.outputs * (N if m.is_column_parallel else T) for m in _matrices(work))
    return 6 * N * F + biases * model.family.biases + 18 * T * D + 9 * N * D


def _fused_backward(work: Work) -> float:
    """Bytes that fused kernels move in the backward pass; they also sum the biases' gradients.

    The residual sum's branch (read, write); the activation recomputed (3 read, 3 written); both
    norms (3 read, 1 written), the second with its branch's gradient (written); their outputs
    recomputed (read, write). Weights' gradients come in fp32 and are accumulated (2 read, 1
    written).
    """
    model = work.job.config.model
    wide = 6 * work.tokens * model.ffn_hidden_size / work.split.tensor
    # Without dropout a branch's gradient equals the residual stream's, and is not written.
    stream = (15 if model.hidden_dropout else 13) * work.tokens * work.share * model.hidden_size
    return work.job.element_bytes * (wide + stream) + 12 * _weights(work)


def _joined_bytes(work: Work) -> float:
    """Bytes read and written to join the weights of layers that share one product."""
    weights = sum(matrix.size for matrix in _matrices(work) if matrix.is_column_parallel)
    return 2 * work.job.element_bytes * weights


def _weights(work: Work) -> float:
    """Number of elements of a block's weights on this rank."""
    return sum(matrix.size for matrix in _matrices(work))


def head_passes(work: Work) -> Passes:
    """Time of dense layer, norm, projection and cross-entropy on the masked positions."""
    model = work.job.config.model
    M, D, V = work.masked, model.hidden_size, work.job.vocab_size / work.split.tensor
    projection = product_seconds(work, M, D, V)
    dense = product_seconds(work, M, D, D)
    logits = moved_seconds(work, _head_bytes(work, M, V))
    forward = Seconds(gemm=dense + 3 * projection, elementwise=logits)
    return Passes(forward, Seconds(gemm=dense), Seconds(gemm=dense))


def _head_bytes(work: Work, masked: float, vocabulary: float) -> float:
    """Bytes that cross-entropy moves between products, including the table's gradient."""
    e, table = work.job.element_bytes, vocabulary * work.job.config.model.hidden_size
    if work.job.machine.gpu.kind == "cpu":
        # Softmax in fp32, its gradient in place, a copy in the compute dtype.
        return masked * vocabulary * (4 * e + 16) + table * (2 * e + 8)
    # Logits are read for the softmax and again for its gradient, which is written in place and read
    # for the bias's. The table's is summed over chunks in fp32, scaled, and added to others.
    chunks = ceil(masked / max(1, logits_per_chunk("cuda") // int(vocabulary)))
    of_table = 4 if chunks > 1 else e
    return masked * vocabulary * 4 * e + table * ((2 * chunks + 1) * of_table + 8)


def embedding_passes(work: Work) -> Passes:
    """Time of looking up, adding and dropout, and of the tables' gradients."""
    model, e = work.job.config.model, work.job.element_bytes
    moved = moved_seconds(work, 6 * e * work.tokens * model.hidden_size)
    return Passes(Seconds(elementwise=moved), Seconds(), Seconds(elementwise=moved))

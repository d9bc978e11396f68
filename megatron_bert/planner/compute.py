"""How long a rank computes: products by shape, attention, and what moves bytes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from math import ceil

from megatron_bert.config.block_matrices import BlockMatrix, block_matrices, joined_matrices
from megatron_bert.config.logits import logits_per_chunk
from megatron_bert.planner.job import Work

# How many times as long as reading queries, keys and values once and writing the result takes what
# attention's backward pass takes however few the keys: by lengths 128 to 2,048 on one H100.
ATTENTION_BACKWARD_MOVES = 6


@dataclass(frozen=True)
class Seconds:
    """Time by what it goes into.

    Attributes:
        gemm: matrix products.
        attention: softmax attention.
        elementwise: norms, activations, dropout, sums of gradients.
        tensor: messages of tensor parallelism that nothing hides.
        host: the device waits to be told what to do.
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
    """A piece of the model on one micro-batch.

    Attributes:
        forward: its forward pass.
        backward_input: backward to its input, with what is computed again for it.
        backward_weight: the weights' products.
    """

    forward: Seconds
    backward_input: Seconds
    backward_weight: Seconds

    @cached_property
    def total(self) -> Seconds:
        """All three."""
        return self.forward + self.backward_input + self.backward_weight


def product_seconds(work: Work, rows: float, inner: float, columns: float) -> float:
    """A product of [rows, inner] with [inner, columns]: by the peak, or by the bytes it moves."""
    machine, e = work.job.machine, work.job.element_bytes
    peak = machine.peak(work.job.config.precision.compute) * machine.rates.gemm
    moved = moved_once(work, e * (rows * inner + inner * columns + rows * columns))
    return max(2 * rows * inner * columns / peak, moved) + machine.rates.gemm_seconds


def moved_seconds(work: Work, moved_bytes: float) -> float:
    """Reading and writing so many bytes outside the blocks."""
    return _streamed(work, moved_bytes, work.job.machine.rates.elementwise)


def _streamed(work: Work, moved_bytes: float, share: float) -> float:
    return moved_bytes / (1e9 * work.job.machine.gpu.bandwidth * share)


def block_passes(work: Work, tensor_forward: float, tensor_backward: float) -> Passes:
    """A block.

    Args:
        work: the micro-batch.
        tensor_forward: seconds of tensor parallelism's messages forward.
        tensor_backward: seconds of the messages backward that nothing hides.
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
    # What the device lacks is shared out as the work is.
    waiting = rates.idle_recorded if work.is_recorded else max(rates.idle, _launches(work) - busy)
    return Passes(
        forward + Seconds(host=waiting / 3),
        backward + Seconds(host=waiting / 3),
        weight + Seconds(host=waiting / 3),
    )


def _launches(work: Work) -> float:
    """Seconds of the host, which runs beside the device, for what it launches one by one."""
    rates = work.job.machine.rates
    seconds = rates.host_compiled if work.job.config.compile.enabled else rates.host
    seconds *= 4 / 3 if work.recompute == "full" else 1.0
    return seconds + rates.host_message * _messages_of(work)


def _messages_of(work: Work) -> int:
    """Messages over the tensor-parallel group of a block, forward and backward."""
    if work.split.tensor == 1:
        return 0
    # Sums; shared by tokens, two gatherings and two scatterings, and inputs once more backward.
    forward, backward = (4, 6) if work.split.sequence else (2, 2)
    return forward * (2 if work.recompute == "full" else 1) + backward


def _products(work: Work) -> tuple[float, float, float]:
    """Forward, to the inputs, to the weights."""
    N, layers = work.tokens, _multiplied(work)
    forward = sum(product_seconds(work, N, layer.inputs, layer.outputs) for layer in layers)
    to_input = sum(product_seconds(work, N, layer.outputs, layer.inputs) for layer in layers)
    return forward, to_input, sum(_weight_product(work, layer) for layer in layers)


def weight_product_seconds(work: Work) -> tuple[float, ...]:
    """The weights' products that follow each of a norm's outputs: of attention, then of the gate.

    Tensor-parallel ranks send messages about the gradients of these outputs meanwhile.
    """
    layers = (layer for layer in _multiplied(work) if layer.is_column_parallel)
    return tuple(
        sum(_weight_product(work, layer) for layer in group)
        for _, group in groupby(layers, lambda layer: layer.reads)
    )


def _weight_product(work: Work, layer: BlockMatrix) -> float:
    return product_seconds(work, layer.outputs, work.tokens, layer.inputs)


def _multiplied(work: Work) -> tuple[BlockMatrix, ...]:
    """This rank's matrices as products take them: fused, one of all layers that read one input."""
    matrices = _matrices(work)
    return joined_matrices(matrices) if work.job.has_fused_kernels(work.split.tensor) else matrices


def _matrices(work: Work) -> tuple[BlockMatrix, ...]:
    return block_matrices(work.job.config.model, work.split.tensor)


def _attention(work: Work) -> tuple[float, float]:
    """Softmax attention over whole rows: an upper bound where rows have several segments."""
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
    """Bytes that a kernel streams beside products, at nearly the memory's rate."""
    return _streamed(work, moved_bytes, 0.95)


def _keys_per_query(work: Work) -> float:
    """Slots that a slot sees, on average over layers."""
    model, length = work.job.config.model, work.span.seq_length
    if not model.family.alternates:
        return float(length)
    local = sum(model.is_local(layer) for layer in range(model.num_layers))
    near = min(length, model.local_attention + 1)
    return (local * near + (model.num_layers - local) * length) / model.num_layers


def _elementwise(work: Work) -> tuple[float, float]:
    """Bytes that a block's kernels between products read and write, forward and backward.

    As they were measured, before gradients were added up within products and weights that one
    product reads stood end to end.

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
    # Gradients of weights are added up in fp32.
    return factor * forward, backward + (8 + work.job.element_bytes) * _weights(work)


def _compiled_backward(work: Work) -> float:
    """Elements that compiled kernels move backward.

    The activation again (3 read, 3 written); sums for biases; dropout (read, write); sums of the
    gradients that come back from query, key and value, and from gate and up; norms (3 read, 1
    written, their output again, and the weights' sums).
    """
    model, tensor = work.job.config.model, work.split.tensor
    N, T = work.tokens, work.tokens * work.share
    D, F = model.hidden_size, model.ffn_hidden_size / tensor
    biases = sum(m.outputs * (N if m.is_column_parallel else T) for m in _matrices(work))
    return 6 * N * F + biases * model.family.biases + 18 * T * D + 9 * N * D


def _fused_backward(work: Work) -> float:
    """Bytes that fused kernels move backward; biases' gradients are summed meanwhile.

    The residual sum's branch (read, write); the activation again (3 read, 3 written); both norms (3
    read, 1 written), the second with its branch's gradient (written); their outputs again (read,
    write). Weights' gradients come in fp32 and are added up (2 read, 1 written).
    """
    model = work.job.config.model
    wide = 6 * work.tokens * model.ffn_hidden_size / work.split.tensor
    # Without dropout a branch's gradient is the residual stream's, and not written.
    stream = (15 if model.hidden_dropout else 13) * work.tokens * work.share * model.hidden_size
    return work.job.element_bytes * (wide + stream) + 12 * _weights(work)


def _joined_bytes(work: Work) -> float:
    """Weights that are laid end to end for products of several layers: read, and written."""
    weights = sum(matrix.size for matrix in _matrices(work) if matrix.is_column_parallel)
    return 2 * work.job.element_bytes * weights


def _weights(work: Work) -> float:
    """Elements of a block's weights on this rank."""
    return sum(matrix.size for matrix in _matrices(work))


def head_passes(work: Work) -> Passes:
    """Dense layer, norm, projection and cross-entropy on the masked positions."""
    model = work.job.config.model
    M, D, V = work.masked, model.hidden_size, work.job.vocab_size / work.split.tensor
    projection = product_seconds(work, M, D, V)
    dense = product_seconds(work, M, D, D)
    logits = moved_seconds(work, _head_bytes(work, M, V))
    forward = Seconds(gemm=dense + 3 * projection, elementwise=logits)
    return Passes(forward, Seconds(gemm=dense), Seconds(gemm=dense))


def _head_bytes(work: Work, masked: float, vocabulary: float) -> float:
    """Bytes that cross-entropy moves between products, with the table's gradient."""
    e, table = work.job.element_bytes, vocabulary * work.job.config.model.hidden_size
    if work.job.machine.gpu.kind == "cpu":
        # Softmax in fp32, its gradient in place, a copy in the compute type.
        return masked * vocabulary * (4 * e + 16) + table * (2 * e + 8)
    # Logits are read for their softmax, again for its gradient, which is written in place, and
    # that for the bias's. The table's is added up over chunks in fp32, scaled, and added to others.
    chunks = ceil(masked / max(1, logits_per_chunk("cuda") // int(vocabulary)))
    of_table = 4 if chunks > 1 else e
    return masked * vocabulary * 4 * e + table * ((2 * chunks + 1) * of_table + 8)


def embedding_passes(work: Work) -> Passes:
    """Looking up, adding, dropout; the tables' gradients."""
    model, e = work.job.config.model, work.job.element_bytes
    moved = moved_seconds(work, 6 * e * work.tokens * model.hidden_size)
    return Passes(Seconds(elementwise=moved), Seconds(), Seconds(elementwise=moved))

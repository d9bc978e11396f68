"""How long a rank computes: products by shape, attention, and what moves bytes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megatron_bert.planner.job import Work


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
    moved = e * (rows * inner + inner * columns + rows * columns)
    by_bytes = moved / (1e9 * machine.gpu.bandwidth * machine.rates.elementwise)
    return max(2 * rows * inner * columns / peak, by_bytes) + machine.rates.gemm_seconds


def moved_seconds(work: Work, moved_bytes: float) -> float:
    """Reading and writing so many bytes."""
    machine = work.job.machine
    return moved_bytes / (1e9 * machine.gpu.bandwidth * machine.rates.elementwise)


def block_passes(work: Work, tensor_forward: float, tensor_backward: float) -> Passes:
    """A block.

    Args:
        work: the micro-batch.
        tensor_forward: seconds of tensor parallelism's messages forward.
        tensor_backward: the same backward, as far as nothing hides them.
    """
    rates = work.job.machine.rates
    forward_products, input_products, weight_products = _products(work)
    attention_forward, attention_backward = _attention(work)
    forward_moved, backward_moved = _elementwise(work)
    forward = Seconds(
        gemm=forward_products,
        attention=attention_forward,
        elementwise=moved_seconds(work, forward_moved),
        tensor=tensor_forward,
    )
    backward = Seconds(
        gemm=input_products,
        attention=attention_backward,
        elementwise=moved_seconds(work, backward_moved),
        tensor=tensor_backward,
    )
    weight = Seconds(gemm=weight_products)
    if work.recompute == "full":
        backward += forward
    elif work.recompute == "selective" and work.writes_scores:
        backward += Seconds(attention=attention_forward)
    busy = (forward + backward + weight).total
    # The host runs beside the device; what it lacks is shared out as the work is.
    launches = rates.host * (4 / 3 if work.recompute == "full" else 1.0)
    launches += rates.host_message * _messages_of(work)
    waiting = max(rates.idle, launches - busy)
    return Passes(
        forward + Seconds(host=waiting / 3),
        backward + Seconds(host=waiting / 3),
        weight + Seconds(host=waiting / 3),
    )


def _messages_of(work: Work) -> int:
    """Messages over the tensor-parallel group of a block, forward and backward."""
    if work.split.tensor == 1:
        return 0
    # Sums; shared by tokens, two gatherings and two scatterings, and inputs once more backward.
    forward, backward = (4, 6) if work.split.sequence else (2, 2)
    return forward * (2 if work.recompute == "full" else 1) + backward


def _products(work: Work) -> tuple[float, float, float]:
    """Forward, to the inputs, to the weights."""
    model, tensor = work.job.config.model, work.split.tensor
    N, D, F, kv = work.tokens, model.hidden_size, model.ffn_hidden_size / tensor, work.kv_size
    local = D / tensor
    # Query, key, value, output, gate, up, down: features in and out.
    layers = ((D, local), (D, kv), (D, kv), (local, D), (D, F), (D, F), (F, D))
    forward = sum(product_seconds(work, N, a, b) for a, b in layers)
    to_input = sum(product_seconds(work, N, b, a) for a, b in layers)
    to_weight = sum(product_seconds(work, b, N, a) for a, b in layers)
    return forward, to_input, to_weight


def weight_product_seconds(work: Work) -> tuple[float, float]:
    """The weights' products of the layers that read one input: query, key, value; gate, up."""
    model, tensor = work.job.config.model, work.split.tensor
    N, D, F, kv = work.tokens, model.hidden_size, model.ffn_hidden_size / tensor, work.kv_size
    attention = product_seconds(work, D / tensor, N, D) + 2 * product_seconds(work, kv, N, D)
    return attention, 2 * product_seconds(work, F, N, D)


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
    backward = 2.5 * flops / (peak * rates.attention_backward * faster) + 4 * moved
    return forward, backward


def moved_once(work: Work, moved_bytes: float) -> float:
    """Bytes that a kernel streams beside products, at nearly the memory's rate."""
    return moved_bytes / (1e9 * work.job.machine.gpu.bandwidth * 0.95)


def _keys_per_query(work: Work) -> float:
    """Slots that a slot sees, on average over layers."""
    model, length = work.job.config.model, work.span.seq_length
    if not model.family.alternates:
        return float(length)
    local = sum(model.is_local(layer) for layer in range(model.num_layers))
    near = min(length, model.local_attention + 1)
    return (local * near + (model.num_layers - local) * length) / model.num_layers


def _elementwise(work: Work) -> tuple[float, float]:
    """Bytes that compiled kernels read and write, forward and backward.

    In the order of the block: norm (read, write), residual sum with dropout and the next norm (2
    read, 2 written), activation (2 read, 1 written), residual sum (2 read, 1 written). Backward:
    the activation again (3 read, 3 written); sums for biases; dropout (read, write); sums of the
    gradients that come back from query, key and value, and from gate and up; norms (3 read, 1
    written, their output again, and the weights' sums); gradients of weights are added up in fp32.
    """
    job, model, tensor = work.job, work.job.config.model, work.split.tensor
    N, T = work.tokens, work.tokens * work.share
    D, F = model.hidden_size, model.ffn_hidden_size / tensor
    narrow = D / tensor + 2 * work.kv_size
    biases = int(model.family.biases)
    forward = 9 * T * D + 3 * N * F
    backward = (
        N * (6 + 2 * biases) * F + N * biases * narrow + T * D * (18 + 2 * biases) + 9 * N * D
    )
    weights = D * (2 * D / tensor + 2 * work.kv_size + 3 * F)
    factor = 1.0 if job.is_fused else job.machine.rates.eager
    e = job.element_bytes
    return factor * e * forward, factor * e * backward + (8 + e) * weights


def head_passes(work: Work) -> Passes:
    """Dense layer, norm, projection and cross-entropy on the masked positions."""
    model, e = work.job.config.model, work.job.element_bytes
    M, D, V = work.masked, model.hidden_size, work.job.vocab_size / work.split.tensor
    projection = product_seconds(work, M, D, V)
    dense = product_seconds(work, M, D, D)
    # Softmax in fp32, its gradient in place, a copy in the compute type; the table's gradient.
    logits = moved_seconds(work, M * V * (4 * e + 16) + V * D * (2 * e + 8))
    forward = Seconds(gemm=dense + 3 * projection, elementwise=logits)
    return Passes(forward, Seconds(gemm=dense), Seconds(gemm=dense))


def embedding_passes(work: Work) -> Passes:
    """Looking up, adding, dropout; the tables' gradients."""
    model, e = work.job.config.model, work.job.element_bytes
    moved = moved_seconds(work, 6 * e * work.tokens * model.hidden_size)
    return Passes(Seconds(elementwise=moved), Seconds(), Seconds(elementwise=moved))

"""How long messages between ranks take.

Collectives are rings: each of n ranks sends and receives (n - 1) / n of the bytes of an all-gather
or reduce-scatter, and twice that for an all-reduce. Ranks are numbered as in
`distributed.topology`: those of a tensor-parallel group are adjacent, then shards, then copies,
then pipeline stages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_bert.planner.machines import Machine


@dataclass(frozen=True)
class Group:
    """Ranks that send each other messages.

    Attributes:
        size: n.
        stride: distance between two neighbours of the group, in ranks of the job.
    """

    size: int
    stride: int

    def per_node(self, machine: Machine) -> int:
        """How many of its ranks share a node; the minimum over all groups of this kind."""
        together = math.gcd(self.size * self.stride, machine.gpus_per_node)
        return max(1, together // self.stride)

    def gathering(self, machine: Machine, total_bytes: float) -> float:
        """Seconds to all-gather or reduce-scatter `total_bytes` (of all ranks together)."""
        if self.size == 1:
            return 0.0
        rate = self._rate(machine)
        return (self.size - 1) / self.size * total_bytes / rate + self._latency(machine)

    def sum(self, machine: Machine, total_bytes: float) -> float:
        """Seconds to all-reduce `total_bytes` over the ranks.

        Takes a ring or, where that is faster (small messages), a tree.
        """
        if self.size == 1:
            return 0.0
        rate, inside = self._rate(machine), self.per_node(machine) == self.size
        rates = machine.rates
        step = rates.link_latency if inside else rates.network_latency
        tree = 2 * math.log2(self.size) * step + 2 * total_bytes / rate
        return min(2 * self.gathering(machine, total_bytes), tree)

    def exchange(self, machine: Machine, rank_bytes: float) -> float:
        """Seconds of an all-to-all: each rank sends every other one its share of `rank_bytes`."""
        if self.size == 1:
            return 0.0
        rates, inside = machine.rates, self.per_node(machine)
        share, adapter = rank_bytes / self.size, machine.network.per_node / machine.gpus_per_node
        within = (inside - 1) * share / (1e9 * machine.gpu.link * rates.link)
        across = (self.size - inside) * share / (1e9 * adapter * rates.network)
        return max(within, across) + self._latency(machine)

    def message(self, machine: Machine, message_bytes: float) -> float:
        """Seconds of a message to the neighbouring rank, on the slowest hop."""
        if self.size == 1:
            return 0.0
        inside = self.per_node(machine) == self.size
        rates, adapter = machine.rates, machine.network.per_node / machine.gpus_per_node
        if inside:
            rate, latency = machine.gpu.link * rates.link, rates.link_latency
        else:
            rate, latency = adapter * rates.network, rates.network_latency
        return message_bytes / (1e9 * rate) + latency

    def _rate(self, machine: Machine) -> float:
        """Bytes a second that each rank sends in a ring."""
        link = machine.gpu.link * machine.rates.link
        inside = self.per_node(machine)
        if inside == self.size:
            return 1e9 * link
        # A ring leaves a node as often as it has ranks there, each time through another adapter.
        adapters = machine.network.per_node * inside / machine.gpus_per_node
        return 1e9 * min(link, adapters * machine.rates.network)

    def _latency(self, machine: Machine) -> float:
        rates = machine.rates
        inside = self.per_node(machine) == self.size
        latency = rates.link_latency if inside else rates.network_latency
        return latency * (1.0 + self.size / 16)

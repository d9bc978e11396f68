"""How long messages between ranks take.

Rings: of n ranks each sends and receives (n - 1) / n of a gathering's or scattering's bytes, and
twice that of a sum's. Ranks are numbered as `distributed.topology` numbers them: those of a
tensor-parallel group are neighbours, then shards, then copies, then pipeline stages.
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
        """How many of its ranks share a node, in the group of which the fewest do."""
        together = math.gcd(self.size * self.stride, machine.gpus_per_node)
        return max(1, together // self.stride)

    def gathering(self, machine: Machine, total_bytes: float) -> float:
        """Seconds to gather, or to sum and scatter, `total_bytes` (those of all ranks together)."""
        if self.size == 1:
            return 0.0
        rate = self._rate(machine)
        return (self.size - 1) / self.size * total_bytes / rate + self._latency(machine)

    def sum(self, machine: Machine, total_bytes: float) -> float:
        """Seconds to sum `total_bytes` over the ranks, with the result on all of them.

        A ring, or where that is sooner (small messages) a tree.
        """
        if self.size == 1:
            return 0.0
        rate, inside = self._rate(machine), self.per_node(machine) == self.size
        rates = machine.rates
        step = rates.link_latency if inside else rates.network_latency
        tree = 2 * math.log2(self.size) * step + 2 * total_bytes / rate
        return min(2 * self.gathering(machine, total_bytes), tree)

    def exchange(self, machine: Machine, rank_bytes: float) -> float:
        """Seconds in which each rank sends every other one its share of `rank_bytes`."""
        if self.size == 1:
            return 0.0
        rates, inside = machine.rates, self.per_node(machine)
        share, adapter = rank_bytes / self.size, machine.network.per_node / machine.gpus_per_node
        within = (inside - 1) * share / (1e9 * machine.gpu.link * rates.link)
        across = (self.size - inside) * share / (1e9 * adapter * rates.network)
        return max(within, across) + self._latency(machine)

    def message(self, machine: Machine, message_bytes: float) -> float:
        """Seconds that a message to the neighbour is under way, on the slowest hop."""
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
        # A ring leaves a node as often as it has ranks there, each time by another adapter.
        adapters = machine.network.per_node * inside / machine.gpus_per_node
        return 1e9 * min(link, adapters * machine.rates.network)

    def _latency(self, machine: Machine) -> float:
        rates = machine.rates
        inside = self.per_node(machine) == self.size
        latency = rates.link_latency if inside else rates.network_latency
        return latency * (1.0 + self.size / 16)

"""Constants and costs of Muon's update, for training and for plans."""

from __future__ import annotations

# Iterations that orthogonalise a matrix.
ITERATIONS = 5
# Smaller matrices are orthogonalised together, up to this many elements: one by one, small ones
# would leave a device waiting for the host; together, large ones would only take memory.
BATCH_ELEMENTS = 1 << 24


def iteration_flops(shorter: int, longer: int) -> int:
    """Operations of one iteration, x <- (b (x x^T) + c (x x^T)^2) x.

    Args:
        shorter: length of the shorter side of the matrix x.
        longer: length of its other side.
    """
    return 4 * shorter**2 * longer + 2 * shorter**3

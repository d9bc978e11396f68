"""What Muon's update is made of, for training, which computes it, and for plans, which time it."""

from __future__ import annotations

# Of the iteration that orthogonalises a matrix.
ITERATIONS = 5
# Matrices of fewer elements are orthogonalised together, up to so many: alone, small ones would
# leave a device waiting for the host; together, large ones would only take memory.
BATCH_ELEMENTS = 1 << 24


def iteration_flops(shorter: int, longer: int) -> int:
    """Operations of x <- (b (x x^T) + c (x x^T)^2) x, which is repeated.

    Args:
        shorter: side of the matrix x.
        longer: its other side.
    """
    return 4 * shorter**2 * longer + 2 * shorter**3

"""What Muon's update is made of, for training, which computes it, and for plans, which time it."""

from __future__ import annotations

# Of the iteration that orthogonalises a matrix.
ITERATIONS = 5
# Matrices of fewer elements are orthogonalised together, up to so many: alone, small ones would
# leave a device waiting for the host; together, large ones would only take memory.
BATCH_ELEMENTS = 1 << 24

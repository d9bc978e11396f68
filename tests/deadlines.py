"""How long a test waits for ranks and processes before it calls them hung."""

from __future__ import annotations

# Many times what the slowest takes on a quiet machine. Only a failing test waits so long, and a
# busy machine must not make one fail.
DEADLINE_SECONDS = 300

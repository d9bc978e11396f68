"""The pieces of a step alone, each by all that can compute it."""

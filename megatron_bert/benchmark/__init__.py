"""How fast and how large the parts are: the measurements behind tools/benchmark.py."""

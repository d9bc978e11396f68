"""Which layout a model takes on a machine: what fits, how long a step takes, and why."""

"""The training loop: step, evaluation, metrics, stops."""

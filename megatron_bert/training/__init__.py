"""The training loop: step, evaluation, stops; a job from end to end, and its command line."""

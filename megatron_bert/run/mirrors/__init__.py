"""Copies of `metrics.jsonl` in Weights & Biases and TensorBoard, made beside the training.

Training writes `metrics.jsonl` and nothing else. Each copy is made by a process of its own that
follows that file (`python -m megatron_bert.run.mirrors`): whatever it waits for, and however
it ends, no step waits for it, and what it did not send can be sent later.
"""

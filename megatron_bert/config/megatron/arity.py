"""How many words stand behind a flag: it tells a value from arguments that a variable holds."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from megatron_bert.config.megatron.table import find

# Flags without a value (Megatron-LM's `store_true` and `store_false`), and those that look so.
_SWITCHES = """
--use-* --no-* --apply-* --disable-* --enable-* --overlap-* --delay-* --override-* --reset-*
--account-for-* --log-*-to-* --untie-* --swiglu --openai-gelu --squared-relu --quick-geglu
--group-query-attention --bert-no-binary-head --add-qkv-bias --init-method-xavier-uniform
--qk-layernorm --qk-l2-norm --multi-latent-attention --is-hybrid-model --onnx-safe
--output-bert-embeddings --eod-mask-loss --allow-ambiguous-pad-tokens --mock-data
--trust-remote-code --dataloader-fast-cache-load --dataloader-defer-npy-index-mmap
--decrease-batch-size-if-needed --calculate-per-token-loss --deterministic-mode
--muon-use-nesterov --skip-train --test-mode --full-validation --async-save --finetune
--exit-on-missing-checkpoint --auto-detect-ckpt-format --ckpt-fully-parallel-*
--ckpt-assume-constant-structure --log-throughput --log-progress --log-params-norm
--log-num-zeros-in-grad --log-straggler --profile --record-memory-history --nvtx-ranges
--exit-signal-handler --calc-ft-timeouts --inprocess-restart --sequence-parallel
--standalone-embedding-stage --torch-fsdp2-no-reshard-after-forward --tp-comm-overlap
--create-all-gather-group --keep-fp8-transpose-cache --fsdp-double-buffer
--defer-embedding-wgrad-compute --fake-process-group --bf16 --fp16 --grad-reduce-in-bf16
--first-last-layers-bf16 --accumulate-allreduce-grads-in-fp32 --attention-softmax-in-fp32
--fp16-lm-cross-entropy --fp32-residual-connection --recompute-activations
--distribute-saved-activations --checkpoint-activations --cpu-offloading
--optimizer-cpu-offload --external-cuda-graph --cross-entropy-loss-fusion --manual-gc
--data-parallel-random-init --te-rng-tracker
"""
_VALUED = ("--no-rope-freq",)
_DATASETS = ("--data-path", "--train-data-path", "--valid-data-path", "--test-data-path")


def surely_takes_another(flag: str, values: Sequence[str]) -> bool:
    """Whether one word more behind a flag is a value of its, whatever it is.

    Args:
        flag: as it was given.
        values: the words behind it so far.

    Returns:
        False also of a flag that is not in the table, and of a list of datasets that may end here.
    """
    if find(flag) is None or _is_switch(flag):
        return False
    return not values or (flag in _DATASETS and number(values[-1]) is not None)


def number(word: str) -> float | None:
    """A word as a number; None where it is none."""
    try:
        return float(word)
    except ValueError:
        return None


def _is_switch(flag: str) -> bool:
    return flag not in _VALUED and any(fnmatchcase(flag, switch) for switch in _SWITCHES.split())

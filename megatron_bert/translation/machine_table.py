"""The arguments that say how a machine computes: parallelism, number formats, kernels."""

from __future__ import annotations

from megatron_bert.translation.argument import Argument, becomes, holds, lacks

MACHINE: tuple[Argument, ...] = (
    becomes("--tensor-model-parallel-size", "parallel.tensor", read=int),
    becomes("--pipeline-model-parallel-size", "parallel.pipeline", read=int),
    becomes(
        "--num-layers-per-virtual-pipeline-stage",
        "parallel.virtual_stages parallel.pipeline_schedule",
        "becomes the number of parts a rank holds",
    ),
    becomes(
        "--num-virtual-stages-per-pipeline-rank",
        "parallel.virtual_stages parallel.pipeline_schedule",
    ),
    becomes(
        "--sequence-parallel",
        "parallel.sequence",
        "without tensor parallelism there is nothing to divide, and it is left out",
    ),
    lacks("--context-parallel-size --cp-comm-type --hierarchical-*", "a row stays whole"),
    holds(
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather "
        "--overlap-param-gather-with-optimizer-step --no-overlap-p2p-communication "
        "--overlap-p2p-* --delay-param-gather --no-delay-grad-reduce --no-align-param-gather "
        "--use-torch-fsdp2 --use-megatron-fsdp",
        "weights and states are always sharded, and messages always overlap with computing",
    ),
    becomes(
        "--data-parallel-sharding-strategy",
        "parallel.reshard_after_forward",
        "`optim_grads_params` is ZeRO-3; the others all are sharded here",
        default="no_shard",
    ),
    holds("--torch-fsdp2-no-reshard-after-forward", "`parallel.reshard_after_forward` is false"),
    becomes("--num-distributed-optimizer-instances", "parallel.replicate", read=int),
    lacks("--outer-dp-* --enable-full-sharding-in-hsdp", "copies are whole: `parallel.replicate`"),
    lacks(
        "--pipeline-model-parallel-layout --pipeline-model-parallel-split-rank "
        "--standalone-embedding-stage --account-for-* --microbatch-group-size-*",
        "blocks are divided by work, embedding and head weighed in",
    ),
    holds(
        "--ddp-* --DDP-impl --no-contiguous-buffers-in-local-ddp "
        "--no-scatter-gather-tensors-in-pipeline --use-ring-exchange-p2p "
        "--tp-comm-* --disable-tp-comm-* --use-nccl-ub --nccl-* --fsdp-* --suggested-* "
        "--no-async-tensor-model-parallel-allreduce "
        "--no-gradient-reduce-div-fusion --high-priority-stream-groups --use-tp-pp-dp-mapping "
        "--disable-symmetric-registration --create-all-gather-group --keep-fp8-transpose-cache "
        "--defer-embedding-wgrad-compute --wgrad-deferral-limit",
        "how messages travel is not configured; docs/parallelism.md says how they do",
    ),
    holds("--distributed-backend", "nccl on CUDA, gloo on CPUs"),
    becomes(
        "--distributed-timeout-minutes",
        "distributed.timeout_seconds",
        read=lambda minutes: float(minutes) * 60,
        default="10",
    ),
    holds("--lazy-mpu-init --use-cpu-initialization --fake-process-group", "no such choice"),
    becomes("--bf16", "precision.compute", "without `--bf16` or `--fp16` it is fp32"),
    becomes("--fp16", "precision.compute", "becomes bf16, which needs no loss scaling"),
    lacks(
        "--loss-scale --initial-loss-scale --min-loss-scale --loss-scale-window --hysteresis",
        "bf16 needs no loss scaling",
    ),
    holds("--accumulate-allreduce-grads-in-fp32", "`precision.reduce` is fp32 by default"),
    becomes("--grad-reduce-in-bf16", "precision.reduce", read=lambda _: "bf16"),
    becomes("--fp8-format", "precision.fp8", "scaled by what is known of its operands"),
    lacks(
        "--fp8-* --fp4-* --te-precision-config-file --first-last-layers-bf16 --num-layers-at-*",
        "see `precision.fp8`",
    ),
    holds(
        "--attention-softmax-in-fp32 --fp16-lm-cross-entropy --apply-query-key-layer-scaling "
        "--no-query-key-layer-scaling",
        "softmax and loss are computed in fp32",
    ),
    lacks("--fp32-residual-connection", "the residual stream has the format of computing"),
    becomes("--recompute-activations", "recompute", read=lambda _: "selective"),
    becomes("--recompute-granularity", "recompute", read=str),
    lacks(
        "--recompute-method --recompute-num-layers --recompute-modules "
        "--distribute-saved-activations",
        "all blocks are treated alike",
    ),
    lacks(
        "--checkpoint-activations --checkpoint-num-layers",
        "Megatron-LM itself wants `--recompute-*` by now",
    ),
    lacks(
        "--cpu-offloading* --optimizer-cpu-offload --optimizer-offload-* "
        "--use-torch-optimizer-for-cpu-offload --overlap-cpu-optimizer-d2h-h2d --no-pin-cpu-*",
        "activations and states stay on the device",
    ),
    holds(
        "--use-flash-attn --attention-backend --transformer-impl --no-masked-softmax-fusion "
        "--no-bias-*-fusion --no-rope-fusion --no-persist-layer-norm "
        "--no-gradient-accumulation-fusion --cross-entropy-* --disable-bf16-reduced-precision-* "
        "--no-clone-scatter-output-in-embedding --use-precision-aware-optimizer "
        "--main-grads-dtype --main-params-dtype --exp-avg-*",
        "what was measured fastest is taken, see `kernels` and `compile.enabled`",
    ),
    holds(
        "--enable-cuda-graph --cuda-graph-* --external-cuda-graph",
        "passes are recorded wherever they can be, see `compile.cuda_graphs`",
    ),
    holds(
        "--manual-gc* --no-manual-gc-eval --empty-unused-memory-level --data-parallel-random-init "
        "--te-rng-tracker --inference-* --max-tokens-to-oom --config-logger-dir",
        "not needed: nothing here depends on it",
    ),
    holds(
        "--check-weight-hash-across-dp-replicas-interval",
        "weights are sharded: no copies can drift apart",
    ),
    lacks("--batch-size --model-parallel-size --warmup", "Megatron-LM itself refuses it by now"),
)

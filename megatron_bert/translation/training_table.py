"""The arguments of training: length, batches, optimizer, schedule, and output."""

from __future__ import annotations

from megatron_bert.translation.argument import Argument, becomes, given, holds, lacks

TRAINING: tuple[Argument, ...] = (
    becomes(
        "--seq-length --encoder-seq-length",
        "curriculum.0.seq_length",
        "further stages with other lengths can follow in the same run",
    ),
    becomes("--train-iters", "curriculum.0.steps"),
    becomes("--train-samples", "curriculum.0.steps", "samples over rows in a step"),
    becomes("--global-batch-size", "batch.global_size", "rows; must be given", read=int),
    becomes("--micro-batch-size", "batch.micro_size", "rows", read=int),
    lacks(
        "--rampup-batch-size",
        "write stages of one length with a growing `batch.global_size`: docs/training.md",
    ),
    lacks(
        "--decrease-batch-size-if-needed --iterations-to-skip",
        "the batch fits every number of ranks, and no step is left out",
    ),
    holds(
        "--calculate-per-token-loss", "the loss always is the mean over the step's masked tokens"
    ),
    becomes("--seed", "run.seed", read=int, default="1234"),
    becomes("--deterministic-mode", "run.deterministic", read=given),
    becomes("--optimizer", "optimizer.name", "`adam`, `muon` and `dist_muon`", default="adam"),
    becomes("--lr", "optimizer.lr", "must be given", read=float),
    becomes("--min-lr", "optimizer.min_lr", read=float, default="0.0"),
    becomes("--weight-decay", "optimizer.weight_decay", read=float, default="0.01"),
    becomes("--adam-beta1", "optimizer.beta1", read=float, default="0.9"),
    becomes("--adam-beta2", "optimizer.beta2", read=float, default="0.999"),
    becomes("--adam-eps", "optimizer.eps", read=float, default="1e-8"),
    becomes("--clip-grad", "optimizer.clip_grad", read=float, default="1.0"),
    becomes("--muon-momentum", "optimizer.momentum", read=float),
    holds("--muon-use-nesterov", "Muon's momentum is Nesterov's"),
    lacks("--muon-*", "Muon has the steps and the scale described under `optimizer.name`"),
    lacks("--sgd-momentum", "there is no SGD"),
    lacks(
        "--start-weight-decay --end-weight-decay --weight-decay-incr-style",
        "weight decay stays as it is",
    ),
    lacks("--no-weight-decay-cond-type --apply-wd-to-qk-layernorm", "biases and norms never decay"),
    lacks("--decoupled-lr --decoupled-min-lr", "one learning rate serves all parameters"),
    becomes(
        "--lr-decay-style",
        "schedule.decay",
        "`linear`, `cosine`, `constant` and `WSD`",
        default="linear",
    ),
    lacks("--lr-decay-iters --lr-decay-samples", "the decay ends with the run"),
    becomes(
        "--lr-warmup-fraction",
        "schedule.warmup_fraction schedule.warmup_steps",
        "a share of all steps; of `--lr-decay-iters`, if given, and then written as steps",
    ),
    becomes("--lr-warmup-iters", "schedule.warmup_steps", default="0"),
    becomes("--lr-warmup-samples", "schedule.warmup_steps", "samples over rows in a step"),
    holds("--lr-warmup-init", "the warm-up begins at 0", values="0 0.0"),
    becomes("--lr-wsd-decay-iters", "schedule.wsd_decay_fraction", "as a share of all steps"),
    becomes("--lr-wsd-decay-samples", "schedule.wsd_decay_fraction", "as a share of all steps"),
    holds("--lr-wsd-decay-style", "the decay of `wsd` is linear", values="linear"),
    holds(
        "--override-opt_param-scheduler --use-checkpoint-opt_param-scheduler "
        "--override-opt-param-scheduler --use-checkpoint-opt-param-scheduler",
        "the configuration counts; what may change between jobs stands in docs/configuration.md",
    ),
    becomes("--eval-interval", "eval.interval", read=int, default="1000"),
    becomes(
        "--eval-iters",
        "eval.batches",
        "of 0 nothing is held out, and nothing evaluated",
        read=int,
        default="100",
    ),
    lacks("--skip-train --test-mode --full-validation", "evaluation comes with training"),
)

OUTPUT: tuple[Argument, ...] = (
    becomes("--save", "run.dir", "metrics and logs land there too"),
    becomes("--save-interval", "checkpoint.interval", read=int),
    becomes("--async-save", "checkpoint.async", read=given),
    holds("--load", "a run goes on from its own newest checkpoint; Megatron-LM's are not read"),
    lacks(
        "--finetune --pretrained-checkpoint --ckpt-step --no-load-optim --no-load-rng",
        "a new run begins at `checkpoint.resume: PATH`; see docs/checkpoints.md",
    ),
    lacks("--save-retain-interval", "`checkpoint.keep` is how many of the newest stay"),
    lacks("--no-save-optim --no-save-rng", "a checkpoint always is whole"),
    holds(
        "--use-checkpoint-args --no-initialization --exit-on-missing-checkpoint "
        "--auto-detect-ckpt-format --use-dist-ckpt --dist-ckpt-format --ckpt-format "
        "--ckpt-fully-parallel-save --ckpt-fully-parallel-load --no-ckpt-fully-parallel-save "
        "--ckpt-assume-constant-structure --ckpt-convert-* --dist-ckpt-strictness",
        "one format, written by all ranks, that any layout loads",
    ),
    lacks("--non-persistent-* --replication*", "checkpoints are files on a shared disk"),
    becomes("--log-interval", "log.interval", read=int, default="100"),
    becomes("--tensorboard-dir", "log.tensorboard", "in the run directory", read=given),
    becomes("--wandb-project", "log.wandb.project log.wandb.mode"),
    becomes("--wandb-exp-name", "log.wandb.name", read=str),
    holds("--wandb-*", "wandb's own environment variables say it"),
    holds(
        "--log-throughput --log-progress --log-params-norm --log-num-zeros-in-grad --log-*-to-* "
        "--no-log-*-to-* --tensorboard-* --timing-log-* --no-barrier-with-level-1-timing "
        "--logging-level --log-memory-interval",
        "docs/training.md lists what `metrics.jsonl` has of every step",
    ),
    becomes(
        "--profile",
        "profile.steps",
        "by PyTorch's profiler",
    ),
    becomes("--profile-step-start", "profile.steps", "counted from 0", default="10"),
    becomes("--profile-step-end", "profile.steps", "the first that is not recorded", default="12"),
    holds("--use-pytorch-profiler --record-memory-history", "`profile.steps` records both"),
    lacks("--profile-* --memory-snapshot-path --nvtx-ranges", "see docs/performance.md"),
    becomes("--exit-duration-in-mins", "run.max_minutes", read=float),
    lacks("--exit-interval --exit-signal", "stop by signal, `run.max_minutes` or `run.deadline`"),
    holds("--exit-signal-handler*", "SIGTERM and Ctrl-C save and stop"),
    holds(
        "--no-check-for-nan-in-loss-and-grad --check-for-*",
        "updates that are not finite are skipped, `optimizer.max_skipped`",
    ),
    lacks(
        "--log-straggler --disable-straggler-on-startup --straggler-* --run-workload-inspector-* "
        "--inprocess-* --enable-one-logger --no-one-logger --one-logger-* --app-tag-* "
        "--enable-ft-package --calc-ft-timeouts --ft-* --rerun-* --error-injection-* "
        "--adlr-autoresume* --result-rejected-tracker-filename --local_rank --yaml-cfg",
        "belongs to services around Megatron-LM; slow and failing ranks are told in "
        "docs/training.md",
    ),
)

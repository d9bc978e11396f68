"""Keys that depend on more than one of Megatron-LM's arguments."""

from __future__ import annotations

from typing import Any

from megatron_bert.errors import ConfigError
from megatron_bert.translation.given import Given, number

# Megatron-LM rounds the width of a gated MLP down to a multiple of this.
_FFN_MULTIPLE = 64
_DECAYS = {"linear": "linear", "cosine": "cosine", "constant": "constant", "WSD": "wsd"}
_OPTIMIZERS = {"adam": "adamw", "muon": "muon", "dist_muon": "muon"}
_MEGATRON_MAX_NGRAM = 3

# A name that no existing file will have by chance.
_UNNAMED = "NAME-THE-TOKENIZER.model"


class Builder:
    """A configuration under construction.

    Attributes:
        given: The arguments.
        tree: The keys set so far, by section.
        by_hand: What the user has to fill in.
        differs: What is done differently from Megatron-LM.
    """

    def __init__(self, given: Given) -> None:
        self.given = given
        self.tree: dict[str, Any] = {
            section: {} for section in ("run", "model", "data", "mlm", "curriculum", "batch")
        }
        self.by_hand: list[str] = []
        self.differs: list[str] = []

    def set(self, key: str, value: Any) -> None:
        """Set a dotted key that leads through sections only."""
        *sections, name = key.split(".")
        place = self.tree
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value


def set_compound_keys(builder: Builder) -> None:
    """Set all keys that depend on several arguments."""
    _set_shape(builder)
    _set_corpora(builder)
    _set_tokenizer(builder)
    _set_masking(builder)
    steps = _set_length(builder)
    _set_optimizer(builder)
    _set_schedule(builder, steps)
    _set_layout(builder)
    _set_precision(builder)
    _set_output(builder)
    builder.tree = {section: keys for section, keys in builder.tree.items() if keys}


def _set_shape(builder: Builder) -> None:
    given, model = builder.given, builder.tree["model"]
    heads, hidden = model["num_attention_heads"], model["hidden_size"]
    grouped = given.has("--group-query-attention")
    builder.set(
        "model.num_query_groups", given.read("--num-query-groups", int) if grouped else heads
    )
    if given.has("--ffn-hidden-size"):
        width = given.read("--ffn-hidden-size", int)
        plain = width
    else:
        plain = 4 * hidden
        width = _two_thirds(plain)
    if not given.has("--swiglu"):
        width = _two_thirds(plain)
        builder.differs.append(
            f"model.ffn_hidden_size = {width}: the MLP is gated (SwiGLU), and this width has about "
            f"the parameters of Megatron-LM's plain one of {plain}"
        )
    builder.set("model.ffn_hidden_size", width)
    if not given.has("--bert-no-binary-head"):
        builder.differs.append(
            "masked tokens are all that is predicted; without --bert-no-binary-head Megatron-LM "
            "also trains a head that tells whether two sentences follow each other"
        )


def _two_thirds(width: int) -> int:
    return max(1, width * 2 // 3 // _FFN_MULTIPLE) * _FFN_MULTIPLE


def _set_corpora(builder: Builder) -> None:
    given, data = builder.given, builder.tree["data"]
    flag = "--train-data-path" if given.has("--train-data-path") else "--data-path"
    data["train"] = _blend(flag, given.words(flag))
    if not data["train"]:
        data["train"] = [{"prefix": "data/train"}]
        builder.by_hand.append("data.train: no --data-path was given; name the datasets")
    if builder.tree["eval"]["batches"] == 0:
        del builder.tree["eval"]
        builder.differs.append(
            "data.valid and data.held_out_fraction are not set: with --eval-iters 0 nothing is "
            "evaluated, and every document is trained on; Megatron-LM leaves out those that "
            "--split gives to validation and test"
        )
    elif given.has("--valid-data-path"):
        corpora = _blend("--valid-data-path", given.words("--valid-data-path"))
        data["valid"] = [{"prefix": corpus["prefix"]} for corpus in corpora]
    elif flag == "--data-path":
        data["held_out_fraction"] = _held_out(given)


def _blend(flag: str, words: list[str]) -> list[dict[str, Any]]:
    """Corpora from `PREFIX`, `WEIGHT PREFIX ...` or `PREFIX PREFIX ...`."""
    weights = [number(word) for word in words[::2]]
    if len(words) < 2 or None in weights:
        alone = len(words) == 1
        return [{"prefix": word} if alone else {"prefix": word, "epochs": 1.0} for word in words]
    if len(words) % 2:
        raise ConfigError(
            f"{flag} {' '.join(words)}: the last weight has no dataset; give weights and prefixes "
            "in turn"
        )
    return [
        {"prefix": prefix, "weight": weight}
        for weight, prefix in zip(weights, words[1::2], strict=True)
    ]


def _held_out(given: Given) -> float:
    split = "".join(given.words("--split"))
    shares = [number(share) for share in split.split(",")]
    numbers = [share for share in shares if share is not None]
    if len(numbers) < len(shares) or sum(numbers) <= 0:
        raise ConfigError(f"--split {split}: give shares of training, validation and test: 98,2,0")
    return numbers[1] / sum(numbers) if len(numbers) > 1 else 0.0


def _set_tokenizer(builder: Builder) -> None:
    words = builder.given.words("--tokenizer-model")
    builder.tree["data"]["tokenizer"] = words[0] if words else _UNNAMED
    if not words:
        builder.by_hand.append(
            "data.tokenizer: no --tokenizer-model was given; name the SentencePiece model or "
            "tokenizer.json that the datasets are made with"
        )


def _set_masking(builder: Builder) -> None:
    """Mask spans of up to three tokens, as Megatron-LM's BERT does without any argument."""
    builder.set("mlm.unit", "ngram")
    builder.set("mlm.max_ngram", _MEGATRON_MAX_NGRAM)


def _set_length(builder: Builder) -> int:
    given = builder.given
    rows = builder.tree["batch"]["global_size"]
    if given.has("--train-iters"):
        steps = given.read("--train-iters", int)
    else:
        steps = given.read("--train-samples", int) // max(1, rows)
    length = given.read("--seq-length", int)
    builder.tree["curriculum"] = [{"seq_length": length, "steps": steps}]
    return steps


def _set_optimizer(builder: Builder) -> None:
    name = " ".join(builder.given.words("--optimizer"))
    if name not in _OPTIMIZERS:
        builder.differs.append(f"optimizer.name = adamw: there is no --optimizer {name}")
    builder.set("optimizer.name", _OPTIMIZERS.get(name, "adamw"))


def _set_schedule(builder: Builder, steps: int) -> None:
    given = builder.given
    rows = max(1, builder.tree["batch"]["global_size"])
    style = " ".join(given.words("--lr-decay-style"))
    if style not in _DECAYS:
        builder.differs.append(f"schedule.decay = linear: there is no --lr-decay-style {style}")
    builder.set("schedule.decay", _DECAYS.get(style, "linear"))
    decay = _steps_of(given, "--lr-decay-iters", "--lr-decay-samples", rows, steps)
    if given.has("--lr-warmup-fraction"):
        fraction = given.read("--lr-warmup-fraction", float)
        if decay == steps:
            builder.set("schedule.warmup_fraction", fraction)
        else:
            builder.set("schedule.warmup_steps", int(fraction * decay))
    else:
        warmup = given.read("--lr-warmup-iters", int)
        warmup = _steps_of(given, "--lr-warmup-iters", "--lr-warmup-samples", rows, warmup)
        builder.set("schedule.warmup_steps", warmup)
    if style == "WSD" and steps > 0:
        flags = ("--lr-wsd-decay-iters", "--lr-wsd-decay-samples")
        builder.set("schedule.wsd_decay_fraction", _steps_of(given, *flags, rows, steps) / steps)


def _steps_of(given: Given, iters: str, samples: str, rows: int, default: int) -> int:
    """A number of steps, given as such or in samples, of which a step has `rows`."""
    if given.has(iters):
        return given.read(iters, int)
    return given.read(samples, int) // rows if given.has(samples) else default


def _set_layout(builder: Builder) -> None:
    given, tree = builder.given, builder.tree
    parallel = tree.setdefault("parallel", {})
    if given.has("--sequence-parallel") and parallel.get("tensor", 1) > 1:
        parallel["sequence"] = True
    per_rank = tree["model"]["num_layers"] // max(1, parallel.get("pipeline", 1))
    parts = 1
    if given.has("--num-virtual-stages-per-pipeline-rank"):
        parts = given.read("--num-virtual-stages-per-pipeline-rank", int)
    elif given.has("--num-layers-per-virtual-pipeline-stage"):
        layers = given.read("--num-layers-per-virtual-pipeline-stage", int)
        parts = per_rank // max(1, layers)
    if parts > 1:
        parallel["pipeline_schedule"] = "interleaved"
        parallel["virtual_stages"] = parts
    if given.words("--data-parallel-sharding-strategy") == ["optim_grads_params"]:
        parallel["reshard_after_forward"] = True


def _set_precision(builder: Builder) -> None:
    given = builder.given
    half = given.has("--bf16") or given.has("--fp16")
    builder.set("precision.compute", "bf16" if half else "fp32")
    if given.has("--fp16"):
        builder.differs.append(
            "precision.compute = bf16: in place of --fp16; as wide in range as fp32, it needs no "
            "loss scaling"
        )
    if given.has("--fp8-format"):
        builder.set("precision.fp8", "current")


def _set_output(builder: Builder) -> None:
    given = builder.given
    if given.has("--save"):
        builder.set("run.dir", " ".join(given.words("--save")))
    if given.has("--load") and given.words("--load") != given.words("--save"):
        builder.by_hand.append(
            f"--load {' '.join(given.words('--load'))}: Megatron-LM's checkpoints are not read; a "
            "run goes on from its own newest one, or begins at checkpoint.resume"
        )
    if given.has("--tensorboard-dir"):
        folder = " ".join(given.words("--tensorboard-dir"))
        builder.differs.append(
            f"log.tensorboard = true: its files stand in the run directory, not in {folder}"
        )
    if given.has("--wandb-project"):
        builder.set("log.wandb.mode", "online")
        builder.set("log.wandb.project", " ".join(given.words("--wandb-project")))
    if given.has("--profile"):
        # Megatron-LM counts steps from 0 and does not record the last one.
        first = given.read("--profile-step-start", int) + 1
        builder.set("profile.steps", f"{first}:{given.read('--profile-step-end', int)}")

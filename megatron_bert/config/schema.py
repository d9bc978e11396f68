"""The configuration tree: one frozen class per section, one documented field per key.

The text under a field is its description: editors show it (docs/config.schema.json) and the
guide prints it (docs/configuration.md). A field's own limits are here; constraints between two or
more keys are in `checks`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StringConstraints,
    field_validator,
    model_validator,
)

from megatron_bert.config.architectures import ARCHITECTURES, Architecture, ArchitectureName
from megatron_bert.config.pipeline_schedules import (
    PLAIN_SCHEDULE,
    SCHEDULES,
    PipelineSchedule,
    ScheduleName,
)
from megatron_bert.config.presets import PRESETS, PresetName
from megatron_bert.config.run_paths import RunPaths

Text = Annotated[str, StringConstraints(min_length=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
BetweenZeroAndOne = Annotated[float, Field(gt=0.0, lt=1.0)]
DeviceChoice = Literal["auto", "cpu", "cuda"]
MaskUnit = Literal["token", "whole_word", "ngram"]
Recompute = Literal["none", "selective", "full"]
KernelsName = Literal["torch", "fused", "te", "apex"]
KernelsChoice = Literal["auto", KernelsName]

MIN_SEQ_LENGTH = 8
DEFAULT_MICRO_TOKENS = 16384
DEFAULT_WARMUP_FRACTION = 0.01
# Must equal the data core's bound on the tokens that are masked together.
MAX_UNIT_TOKENS = 8


class Section(BaseModel):
    """Base of all sections: no unknown keys, no silent conversions, no changes after loading."""

    model_config = ConfigDict(
        strict=True,
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class RunConfig(Section):
    """The run as a whole: where it writes, its seed, its time, its device."""

    dir: Text | None = None
    """Run directory: metrics, checkpoints, logs; `..` only at its beginning. Default: `runs/` + the
    config file's stem."""
    seed: int = Field(1234, ge=0, lt=2**63)
    """Seed of everything random: initial weights, order of rows, masks, dropout."""
    max_minutes: PositiveFloat | None = None
    """Stop cleanly, early enough that the last checkpoint is written within this many minutes of
    wall time, judging by how long steps and saves took. Default: no limit."""
    deadline: PositiveFloat | None = None
    """The same for a point in time, in seconds since 1970 (`date +%s`): a job's end, which does not
    move when ranks are restarted within the job. Default: no limit."""
    deterministic: bool | None = None
    """Give the same bits for the same topology, resumed or not. Default: true on CPU, false on
    CUDA."""
    device: DeviceChoice = "auto"
    """Where to compute; `auto` uses CUDA if there is a device, else the CPU."""

    @property
    def directory(self) -> Path:
        """The run directory; `load_config` has always set it."""
        assert self.dir is not None, "run.dir is set by load_config"
        return Path(self.dir)

    @property
    def paths(self) -> RunPaths:
        """The paths in the run directory."""
        return RunPaths(self.directory)


def _model_json_schema(schema: dict[str, Any]) -> None:
    """Tell editors that a preset replaces the required keys of the model's shape."""
    required = schema.pop("required")
    schema["anyOf"] = [
        {"required": ["preset"], "properties": {"preset": {"type": "string"}}},
        {"required": required},
    ]


@dataclass(frozen=True)
class OnlyOf:
    """Marks a key of the model that one architecture alone has a use for."""

    architecture: ArchitectureName


class ModelConfig(Section):
    """The encoder's shape; a preset fills in every key that is not given."""

    model_config = ConfigDict(json_schema_extra=_model_json_schema)

    preset: PresetName | None = None
    """A published model's shape; keys given beside it override its values."""
    num_layers: PositiveInt
    """Transformer blocks."""
    hidden_size: PositiveInt
    """Width of the residual stream; a multiple of `num_attention_heads`."""
    ffn_hidden_size: PositiveInt
    """Width of the gated MLP: columns of each of the gate and up projections."""
    num_attention_heads: PositiveInt
    """Query heads."""
    num_query_groups: PositiveInt
    """Key/value heads: 1 is multi-query attention; `num_attention_heads` is multi-head attention,
    which `architecture: modernbert` requires."""
    max_position_embeddings: PositiveInt
    """The longest segment, in tokens; also the rows of a learned position table."""
    vocab_size: PositiveInt | None = None
    """Rows of the embedding table. Default: the tokenizer's pieces, padded to a multiple of 128."""
    architecture: ArchitectureName = "retrievabert"
    """Family: `retrievabert` has learned positions, biases and SwiGLU; `modernbert` has rotary
    positions, no biases, GEGLU, and local layers between those that see whole segments."""
    hidden_dropout: BelowOne = 0.1
    """Dropout probability on the embeddings and on each sub-layer's output."""
    attention_dropout: BelowOne = 0.1
    """Dropout probability on the attention weights."""
    norm_eps: PositiveFloat = 1e-12
    """Epsilon of every LayerNorm."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights; divided by sqrt(2 num_layers) for output
    projections."""

    rope_theta: Annotated[PositiveFloat, OnlyOf("modernbert")] = 160_000.0
    """`modernbert`: base of the wavelengths of rotary positions in layers that see whole
    segments."""
    local_rope_theta: Annotated[PositiveFloat, OnlyOf("modernbert")] = 10_000.0
    """`modernbert`: the same in local layers."""
    local_attention: Annotated[int, Field(ge=2, multiple_of=2), OnlyOf("modernbert")] = 128
    """`modernbert`: width of a local layer's window, in tokens: half of it to each side."""
    global_attention_every: Annotated[PositiveInt, OnlyOf("modernbert")] = 3
    """`modernbert`: one in this many layers, starting with the first, sees whole segments; with 1
    all layers do."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        preset = given.get("preset")
        # An unknown name is left to the field's own validation, which lists the right ones.
        return {**PRESETS[preset], **given} if preset in tuple(PRESETS) else given

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def kv_size(self) -> int:
        """Channels of the keys of all heads; the values have as many."""
        return self.num_query_groups * self.head_dim

    def kv_ranks(self, tensor: int) -> int:
        """Number of ranks of a tensor-parallel group over which keys and values are sharded.

        It is 1 if their heads do not divide evenly over the ranks: each rank then holds them all.
        """
        return tensor if self.num_query_groups % tensor == 0 else 1

    @property
    def family(self) -> Architecture:
        """What distinguishes the architecture apart from its sizes."""
        return ARCHITECTURES[self.architecture]

    @property
    def unused_keys(self) -> frozenset[str]:
        """Keys that mean nothing for this architecture."""
        return frozenset(
            name
            for name, field in type(self).model_fields.items()
            for mark in field.metadata
            if isinstance(mark, OnlyOf) and mark.architecture != self.architecture
        )

    def is_local(self, layer: int) -> bool:
        """Whether tokens in the layer with this number see only their neighbourhood."""
        return self.family.alternates and layer % self.global_attention_every != 0


class Corpus(Section):
    """One tokenized dataset."""

    prefix: Text
    """Path of the dataset without its suffix: PREFIX.bin, PREFIX.idx, PREFIX.json."""
    weight: PositiveFloat | None = None
    """Share of the rows, relative to the other corpora's weights (they need not sum to 1).
    Default: 1, unless `epochs` is given."""
    epochs: PositiveFloat | None = None
    """How often the corpus is read, relative to the others; given for every corpus, in place of
    weights. The plan says if the curriculum is too short or too long to read it that often."""

    @property
    def weight_or_default(self) -> float:
        """The weight that applies if corpora are blended by weight."""
        return 1.0 if self.weight is None else self.weight


class DataConfig(Section):
    """The tokenizer and the tokenized datasets."""

    tokenizer: Text
    """Path of the SentencePiece `.model` or `tokenizer.json` that made the data."""
    train: tuple[Corpus, ...] = Field(strict=False, min_length=1)
    """Training corpora, blended by weight or by epochs within every curriculum stage."""
    valid: tuple[Corpus, ...] = Field((), strict=False)
    """Held-out corpora, each evaluated by itself (neither weights nor epochs are used).
    Default: none."""
    held_out_fraction: float = Field(0.0, ge=0.0, lt=0.5)
    """Share of each training corpus' documents, chosen by a hash of the document's number, that
    is never trained on and is evaluated beside `data.valid`."""
    threads: PositiveInt = 1
    """Threads that assemble a rank's batches, ahead of the step that learns from them; the rows
    are the same for any number."""


class MlmConfig(Section):
    """Masked language modelling: what is hidden and what replaces it."""

    probability: BetweenZeroAndOne = 0.15
    """Share of a row's text tokens that are to be predicted."""
    unit: MaskUnit = "token"
    """What is masked together: single tokens, whole words, or spans of up to `max_ngram` tokens."""
    max_ngram: int = Field(3, ge=1, le=MAX_UNIT_TOKENS)
    """Longest span of the unit `ngram`, in tokens; length k is drawn in proportion to 1/k."""
    mask_ratio: Fraction = 0.8
    """Share of the chosen tokens that become the mask token."""
    random_ratio: Fraction = 0.1
    """Share that become a random token; the rest stay as they are."""


class StageBatch(Section):
    """The stage's global batch."""

    global_size: PositiveInt | None = None
    """Rows in one optimizer step of the stage. Default: `batch.global_size`."""


class StageMlm(Section):
    """The stage's masking."""

    probability: BetweenZeroAndOne | None = None
    """Share of a row's text tokens that are to be predicted. Default: `mlm.probability`."""


class Stage(Section):
    """One stretch of the curriculum with rows of one length and steps of one size."""

    seq_length: int = Field(ge=MIN_SEQ_LENGTH)
    """Token slots in a row."""
    steps: PositiveInt
    """Optimizer steps of the stage."""
    batch: StageBatch = StageBatch()
    """The stage's global batch."""
    mlm: StageMlm = StageMlm()
    """The stage's masking."""
    lr_factor: PositiveFloat = 1.0
    """Factor by which the scheduled learning rate is multiplied in the stage."""


class BatchConfig(Section):
    """The global batch and how much of it a rank takes at a time."""

    global_size: PositiveInt
    """Rows in one optimizer step, over all ranks; a stage may have its own."""
    micro_size: PositiveInt | None = None
    """Maximum rows in one forward pass of one rank; give this or `micro_tokens`."""
    micro_tokens: PositiveInt | None = None
    """Maximum token slots in one forward pass of one rank (at least one row). Default: 16384."""

    def max_micro_rows(self, seq_length: int) -> int:
        """Maximum rows of `seq_length` slots that one rank takes in one forward pass."""
        if self.micro_size is not None:
            return self.micro_size
        micro_tokens = DEFAULT_MICRO_TOKENS if self.micro_tokens is None else self.micro_tokens
        return self.rows_in(micro_tokens, seq_length)

    @staticmethod
    def rows_in(micro_tokens: int, seq_length: int) -> int:
        """How many rows of `seq_length` slots fit in `micro_tokens` slots, but at least one."""
        return max(1, micro_tokens // seq_length)


class OptimizerConfig(Section):
    """The optimizer and gradient clipping."""

    name: Literal["adamw", "muon"] = "adamw"
    """`muon` updates the blocks' matrices by orthogonalised momentum, at AdamW's learning rate; the
    rest (embeddings, head, norms, biases) stays with AdamW. A new run that changes it starts with
    all optimizer states at zero."""
    lr: PositiveFloat = 1.5e-4
    """Peak learning rate."""
    min_lr: NonNegativeFloat = 1e-6
    """Learning rate at the end of the decay."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay; biases and norms are not decayed."""
    beta1: BelowOne = 0.9
    """Decay of the first moment."""
    beta2: BelowOne = 0.999
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    momentum: BelowOne = 0.95
    """`muon`: decay of the matrices' momentum, which is Nesterov's."""
    clip_grad: NonNegativeFloat = 1.0
    """Largest global L2 norm of the gradient; 0 turns clipping off."""
    max_skipped: NonNegativeInt = 10
    """Updates that may be skipped in a row, for a loss or gradient that is not finite, before the
    run ends."""


class ScheduleConfig(Section):
    """The learning rate over the whole curriculum."""

    decay: Literal["linear", "cosine", "wsd", "constant"] = "linear"
    """Shape after the warm-up; `wsd` stays at the peak and decays at the end."""
    warmup_fraction: Fraction | None = None
    """Linear warm-up as a share of all steps; give this or `warmup_steps`. Default: 0.01."""
    warmup_steps: NonNegativeInt | None = None
    """Linear warm-up in steps."""
    wsd_decay_fraction: float = Field(0.1, gt=0.0, le=1.0)
    """Share of all steps in which `wsd` decays, at the run's end."""


class ParallelConfig(Section):
    """How ranks divide the model and the batch; data parallelism takes the ranks left over."""

    tensor: PositiveInt = 1
    """Ranks that share each layer's matrices and heads."""
    pipeline: PositiveInt = 1
    """Pipeline ranks: groups of ranks that hold consecutive blocks."""
    sequence: bool = False
    """Split norms, dropout and the residual stream by tokens within a tensor-parallel group."""
    pipeline_schedule: ScheduleName = PLAIN_SCHEDULE
    """Order of the micro-batches in the pipeline. `zero_bubble` is interleaved too; it takes
    neither compilation nor recomputation."""
    virtual_stages: int = Field(2, ge=2)
    """Parts of the model that each pipeline rank holds under an interleaved schedule."""
    replicate: PositiveInt = 1
    """Copies of the sharded weights within data parallelism (HSDP)."""
    reshard_after_forward: bool = False
    """Also free a block's gathered weights after its forward pass, and gather them again for the
    backward pass of every micro-batch (ZeRO-3): less memory, more messages."""
    layout: Literal["manual", "auto"] = "manual"
    """With `auto` each job takes the layout predicted to be the fastest on its ranks; this
    section's keys, `batch.micro_tokens`, `batch.micro_size` and `recompute` are then ignored."""
    network: Text | None = None
    """`layout: auto`: the network between nodes, as an adapter and the number of them in a node,
    such as `ndr200x4`. Default: the InfiniBand adapters that a node shows, else one `ndr200` a
    GPU."""

    @property
    def schedule(self) -> PipelineSchedule:
        """What distinguishes the pipeline's schedule; a single rank has the plain one."""
        return SCHEDULES[PLAIN_SCHEDULE if self.pipeline == 1 else self.pipeline_schedule]


class PrecisionConfig(Section):
    """Number formats; weights, summed gradients and optimizer states are always fp32."""

    compute: Literal["bf16", "fp32"] = "bf16"
    """Format of forward and backward."""
    reduce: Literal["fp32", "bf16"] = "fp32"
    """Format in which gradients are added up over a step's micro-batches and reduced over the
    data-parallel ranks, where there are several; `bf16` halves what is sent and held."""
    fp8: Literal["none", "current"] = "none"
    """Compute products of the blocks' linear layers in FP8, scaled by what is then known of their
    operands (`current`; nothing is kept from step to step). With `kernels: fused` these are the
    products of the feed-forward networks, and a run stays with that choice; otherwise they are all
    products, each operand scaled by its own largest number, by PyTorch or, with `kernels: te`,
    Transformer Engine. Works on GPUs of compute capability 8.9 and up, and slowly on CPUs."""


class CheckpointConfig(Section):
    """When checkpoints are written, how many stay, where a job starts from."""

    interval: PositiveInt = 1000
    """Steps between checkpoints; a job always writes one at its end."""
    keep: PositiveInt = 3
    """Newest complete checkpoints that stay on disk."""
    async_: bool = Field(False, alias="async")
    """Write in the background while training goes on, from a copy in the host's memory."""
    max_failures: PositiveInt = 3
    """Saves that may fail in a row before the run ends; the last save of a job must succeed."""
    resume: Text = "auto"
    """`auto`: the run's newest complete checkpoint, if any; `none`: start anew; or the PATH of a
    checkpoint, to branch off into a new `run.dir`."""


class EvalConfig(Section):
    """Evaluation on the held-out corpora."""

    interval: PositiveInt = 1000
    """Steps between evaluations; the last step is always evaluated."""
    batches: PositiveInt = 16
    """Batches of `batch.global_size` rows per corpus and length, at most one epoch of the
    corpus."""
    fixed_seq_length: Annotated[int, Field(ge=MIN_SEQ_LENGTH)] | None = None
    """Length evaluated in every stage in addition to the stage's own, in token slots; it makes
    stages comparable. Default: 512, or the longest stage if that is shorter."""


class WandbConfig(Section):
    """Weights & Biases."""

    mode: Literal["online", "offline", "disabled"] = "disabled"
    """Whether and where metrics are sent. A service that cannot be reached slows no step."""
    project: Text = "megatron_bert"
    """Project of the run; wandb itself handles the account (`WANDB_API_KEY`)."""
    name: Text | None = None
    """Name of the run. Default: the name of the run directory."""


class LogConfig(Section):
    """What is reported in addition to `metrics.jsonl`."""

    interval: PositiveInt = 10
    """Steps between progress lines; `metrics.jsonl` has every step."""
    wandb: WandbConfig = WandbConfig()
    """Weights & Biases."""
    tensorboard: bool = False
    """Write TensorBoard event files into the run directory."""


class ProfileConfig(Section):
    """Recording what some steps spend time and memory on."""

    steps: Text | None = None
    """`A:B`: record steps A to B (inclusive, counted from 1) into `run.dir/profile`: PyTorch's
    trace and, on CUDA, the memory's history. Default: none."""


class CompileConfig(Section):
    """torch.compile and CUDA graphs."""

    enabled: bool = False
    """Compile each transformer block. On CUDA, `kernels: auto` has faster kernels without it, and
    means `torch` with it."""
    cuda_graphs: Literal["auto", True, False] = "auto"
    """Record a micro-batch's forward and backward pass at a stage's first step and replay it: with
    few tokens per micro-batch, launching kernels one by one takes longer than computing. `auto`: on
    CUDA wherever passes can be recorded, that is, without tensor parallelism, pipelines,
    `parallel.reshard_after_forward`, `compile.enabled` and other packages' kernels; `true` refuses
    these. The sums of gradients (4 bytes a parameter) stay allocated from step to step. Measured on
    one GPU, not on several yet."""

    @field_validator("cuda_graphs", mode="before")
    @classmethod
    def _is_no_number(cls, value: object) -> object:
        # In Python 1 equals True, so 1 would pass as one of the values.
        if isinstance(value, int | float) and not isinstance(value, bool):
            raise ValueError("a number")
        return value


class DistributedConfig(Section):
    """The process group."""

    timeout_seconds: PositiveFloat = 1800.0
    """Longest wait for a message from other ranks and, on CUDA, for the end of a step that waits
    for them. After that the run ends on all ranks, within another 16 s, naming the rank that does
    not answer (on CUDA not always, see docs/training.md)."""


class Config(Section):
    """A whole pretraining run."""

    run: RunConfig = RunConfig()
    """The run as a whole: where it writes, its seed, its time, its device."""
    model: ModelConfig
    """The encoder's shape."""
    data: DataConfig
    """The tokenizer and the tokenized datasets."""
    mlm: MlmConfig = MlmConfig()
    """What is masked."""
    curriculum: tuple[Stage, ...] = Field(strict=False, min_length=1)
    """Stages of the run, in order; each has rows of one length and may have a batch size, a masking
    rate and a learning-rate factor of its own."""
    batch: BatchConfig
    """The global batch and its division."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer and gradient clipping."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The learning rate over the whole curriculum."""
    parallel: ParallelConfig = ParallelConfig()
    """How ranks divide the model and the batch."""
    precision: PrecisionConfig = PrecisionConfig()
    """Number formats."""
    recompute: Recompute = "none"
    """Activations that the backward pass recomputes instead of keeping: none, attention's scores
    and softmax (`selective`), or all but each block's input (`full`)."""
    kernels: KernelsChoice = "auto"
    """What computes linear layers, norms and the update: PyTorch (`torch`); PyTorch with our own
    kernels for what is between a block's products (`fused`, in place of `compile.enabled`);
    Transformer Engine (`te`: the blocks' linear layers) or NVIDIA's Apex (`apex`: norms with a
    bias, and AdamW), each if installed. `auto`: what was measured fastest, `fused` where possible
    (a GPU of compute capability 8.0 or more, Triton, `precision.compute: bf16`,
    `compile.enabled: false`, `precision.fp8: none` or `parallel.tensor: 1`), else `torch`."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When checkpoints are written, how many stay, where a job starts from."""
    eval: EvalConfig = EvalConfig()
    """Evaluation on the held-out corpora."""
    log: LogConfig = LogConfig()
    """What is reported."""
    profile: ProfileConfig = ProfileConfig()
    """Recording what some steps spend time and memory on."""
    compile: CompileConfig = CompileConfig()
    """torch.compile and CUDA graphs."""
    distributed: DistributedConfig = DistributedConfig()
    """The process group."""

    def with_keys(self, values: Mapping[str, Any]) -> Config:
        """Return a copy with other values of some keys (`name`, `section.name`), unchecked."""
        update: dict[str, Any] = {}
        by_section: dict[str, dict[str, Any]] = {}
        for key, value in values.items():
            section, dot, name = key.partition(".")
            # `model_copy` would accept a key that does not exist.
            owner = getattr(self, section) if dot else self
            assert (name or section) in type(owner).model_fields, key
            if dot:
                by_section.setdefault(section, {})[name] = value
            else:
                update[section] = value
        for section, its in by_section.items():
            update[section] = getattr(self, section).model_copy(update=its)
        return self.model_copy(update=update)

"""Write the predicted tables of the documentation, and a picture.

`python -m megatron_bert.planner.emit_scaling` writes what stands between the markers of
`docs/scaling.md`, and the picture that it shows, from `examples/retrievabert_1.3b.yaml` and the
machines of the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_bert.command_line.emitted_tables import guide_to_write, with_tables
from megatron_bert.command_line.run import run_cli
from megatron_bert.config.load import load_config
from megatron_bert.config.presets import LLM_JP_VOCABULARY
from megatron_bert.config.schema import Config
from megatron_bert.files import write_atomically
from megatron_bert.planner.data_parallel_choices import DataParallelChoices
from megatron_bert.planner.machines import GIB, Machine, find_machine
from megatron_bert.planner.plan import Plan
from megatron_bert.planner.plots import write_picture
from megatron_bert.planner.rank_parts import rank_parts
from megatron_bert.planner.search import make_plan
from megatron_bert.planner.wording import describe_layout

GUIDE_FILE = "scaling.md"
PICTURE_FILE = "scaling_30b_512.svg"
_RECIPE = Path(__file__).resolve().parents[2] / "examples" / "retrievabert_1.3b.yaml"

# Shapes of published models of these sizes.
_LARGE = {
    "7B": ("32", "4096", "11008", "32"),
    "30B": ("64", "6144", "16384", "48"),
}


def render(guide: str) -> str:
    """The guide with its tables regenerated; text outside the markers is kept.

    Raises:
        ConfigError: A marker is missing.
    """
    tables = {"retrievabert": _retrievabert(), "one-day": _one_day(), "large": _large()}
    return with_tables(guide, GUIDE_FILE, tables)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the tables and the picture into the folder given by `--docs`."""
    guide = guide_to_write(arguments, GUIDE_FILE, __doc__)
    write_atomically(guide, render(guide.read_text(encoding="utf-8")))
    write_picture(_pictured(), guide.with_name(PICTURE_FILE))
    return 0


def _pictured() -> Plan:
    """The plan to draw: one whose best layout has a pipeline."""
    machine = find_machine("h100-80gb", 8, "ndr400x8")
    return _plan(_large_config(_LARGE["30B"], 4096), machine, 512)


def _plan(config: Config, machine: Machine, ranks: int) -> Plan:
    return make_plan(config, LLM_JP_VOCABULARY, machine, ranks, keep=1)


def _retrievabert() -> Iterator[str]:
    """The recipe on TSUBAME 4."""
    config, machine = load_config(_RECIPE), find_machine("h100-94gb", 4, "ndr200x4")
    lengths = [stage.seq_length for stage in config.curriculum]
    yield (
        f"| GPUs | layout | GiB | {' | '.join(f'{n}: ms, MFU' for n in lengths)} | days | "
        "GPU hours | of linear |"
    )
    yield f"|{'---|' * (6 + len(lengths))}"
    first = None
    for ranks in (4, 8, 16, 32, 64, 128):
        best = _plan(config, machine, ranks).best[0]
        first = first or best.gpu_hours
        steps = " | ".join(
            f"{1e3 * stage.step.total:,.0f}, {100 * stage.mfu:.0f} %" for stage in best.stages
        )
        yield (
            f"| {ranks} | {describe_layout(best.layout)} | {best.peak_bytes / GIB:.0f} | {steps} | "
            f"{best.days:.2f} | {best.gpu_hours:,.0f} | {100 * first / best.gpu_hours:.0f} % |"
        )


def _one_day() -> Iterator[str]:
    """32 GPUs on several networks, with gradients reduced in fp32 and in BF16."""
    config = load_config(_RECIPE)
    yield (
        "| network of a node of 4 | reduction | layout | all messages | 128: ms | not hidden | "
        "512: ms | not hidden | days |"
    )
    yield f"|{'---|' * 9}"
    for network in ("ndr400x4", "ndr200x4", "hdr100x4", "ndr200x1", "eth100x1"):
        machine = find_machine("h100-94gb", 4, network)
        for reduce, name in (("fp32", "fp32"), ("bf16", "BF16")):
            plan = _plan(config.with_keys({"precision.reduce": reduce}), machine, 32)
            best = plan.best[0]
            short, long = best.stages[0].step, best.stages[2].step
            yield (
                f"| {network} ({machine.network.per_node:g} GB/s) | {name} | "
                f"{describe_layout(best.layout)} | {1e3 * _all_messages(plan):.0f} | "
                f"{1e3 * short.total:.0f} | {1e3 * (short.gather + short.reduce):.0f} | "
                f"{1e3 * long.total:.0f} | {1e3 * (long.gather + long.reduce):.0f} | "
                f"{best.days:.2f} |"
            )


def _all_messages(plan: Plan) -> float:
    """Seconds of a step's all-gathers and reductions over data-parallel ranks, hidden or not."""
    layout = plan.best[0].layout
    choices = DataParallelChoices.one(plan.job, layout)
    layers = max(part.layers for part in rank_parts(plan.job, layout.split))
    blocks = layers * (choices.gather.item() + choices.reduce.item())
    return blocks + choices.root_gather.item() + choices.root_reduce.item()


def _large() -> Iterator[str]:
    """Larger encoders at length 2,048, on nodes of 8 GPUs."""
    machine = find_machine("h100-80gb", 8, "ndr400x8")
    yield (
        "| model | rows a step | GPUs | layout | GiB | ms a step | M tokens/s | MFU | days for "
        "1 T tokens |"
    )
    yield f"|{'---|' * 9}"
    for name, sizes in _LARGE.items():
        for rows in (1024, 4096):
            config = _large_config(sizes, rows)
            for ranks in (512, 1024, 2048, 4096):
                best = _plan(config, machine, ranks).best[0]
                stage = best.stages[0]
                yield (
                    f"| {name} | {rows:,} | {ranks:,} | {describe_layout(best.layout)} | "
                    f"{best.peak_bytes / GIB:.0f} | {1e3 * stage.step.total:,.0f} | "
                    f"{stage.tokens_per_second / 1e6:.1f} | {100 * stage.mfu:.0f} % | "
                    f"{1e12 / stage.tokens_per_second / 86400:.2f} |"
                )


def _large_config(sizes: tuple[str, ...], rows: int) -> Config:
    layers, hidden, ffn, heads = sizes
    return load_config(
        _RECIPE,
        [
            f"model.num_layers={layers}",
            f"model.hidden_size={hidden}",
            f"model.ffn_hidden_size={ffn}",
            f"model.num_attention_heads={heads}",
            f"model.num_query_groups={heads}",
            "curriculum=[{seq_length: 2048, steps: 1000}]",
            f"batch.global_size={rows}",
        ],
    )


if __name__ == "__main__":
    run_cli(main)

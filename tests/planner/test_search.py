"""All legal layouts are looked at, the best is found, and what is said of it can be used."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest

from megatron_bert.config.batch_layout import BatchLayout
from megatron_bert.config.checks import check_config, value_problems
from megatron_bert.config.layout_checks import legal_layouts
from megatron_bert.errors import ConfigError
from megatron_bert.planner import search
from megatron_bert.planner.data_parallel_choices import DataParallelChoices
from megatron_bert.planner.layouts import Layout, Split, all_splits, micro_token_choices
from megatron_bert.planner.machines import GIB, GPUS, find_machine, find_network, gpu_of_device
from megatron_bert.planner.memory import memory
from megatron_bert.planner.ordering import SCARCE_PERCENT
from megatron_bert.planner.plan import LayoutPlan
from megatron_bert.planner.report import describe
from megatron_bert.planner.search import make_plan
from megatron_bert.planner.step import StepModel
from megatron_bert.planner.wording import significant, unit_for
from tests.planner.jobs import VOCABULARY, job, recipe

_ENOUGH = 1 - SCARCE_PERCENT / 100


@pytest.mark.parametrize(("ranks", "most"), [(64, 2.0), (4096, 1.0)])
def test_a_plan_takes_about_a_second_of_computing_however_many_gpus(
    ranks: int, most: float
) -> None:
    seconds: list[float] = []
    # Other work on the machine slows each of them.
    while len(seconds) < 3 and min(seconds, default=most) >= most:
        began = time.process_time()
        make_plan(recipe(), VOCABULARY, find_machine("h100-80gb"), ranks)
        seconds.append(time.process_time() - began)
    assert min(seconds) < most, seconds


def test_every_way_to_share_the_model_that_the_checks_allow_is_looked_at() -> None:
    config = recipe()
    found = {(s.tensor, s.pipeline) for s in all_splits(config, 16, VOCABULARY)}
    legal = {(layout.tensor, layout.pipeline) for layout in legal_layouts(config, 16, VOCABULARY)}
    assert found == legal


@pytest.mark.parametrize("ranks", [1, 6, 32, 512])
def test_every_layout_that_is_offered_passes_the_checks_of_training(ranks: int) -> None:
    plan = make_plan(recipe(), VOCABULARY, find_machine("h100-80gb"), ranks)
    for entry in [*plan.best, *(other for _, other in plan.alternatives), *plan.of_stages]:
        config = entry.layout.put_into(recipe())
        check_config(config, world_size=ranks, vocab_size=VOCABULARY)


def test_zero_bubble_is_offered_only_where_blocks_are_not_compiled() -> None:
    compiled = all_splits(recipe("compile.enabled=true"), 8, VOCABULARY)
    plain = all_splits(recipe(), 8, VOCABULARY)
    assert "zero_bubble" not in {split.schedule for split in compiled}
    assert "zero_bubble" in {split.schedule for split in plain}


@pytest.mark.parametrize(
    ("override", "refused"),
    [
        ("kernels=te", lambda split: split.schedule == "zero_bubble"),
        # 8 rows of key and value heads each: FP8 products have sides of a multiple of 16.
        ("precision.fp8=current", lambda split: 4096 // split.tensor % 16),
    ],
)
def test_what_kernels_and_fp8_refuse_is_not_offered(
    override: str, refused: Callable[[Split], bool]
) -> None:
    config = recipe("model.num_attention_heads=24", override)
    splits = list(all_splits(config, 48, VOCABULARY))
    assert splits
    assert not any(map(refused, splits))
    for split in splits:
        asked = Layout(split, 16384, "none").put_into(config)
        assert not value_problems(asked)


@pytest.mark.parametrize(
    "split",
    [
        Split(1, False, 1, "1f1b", 1, 48),
        Split(2, True, 4, "1f1b", 1, 6),
        Split(1, False, 8, "interleaved", 2, 6),
    ],
)
def test_micro_batches_are_those_that_training_makes_of_the_keys(split: Split) -> None:
    planned = job(48)
    for micro_tokens in micro_token_choices(planned.spans, split):
        layout = Layout(split, micro_tokens, "none")
        config = layout.put_into(planned.config)
        for span in planned.spans:
            of_training = BatchLayout.of(config, span.global_size, span.seq_length, split.data)
            assert planned.batch(layout, span) == of_training


def test_the_best_is_the_quickest_of_those_that_fit_and_others_are_not_quicker() -> None:
    plan = make_plan(recipe(), VOCABULARY, find_machine("h100-94gb"), 32)
    for first, second in pairwise(plan.best):
        assert first.days < 1.005 * second.days
    free = plan.job.machine.usable_bytes
    assert all(entry.peak_bytes <= free for entry in plan.best)
    assert all(1.005 * entry.days > plan.best[0].days for _, entry in plan.alternatives)
    assert plan.too_large > 0


def test_no_ranked_layout_is_quicker_than_the_alternative_of_its_choice() -> None:
    config, machine = recipe("parallel.layout=auto"), find_machine("h100-94gb")
    plan = make_plan(config, VOCABULARY, machine, 32, keep=10)
    others = dict(plan.alternatives)
    stages = plan.best[0].layout.split.pipeline
    ranked = [entry for entry in plan.best if entry.layout.split.pipeline != stages]
    assert ranked
    assert others["parallel.pipeline"].days <= min(entry.days for entry in ranked)


@pytest.mark.parametrize(("ranks", "gpu"), [(4, "a100-40gb"), (24, "h100-94gb"), (64, "h200")])
def test_how_many_layouts_are_kept_changes_nothing_in_those_kept(ranks: int, gpu: str) -> None:
    few, many = (
        make_plan(recipe(), VOCABULARY, find_machine(gpu), ranks, keep=keep) for keep in (10, 40)
    )
    assert len(few.best) == 10 < len(many.best)
    assert many.best[:10] == few.best
    assert many.alternatives == few.alternatives


@pytest.mark.parametrize(("ranks", "gpu"), [(24, "h100-94gb"), (32, "h100-94gb")])
def test_a_layout_has_the_same_time_wherever_a_plan_names_it(ranks: int, gpu: str) -> None:
    plan = make_plan(recipe(), VOCABULARY, find_machine(gpu), ranks, keep=60)
    others = dict(plan.alternatives)
    assert all(entry.is_simulated for entry in (*plan.best, *plan.of_stages, *others.values()))
    days = {entry.layout: entry.days for entry in plan.best}
    assert others["parallel.pipeline"].layout in days
    for entry in others.values():
        assert days.get(entry.layout, entry.days) == entry.days


def test_the_ranking_is_that_of_all_layouts_simulated() -> None:
    small = recipe("model.num_layers=8", "curriculum=[{seq_length: 512, steps: 100}]")
    plan = make_plan(small, VOCABULARY, find_machine("h100-94gb"), 4, keep=1000)
    of = plan.job
    quickest: dict[Split, float] = {}
    for split in all_splits(small, 4, VOCABULARY):
        for micro_tokens in micro_token_choices(of.spans, split):
            layout = Layout(split, micro_tokens, "none")
            model = StepModel(of, layout, of.spans[0])
            free = 0.95 * of.machine.usable_bytes
            if memory(of, layout, of.spans[0]).total <= free:
                step = model.step(DataParallelChoices.one(of, layout), model.simulated_bubble())
                quickest[split] = min(step.total, quickest.get(split, math.inf))
    assert {entry.layout.split for entry in plan.best} == set(quickest)
    for entry in plan.best:
        # Copies or freed weights may be faster, simpler layouts slower by 0.5 %.
        assert entry.stages[0].step.total < 1.005 * quickest[entry.layout.split]


def test_what_was_not_simulated_is_marked_and_still_has_one_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, machine = recipe(), find_machine("h100-94gb")
    whole = make_plan(config, VOCABULARY, machine, 4, keep=60)
    assert "at least" not in "".join(describe(whole))
    monkeypatch.setattr(search, "_MOST_SIMULATED_ACTIONS", 200_000)
    few, many = (make_plan(config, VOCABULARY, machine, 4, keep=keep) for keep in (10, 60))
    assert many.best[:10] == few.best
    known = {entry.layout: entry.days for entry in whole.best}
    left = [entry for entry in many.best if not entry.is_simulated]
    assert left
    assert any(entry.is_simulated for entry in many.best if entry.layout.split.pipeline > 1)
    assert all(entry.days <= known.get(entry.layout, math.inf) for entry in left)
    lines = list(describe(many))
    marked = [line for line in lines if "[at least: its pipeline was not simulated]" in line]
    assert len(marked) == len(left)
    days = {entry.layout: entry.days for entry in many.best}
    for _, entry in many.alternatives:
        assert days.get(entry.layout, entry.days) == entry.days
    monkeypatch.setattr(search, "_MOST_SIMULATED_ACTIONS", 0)
    none = "\n".join(describe(make_plan(config, VOCABULARY, machine, 4)))
    assert re.search(r"  parallel.pipeline=\d+: at least \d", none)


def test_layouts_that_leave_little_memory_come_after_all_that_leave_more() -> None:
    machine = find_machine("h100-94gb")
    plan = make_plan(recipe(), VOCABULARY, machine, 12, keep=1000)
    spare = [entry.peak_bytes <= _ENOUGH * machine.usable_bytes for entry in plan.best]
    assert spare == sorted(spare, reverse=True)
    assert spare[0]
    assert plan.tight is not None
    assert plan.tight.days < plan.best[0].days
    assert plan.tight.peak_bytes > _ENOUGH * machine.usable_bytes
    assert all(entry.peak_bytes <= _ENOUGH * machine.usable_bytes for _, entry in plan.alternatives)
    lines = list(describe(plan))
    assert any(
        line.startswith(f"why this one: the quickest with {SCARCE_PERCENT:g} % of the")
        for line in lines
    )
    assert any(
        line.startswith(f"  less than {SCARCE_PERCENT:g} % of the memory left: 3.")
        for line in lines
    )
    assert not any("run out of it" in line for line in lines)


def test_a_layout_that_leaves_little_memory_is_the_best_only_if_all_do_and_is_warned_of() -> None:
    machine = find_machine("h100-94gb")
    usable = machine.usable_bytes
    smallest = make_plan(recipe(), VOCABULARY, machine, 4, keep=1).smallest.peak_bytes
    small = machine.with_memory(machine.gpu.memory_gib - (usable - 1.03 * smallest) / GIB)
    plan = make_plan(recipe(), VOCABULARY, small, 4)
    assert plan.best[0].peak_bytes > _ENOUGH * small.usable_bytes
    assert plan.tight is None
    text = "\n".join(describe(plan))
    assert f"every layout that fits leaves less than {SCARCE_PERCENT:g} % of the memory" in text
    assert f"[less than {SCARCE_PERCENT:g} % of the memory is left]" in text


def test_what_stands_beside_the_ranking_does_not_depend_on_how_many_are_kept() -> None:
    # The ranking ends before all pipelines that it would like to are simulated.
    machine = replace(find_machine("h100-80gb"), network=find_network("hdr100x1"))
    few, more = (make_plan(recipe(), VOCABULARY, machine, 256, keep=keep) for keep in (1, 10))
    assert few.alternatives == more.alternatives
    assert few.of_stages == more.of_stages


def test_each_way_to_share_the_model_is_ranked_once() -> None:
    plan = make_plan(recipe(), VOCABULARY, find_machine("h100-80gb"), 64)
    splits = [entry.layout.split for entry in plan.best]
    assert len(splits) == len(set(splits)) == 10


@pytest.mark.parametrize("ranks", [2, 4])
def test_where_the_host_limits_the_simplest_layout_is_the_best(ranks: int) -> None:
    tiny = recipe(
        "model.num_layers=4",
        "model.hidden_size=128",
        "model.ffn_hidden_size=384",
        "model.num_attention_heads=2",
        "curriculum=[{seq_length: 128, steps: 800}]",
        "batch.global_size=16",
    )
    best = make_plan(tiny, VOCABULARY, find_machine("h100-80gb"), ranks).best[0].layout
    assert (best.split.tensor, best.split.pipeline, best.recompute) == (1, 1, "none")
    assert not best.split.sequence
    assert not best.reshard_after_forward


def test_recorded_passes_are_offered_the_layouts_in_which_they_can_be_recorded() -> None:
    recorded = recipe("compile.cuda_graphs=true")
    plan = make_plan(recorded, VOCABULARY, find_machine("h100-80gb"), 8)
    layouts = [entry.layout for entry in plan.best]
    assert {(layout.split.tensor, layout.split.pipeline) for layout in layouts} == {(1, 1)}
    assert not any(layout.reshard_after_forward for layout in layouts)


def test_where_passes_may_be_recorded_each_layout_is_counted_as_it_trains() -> None:
    keys = ("model.num_layers=8", "curriculum=[{seq_length: 128, steps: 100}]")
    plans = {
        value: make_plan(
            recipe(*keys, f"compile.cuda_graphs={value}"),
            VOCABULARY,
            find_machine("h100-80gb"),
            4,
            keep=50,
        )
        for value in ("auto", "true", "false")
    }
    auto, asked, launched = plans.values()
    assert auto.legal == launched.legal > asked.legal
    best = {
        name: {entry.layout.split: entry for entry in plan.best} for name, plan in plans.items()
    }
    recorded = [split for split in best["auto"] if split.tensor == split.pipeline == 1]
    others = [split for split in best["auto"] if split not in recorded]
    assert recorded
    assert others
    for split in recorded:
        assert best["auto"][split] == best["true"][split]
        assert best["auto"][split].days < best["false"][split].days
    for split in others:
        assert best["auto"][split] == best["false"][split]
    # Where weights are freed between passes these are launched, as they are in training.
    freed = {value: dict(plan.alternatives) for value, plan in plans.items()}
    name = "parallel.reshard_after_forward"
    assert name not in freed["true"]
    assert freed["auto"][name] == freed["false"][name]
    assert freed["auto"][name].layout.reshard_after_forward


def test_recorded_passes_keep_sums_of_gradients_and_the_memory_of_a_pass() -> None:
    layout = Layout(Split(1, False, 1, "1f1b", 1, 8), 10**6, "none")
    # However many micro-batches a step has.
    kept, usual = (
        memory(of, layout, of.spans[-1]).gradients
        for of in (job(8), job(8, "compile.cuda_graphs=false"))
    )
    assert kept > usual
    freed = replace(layout, reshard_after_forward=True)
    same, usual = (
        memory(of, freed, of.spans[-1]) for of in (job(8), job(8, "compile.cuda_graphs=false"))
    )
    assert same == usual
    recorded, launched = (
        memory(of, layout, of.spans[-1]).total
        for of in (
            job(8, "optimizer.name=muon", f"compile.cuda_graphs={value}")
            for value in ("auto", "false")
        )
    )
    assert recorded > launched


def test_days_and_gpu_hours_are_those_of_all_steps() -> None:
    plan = make_plan(recipe(), VOCABULARY, find_machine("h100-80gb"), 8)
    best: LayoutPlan = plan.best[0]
    spans = plan.job.spans
    seconds = sum(
        stage.step.total * span.num_steps for stage, span in zip(best.stages, spans, strict=True)
    )
    assert best.days == pytest.approx(seconds / 86400)
    assert best.gpu_hours == pytest.approx(8 * seconds / 3600)
    for stage, span in zip(best.stages, spans, strict=True):
        assert stage.tokens_per_second == pytest.approx(span.slots_per_step / stage.step.total)
        assert 0.0 < stage.mfu < 1.0


def test_what_fits_nowhere_is_refused_with_what_it_would_take() -> None:
    huge = recipe("model.num_layers=200", "model.hidden_size=12288", "model.ffn_hidden_size=32768")
    with pytest.raises(ConfigError, match=r"layouts of 2 x a100-40gb fits: the smallest takes"):
        make_plan(huge, VOCABULARY, find_machine("a100-40gb"), 2)


def test_ranks_that_no_layout_has_are_refused_as_training_refuses_them() -> None:
    # Its own layout counts for nothing, and is no reason.
    for own in ((), ("parallel.tensor=7", "parallel.layout=auto")):
        with pytest.raises(ConfigError, match=r"^batch.global_size = 1024: fewer than the 2053"):
            make_plan(recipe(*own), VOCABULARY, find_machine("h200"), 2053)


def test_the_size_of_micro_batches_is_chosen_whatever_the_keys_say() -> None:
    config = recipe("parallel.layout=auto", "batch.micro_size=4", "batch.micro_tokens=4096")
    best = make_plan(config, VOCABULARY, find_machine("h100-80gb"), 8).best[0]
    assert best.layout.put_into(config).batch.micro_size is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("h1000",), ["gpu='h1000'", *GPUS]),
        (("h200", 0), ["nodes_of=0", "at least 1"]),
        (("h200", 8, "ndr200"), ["network ndr200 of network", "ndr200x4"]),
        (("h200", 8, "tin100x4"), ["network tin100x4 of network", "hdr200"]),
    ],
)
def test_unknown_machines_are_refused_with_those_known(
    arguments: tuple[str], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        find_machine(*arguments)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("device", "gib", "name"),
    [
        ("NVIDIA H100 80GB HBM3", 79.2, "h100-80gb"),
        ("NVIDIA H100", 93.0, "h100-94gb"),
        ("NVIDIA H200", 139.8, "h200"),
        ("NVIDIA A100-SXM4-80GB", 79.1, "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40gb"),
        ("A100-SXM4-40GB", 39.4, "a100-40gb"),
        ("NVIDIA H100 PCIe", 79.1, None),
        ("NVIDIA H100 NVL", 93.1, None),
        ("NVIDIA H200 NVL", 139.8, None),
        ("NVIDIA GH200 480GB", 94.5, None),
        ("NVIDIA GH200 144G HBM3e", 139.8, None),
        ("NVIDIA A100-PCIE-40GB", 39.4, None),
        ("NVIDIA A100 80GB PCIe", 79.1, None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", 39.4, None),
        ("NVIDIA A100-10C", 10.0, None),
        ("NVIDIA H20", 95.0, None),
        ("NVIDIA GeForce RTX 3090", 23.7, None),
    ],
)
def test_a_device_is_found_in_the_table_by_its_name_and_memory_where_it_is_a_whole_sxm_module(
    device: str, gib: float, name: str | None
) -> None:
    assert gpu_of_device(device, gib) == name


@pytest.mark.parametrize(
    ("number", "written"),
    [(0.0, "0"), (0.04432, "0.0443"), (2.0, "2.00"), (132.7, "133"), (1_254_967.0, "1,250,000")],
)
def test_a_predicted_number_has_three_digits(number: float, written: str) -> None:
    assert significant(number) == written


def test_the_numbers_of_a_column_have_as_many_decimals_as_the_best_needs_for_three_digits() -> None:
    days = unit_for(1.684 * 86400, "days", 86400.0)
    assert [days.show(86400 * number) for number in (1.684, 2.0, 12.345)] == [
        "1.68",
        "2.00",
        "12.35",
    ]
    seconds = unit_for(1286.4, "seconds", 1.0)
    assert [seconds.show(number) for number in (1286.4, 2.0)] == ["1,286", "2"]

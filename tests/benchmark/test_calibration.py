"""A measured machine is stored beside the built-in ones, and planned for like them."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bert.benchmark.calibration import QUICK, _all_reduce, _facts, _rates, calibrate
from megatron_bert.errors import ConfigError
from megatron_bert.planner.calibrated import (
    Calibration,
    calibration_of_device,
    machine_by_name,
    measured_machine,
    read_calibration,
)
from megatron_bert.planner.job import Job
from megatron_bert.planner.network import Group
from megatron_bert.planner.search import make_plan
from tests.benchmark.device_clock import DeviceClock
from tests.distributed_harness import run_ranks
from tests.planner.jobs import VOCABULARY, recipe


def _measure(name: str) -> Calibration:
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    return calibrate(name, torch.device("cpu"), lambda _: None, sizes=QUICK)


@pytest.fixture(scope="module")
def measured() -> Calibration:
    """This machine, by two ranks."""
    return run_ranks(2, _measure, "here")[0]


def test_products_norms_attention_and_messages_are_measured(measured: Calibration) -> None:
    assert set(measured.curves) == {"gemm_bf16", "gemm_fp32", "norm", "attention", "all_reduce"}
    assert all(all(value >= 0 for value in point) for c in measured.curves.values() for point in c)
    quickest = max(2 * side**3 / seconds for side, seconds in measured.curves["gemm_fp32"])
    assert 1e12 * measured.gpu.fp32_tflops == pytest.approx(quickest)
    # Facts are what was measured, so that all of it is reached.
    assert measured.rates.gemm == pytest.approx(1.0)
    # Of two ranks each sends as many bytes as are summed.
    quickest = max(size / seconds for size, seconds in measured.curves["all_reduce"])
    assert measured.gpu.link == pytest.approx(quickest / 1e9)
    assert measured.rates.link == 1.0


def _count_sums() -> int:
    """All-reduces of a GPU's measurement, on a rank whose clock says that it is the slower."""
    sums, ones, all_reduce = 0, torch.ones, dist.all_reduce
    with pytest.MonkeyPatch.context() as patch:
        clock = DeviceClock(patch)

        def count(numbers: Tensor) -> None:
            nonlocal sums
            sums += 1
            clock.seconds += 1e-3 * (1 + dist.get_rank())
            all_reduce(numbers)

        patch.setattr(torch, "ones", lambda size, device: ones(size))
        patch.setattr(dist, "all_reduce", count)
        _all_reduce(4096, torch.device("cuda", 0))
    return sums


def test_ranks_whose_clocks_differ_take_part_in_as_many_sums() -> None:
    faster, slower = run_ranks(2, _count_sums)
    assert faster == slower > 20


@pytest.mark.parametrize(
    ("device", "is_measured"), [("NVIDIA H100 80GB HBM3", False), ("NVIDIA H100 PCIe", True)]
)
def test_facts_of_a_gpu_that_the_table_lacks_are_measured(
    measured: Calibration, monkeypatch: pytest.MonkeyPatch, device: str, is_measured: bool
) -> None:
    class Properties:
        name = device
        total_memory = 80 * 2**30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    # One rank's: of links nothing was measured.
    curves = {name: curve for name, curve in measured.curves.items() if name != "all_reduce"}
    facts, measured_facts = _facts("new", torch.device("cuda"), curves)
    assert measured_facts == is_measured
    assert (facts.source == "measured") == is_measured
    quickest = max(2e-12 * side**3 / seconds for side, seconds in curves["gemm_bf16"])
    assert facts.bf16_tflops == pytest.approx(quickest if is_measured else 989.0)
    rates = _rates(facts, is_measured, QUICK, curves, torch.bfloat16, None)
    assert (rates.gemm == pytest.approx(1.0)) == is_measured
    assert (rates.elementwise == pytest.approx(1.0)) == is_measured


def test_a_stored_machine_is_read_back_and_planned_for(
    measured: Calibration, tmp_path: Path
) -> None:
    path = measured.save(tmp_path / "machines")
    assert path.name == "here.json"
    assert read_calibration(path) == measured
    machine = machine_by_name("here", path.parent, 4)
    assert machine.gpu == measured.gpu
    assert machine.rates == measured.rates
    slow = recipe("curriculum=[{seq_length: 128, steps: 2}]", "model.num_layers=2")
    assert make_plan(slow, VOCABULARY, machine, 2).best


def test_unknown_names_list_the_measured_machines_too(
    measured: Calibration, tmp_path: Path
) -> None:
    measured.save(tmp_path)
    with pytest.raises(ConfigError, match=r"gpu='there': not known; use one of h100-80gb, .*here"):
        machine_by_name("there", tmp_path)


@pytest.mark.parametrize("name", ["h200", "../elsewhere", ""])
def test_names_that_are_taken_or_no_names_of_files_are_refused(
    measured: Calibration, tmp_path: Path, name: str
) -> None:
    renamed = dataclasses.replace(measured, gpu=dataclasses.replace(measured.gpu, name=name))
    with pytest.raises(ConfigError, match="calibration_name"):
        renamed.save(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["cut", "negative", "missing"])
def test_a_damaged_file_is_refused_by_its_name(
    measured: Calibration, tmp_path: Path, damage: str
) -> None:
    path = measured.save(tmp_path)
    values = json.loads(path.read_text())
    if damage == "negative":
        values["rates"]["gemm"] = -1
    if damage == "missing":
        del values["gpu"]["link"]
    path.write_text("{" if damage == "cut" else json.dumps(values))
    with pytest.raises(ConfigError, match=r"here.json is no calibration"):
        read_calibration(path)


def test_a_job_finds_its_device_s_calibration_beside_one_that_cannot_be_read(
    measured: Calibration, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "broken.json").write_text("{")
    measured.save(tmp_path)
    assert calibration_of_device(measured.device, tmp_path) == measured
    assert "broken.json is no calibration" in caplog.text
    assert calibration_of_device("another", tmp_path) is None


def test_only_the_machine_that_is_asked_for_is_read_and_rates_unknown_to_it_are_the_usual_ones(
    measured: Calibration, tmp_path: Path
) -> None:
    path = measured.save(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    values = json.loads(path.read_text())
    del values["rates"]["host_message"]
    path.write_text(json.dumps(values))
    assert machine_by_name("here", tmp_path).rates == measured.rates
    assert machine_by_name("h200", tmp_path).gpu.kind == "cuda"
    with pytest.raises(ConfigError, match=r"broken.json is no calibration"):
        machine_by_name("broken", tmp_path)


def test_a_measured_cpu_is_planned_as_one(measured: Calibration, tmp_path: Path) -> None:
    measured.save(tmp_path)
    machine = machine_by_name("here", tmp_path)
    assert machine.gpu.kind == "cpu"
    assert not Job(recipe(), VOCABULARY, machine, 1).has_kernel


def test_a_measured_latency_gives_back_what_the_smallest_message_took(
    measured: Calibration,
) -> None:
    machine = measured_machine(measured, nodes_of=2)
    took = measured.curves["all_reduce"][0]
    predicted = Group(2, 1).sum(machine, took[0])
    assert took[1] <= predicted < 3 * took[1]

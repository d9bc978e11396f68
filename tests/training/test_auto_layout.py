"""`parallel.layout: auto` takes the planner's layout, which learns what it does by hand."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_bert.config.load import dump_config
from megatron_bert.config.schema import Config
from megatron_bert.data.vocabulary import padded_vocab_size
from megatron_bert.errors import UserError
from megatron_bert.planner.machines import GIB, find_machine
from megatron_bert.planner.search import make_plan
from megatron_bert.run.metrics import read
from megatron_bert.training import auto_layout
from megatron_bert.training.auto_layout import with_layout
from megatron_bert.training.main import main
from tests.deadlines import DEADLINE_SECONDS
from tests.distributed_harness import run_ranks
from tests.training.runs import steps_of, train


def _chosen(config: Config) -> Config:
    return with_layout(config, torch.distributed.get_world_size())


def _train(config: Config) -> list[dict[str, Any]]:
    return train(config)


def _train_as_chosen(config: Config) -> list[dict[str, Any]]:
    return train(_chosen(config))


CHECKOUT = Path(__file__).resolve().parents[2]
LAYOUT_KEYS = {"parallel", "batch", "recompute"}


def test_two_ranks_that_choose_learn_what_the_same_layout_by_hand_does(
    tiny_run: Callable[..., Config],
) -> None:
    automatic = tiny_run("automatic", parallel={"layout": "auto"})
    chosen = run_ranks(2, _chosen, automatic)
    assert chosen[0] == chosen[1]
    assert chosen[0].parallel.layout == "auto"
    by_hand = chosen[0].model_dump()
    by_hand["parallel"]["layout"] = "manual"
    manual = tiny_run("manual", **{key: by_hand[key] for key in LAYOUT_KEYS})

    found = steps_of(run_ranks(2, _train_as_chosen, automatic)[0])
    expected = steps_of(run_ranks(2, _train, manual)[0])
    assert list(found) == list(expected)
    for step, line in found.items():
        for key in ("loss", "grad_norm", "batch_hash"):
            assert line[key] == expected[step][key], step


def test_a_run_begun_with_a_layout_by_hand_goes_on_with_a_chosen_one(
    tiny_run: Callable[..., Config], tmp_path: Path
) -> None:
    run_ranks(1, _train, tiny_run(batch={"micro_size": 2}, curriculum=_SHORT))
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(tiny_run(batch={"micro_size": 2}, curriculum=_LONGER)))
    command = [sys.executable, str(CHECKOUT / "pretrain_bert.py"), "--config", str(path)]
    done = subprocess.run(
        [*command, "parallel.layout=auto"], capture_output=True, text=True, timeout=DEADLINE_SECONDS
    )
    assert done.returncode == 0, done.stderr
    assert "layout      chosen for 1 x cpu, network eth10x1: tensor 1, data 1" in done.stdout
    assert list(steps_of(read(tmp_path / "run" / "metrics.jsonl"))) == [1, 2, 3, 4]
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["parallel"]["layout"] == "auto"
    assert written["batch"]["micro_size"] is None


_SHORT = [{"seq_length": 32, "steps": 2}]
_LONGER = [{"seq_length": 32, "steps": 4}]


def test_the_dry_run_shows_the_layout_that_would_be_chosen(
    tiny_run: Callable[..., Config],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(tiny_run(parallel={"layout": "auto", "tensor": 3})))
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["--config", str(path), "--dry-run"]) == 0
    assert "layout      chosen for 4 x cpu" in caplog.text


@pytest.mark.parametrize(("share", "warned"), [(1.03, True), (1.5, False)])
def test_a_chosen_layout_that_may_run_out_of_memory_is_warned_of(
    tiny_run: Callable[..., Config],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    share: float,
    warned: bool,
) -> None:
    config, machine = tiny_run(parallel={"layout": "auto"}), find_machine("cpu", 1)
    smallest = make_plan(config, padded_vocab_size(config), machine, 1).smallest.peak_bytes
    reserved = machine.gpu.memory_gib - machine.usable_bytes / GIB
    small = machine.with_memory(reserved + share * smallest / GIB)
    monkeypatch.setattr(auto_layout, "_machine_of", lambda *_: small)
    with_layout(config, 1)
    assert ("this one may run out of it" in caplog.text) == warned


def test_the_network_is_what_the_key_names_or_the_nodes_adapters_send(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_run: Callable[..., Config]
) -> None:
    for name, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "4: ACTIVE"), ("mlx5_2", "1: DOWN")):
        port = tmp_path / name / "ports" / "1"
        port.mkdir(parents=True)
        (port / "rate").write_text("200 Gb/sec (4X HDR)\n")
        (port / "state").write_text(f"{state}\n")
    monkeypatch.setattr(auto_layout, "_ADAPTERS", tmp_path)
    cpu = torch.device("cpu")
    assert auto_layout._machine_of(cpu, None).network.per_node == 50.0
    assert auto_layout._machine_of(cpu, "eth25x2").network.per_node == 6.25
    with pytest.raises(UserError, match=r"network wet of parallel.network is not known"):
        with_layout(tiny_run(parallel={"layout": "auto", "network": "wet"}), 1)


@pytest.mark.parametrize("device", ["Some Accelerator 9000", "NVIDIA H100 PCIe"])
def test_a_device_that_the_planner_does_not_know_is_refused(
    tiny_run: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    class Facts:
        name = device
        total_memory = 2**34

    monkeypatch.setattr(auto_layout, "choose_device", lambda _: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Facts)
    with pytest.raises(UserError, match=rf"nothing is known of {device}, only of .*--calibrate"):
        with_layout(tiny_run(parallel={"layout": "auto"}), 1)

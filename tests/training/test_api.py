"""What `megatron_bert.api` gives to notebooks."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from megatron_bert import api
from megatron_bert.config.load import config_dict, load_config
from megatron_bert.config.schema import Config
from megatron_bert.training.metrics import read
from megatron_bert.training.run_directory import FINISHED, STOPPED


def test_a_configuration_at_hand_is_checked_as_one_in_a_file(
    tiny_run: Callable[..., Config], tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(api.dump_config(tiny_run()))
    tree = config_dict(load_config(path))
    assert api.build_config(tree, ["run.seed=3"]) == load_config(path, ["run.seed=3"])
    assert tree["run"]["seed"] == 11
    del tree["run"]["dir"]
    assert api.build_config(tree, name="mine").run.dir == "runs/mine"
    for wrong, message in (
        ("optimzer.lr=1", r"optimzer\.lr = 1 \(command line\): unknown key; .*optimizer\.lr"),
        ("model.num_query_groups=3", r"model\.num_query_groups = 3: does not divide"),
    ):
        with pytest.raises(api.UserError, match=message):
            api.build_config(tree, [wrong])


def test_the_batch_of_a_step_is_the_one_that_training_reads(
    tiny_run: Callable[..., Config],
) -> None:
    config = tiny_run()
    batch = api.read_batch(config, 1)
    rows = api.rows_as_text(config, 1, rows=3).splitlines()
    assert sum(re.match(r"row \d+: ", line) is not None for line in rows) == 3
    assert f"step 1 stage 0 batch_hash {batch.batch_hash:016x}" in rows
    assert f"batch_hash {batch.batch_hash:016x}" in api.rows_as_html(config, 1)
    assert batch.tokens_BS.shape == (12, 32)


def test_training_goes_on_step_by_step_and_gives_the_signals_back(
    tiny_run: Callable[..., Config],
) -> None:
    handler, print_traceback = signal.getsignal(signal.SIGINT), sys.excepthook
    config = tiny_run(
        curriculum=[{"seq_length": 32, "steps": 3}],
        checkpoint={"async": False},
        eval={"interval": 3},
    )
    first = api.train(config, max_steps=2)
    assert list(first.columns["step"]) == [1, 2]
    (line, *_) = read(config.run.directory / "metrics.jsonl")
    assert line["batch_hash"] == f"{api.read_batch(config, 1).batch_hash:016x}"
    assert not first.evaluations
    assert (config.run.directory / STOPPED).exists()
    last = api.train(config, max_steps=5)
    assert list(last.columns["step"]) == [1, 2, 3]
    assert np.isfinite(last.evaluations[-1]["valid_loss"])
    assert (config.run.directory / FINISHED).exists()
    assert signal.getsignal(signal.SIGINT) is handler
    assert sys.excepthook is print_traceback
    with pytest.raises(api.UserError, match="max_steps = 0: give 1 or more"):
        api.train(config, max_steps=0)
    with (
        ThreadPoolExecutor(1) as other,
        pytest.raises(api.UserError, match="call it in the main thread"),
    ):
        other.submit(api.train, config).result()


def test_the_package_itself_loads_neither_the_api_nor_torch() -> None:
    look = (
        "import sys, megatron_bert; sys.exit(bool({'torch', 'megatron_bert.api'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", look], check=False).returncode == 0

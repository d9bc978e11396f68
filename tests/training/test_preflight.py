from __future__ import annotations

import errno
import hashlib
import math
import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bert.config.schema import Config
from megatron_bert.errors import UserError
from megatron_bert.training import preflight
from megatron_bert.training.preflight import (
    CommunicationError,
    check_ranks_agree,
    check_run_directory_is_shared,
    code_facts,
    measure_all_reduce,
)
from tests.distributed_harness import run_ranks
from tests.training.runs import train

HOST = re.escape(socket.gethostname())


def _message(check: Callable[[], object]) -> str | None:
    try:
        check()
    except UserError as error:
        return str(error)
    return None


def _look_into(folders: list[Path]) -> str | None:
    return _message(lambda: check_run_directory_is_shared(folders[dist.get_rank()], 0.0))


def test_a_run_directory_that_all_ranks_see_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    assert run_ranks(3, _look_into, [tmp_path] * 3) == [None] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_full_disk_under_a_run_directory_is_told_and_nothing_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: Path, _text: str) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", write)
    message = _message(lambda: check_run_directory_is_shared(tmp_path))
    assert message is not None
    assert f"run.dir {tmp_path}: nothing can be written there (No space left" in message
    assert "free space on its disk" in message
    assert list(tmp_path.iterdir()) == []


def test_ranks_that_see_another_run_directory_are_named_on_all_ranks(tmp_path: Path) -> None:
    shared, other = tmp_path / "shared", tmp_path / "other"
    shared.mkdir()
    other.mkdir()
    folders = [shared, other, shared, tmp_path / "missing"]
    messages = run_ranks(4, _look_into, folders)
    for message in messages:
        assert message is not None
        assert re.search(rf"ranks 1, 3 \(host {HOST}\) cannot see what rank 0", message)
        assert "run.dir" in message
    assert list(shared.iterdir()) == list(other.iterdir()) == []


def _compare(facts: list[dict[str, Any]]) -> str | None:
    return _message(lambda: check_ranks_agree(facts[dist.get_rank()]))


def test_ranks_that_hold_the_same_pass() -> None:
    facts = {"optimizer": {"lr": 0.1}, "curriculum": [{"steps": 3}], "hash": "a"}
    assert run_ranks(2, _compare, [facts, facts]) == [None, None]


def test_ranks_that_differ_are_named_with_what_they_hold_on_all_ranks() -> None:
    usual = {"optimizer": {"lr": 0.1}, "curriculum": [{"steps": 3}], "hash": "a", "texts": []}
    odd = {"optimizer": {"lr": 0.2}, "curriculum": [{"steps": 3}, {"steps": 4}], "hash": "a"}
    odd |= {"texts": {}, "units": []}
    messages = run_ranks(3, _compare, [odd, usual, usual])
    assert len(set(messages)) == 1
    assert messages[0] is not None
    lines = messages[0].splitlines()
    assert re.fullmatch(
        rf"optimizer\.lr is 0\.2 on rank 0 \(host {HOST}\), but 0\.1 on 2 ranks, such as rank 1",
        lines[1],
    )
    assert lines[0].startswith("curriculum.1.steps is 4 on rank 0 (")
    assert lines[0].endswith("but absent on 2 ranks, such as rank 1")
    # What holds nothing is still something else than nothing, or another thing that holds nothing.
    assert lines[2].startswith("texts is {} on rank 0 (")
    assert lines[2].endswith("but [] on 2 ranks, such as rank 1")
    assert lines[3].startswith("units is [] on rank 0 (")
    assert lines[3].endswith("but absent on 2 ranks, such as rank 1")
    assert len(lines) == 5


def test_values_that_differ_beyond_what_is_shown_of_them_differ() -> None:
    facts = [{"text": 500 * "x" + end} for end in "ab"]
    assert all(message is not None for message in run_ranks(2, _compare, facts))


def test_the_code_is_known_by_every_byte_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = code_facts()
    assert before == code_facts()
    package = Path(preflight.__file__).parents[1]
    shutil.copytree(package, tmp_path / "copy")
    monkeypatch.setattr("megatron_bert.__file__", str(tmp_path / "copy" / "__init__.py"))
    assert code_facts() == before
    with (tmp_path / "copy" / "training" / "step.py").open("a") as file:
        file.write("\n")
    after = code_facts()
    assert {name for name in after if after[name] != before[name]} == {
        "hash of megatron_bert's code"
    }


def test_the_data_core_is_known_by_the_sources_it_was_built_from() -> None:
    sources = Path(__file__).parents[2] / "csrc"
    lines = [
        f"csrc/{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n"
        for path in sorted(sources.iterdir())
        if path.suffix in (".cpp", ".h")
    ]
    built_from = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert code_facts()["hash of the data core's sources"] == built_from[:16]


def test_a_data_core_of_an_older_build_is_one_that_differs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = code_facts()
    monkeypatch.delattr("_megatron_bert_core.SOURCE_HASH")
    assert code_facts()["hash of the data core's sources"] == "an older build"
    assert code_facts() != before


def _measure() -> str | None:
    return measure_all_reduce(torch.device("cpu"))


def test_the_all_reduce_is_told_with_its_bandwidth() -> None:
    assert run_ranks(1, _measure) == [None]
    for line in run_ranks(2, _measure):
        assert re.fullmatch(
            r"all-reduce  4 MiB over 2 ranks in [\d.]+ ms, [\d.]+ GB/s a rank", line
        )


def _measure_on_a_bad_network() -> str | None:
    own = dist.all_reduce

    def corrupt(numbers: Tensor) -> None:
        own(numbers)
        if dist.get_rank() == 1:
            numbers[7] = math.nan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", corrupt)
        try:
            _measure()
        except CommunicationError as error:
            return str(error)
    return None


def test_a_wrong_sum_is_told_by_the_rank_that_got_it() -> None:
    good, bad = run_ranks(2, _measure_on_a_bad_network)
    assert good is None
    assert bad is not None
    assert "instead of 3 on rank 1" in bad


def test_the_sum_of_ten_thousand_ranks_is_exact_in_whatever_order_they_are_added(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranks = 10_000
    given: list[float] = []
    monkeypatch.setattr(preflight, "_ALL_REDUCE_BYTES", {"cpu": 4})
    monkeypatch.setattr(dist, "get_world_size", lambda: ranks)
    monkeypatch.setattr(dist, "all_reduce", lambda numbers: given.append(numbers.item()))
    for rank in range(ranks):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        with pytest.raises(CommunicationError):
            _measure()
    # Each tried it twice. One after another in fp32, as a ring of ranks does.
    numbers = np.array(given[::2], dtype=np.float32)
    for order in (numbers, numbers[::-1], np.sort(numbers)):
        total = np.add.accumulate(order)[-1]
        monkeypatch.setattr(dist, "all_reduce", lambda numbers, total=total: numbers.fill_(total))
        assert "over 10,000 ranks" in (_measure() or "")
    assert len(set(given[:128:2])) == 64


def _train_on(configs: list[Config]) -> str | None:
    return _message(lambda: train(configs[dist.get_rank()]))


def test_data_that_differs_between_ranks_is_refused(
    tiny_run: Callable[..., Config], tiny_data: Path
) -> None:
    own = tiny_run()
    other = tiny_run(data={"train": [{"prefix": str(tiny_data / "valid")}]})
    for message in run_ranks(2, _train_on, [own, other]):
        assert message is not None
        assert message.startswith("content of data.train.0 is ")
        assert "on rank 1" in message

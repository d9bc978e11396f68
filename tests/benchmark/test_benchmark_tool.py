from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from megatron_bert.benchmark.data import measure as data_benchmark
from megatron_bert.errors import ConfigError, DataError
from tests.deadlines import DEADLINE_SECONDS
from tools import benchmark as tool

RATE = {"type": "number", "exclusiveMinimum": 0}
SHARE = {"type": "number", "minimum": 0, "maximum": 1}
TEXT = {"type": "string", "minLength": 1}


def fields(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def by_length(schema: dict[str, Any]) -> dict[str, Any]:
    return fields(**dict.fromkeys(("128", "512", "2048"), schema))


ASSEMBLE = by_length(fields(tokens_per_second_per_core=RATE, core_share=RATE))
BY_KIND = fields(paragraphs=by_length(SHARE), articles=by_length(SHARE))
SCHEMA = fields(
    hardware=fields(processor=TEXT, cores=RATE, memory_gb=RATE),
    versions=fields(python=TEXT, **{"megatron-bert": TEXT, "sentencepiece": TEXT}),
    quick={"const": True},
    plan=fields(documents=RATE, tokens=RATE, seconds=RATE, peak_rss_mb=RATE, kept_mb=RATE),
    assemble=ASSEMBLE,
    assemble_paragraphs=ASSEMBLE,
    assemble_ngram=ASSEMBLE,
    fill=BY_KIND,
    seen_once=BY_KIND,
    memory=fields(data_mb={"type": "number"}, growth_mb={"type": "number"}),
    preprocess=fields(tokens_per_second=RATE, sentencepiece_tokens_per_second=RATE),
)


def run_tool(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, tool.__file__, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder, timeout=DEADLINE_SECONDS
    )


def run(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    return run_tool("data", "--quick", *arguments, folder=folder)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    done = run("--json", folder=tmp_path_factory.mktemp("anywhere"))
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_standard_output_is_one_json_document_with_every_figure(quick: dict[str, Any]) -> None:
    jsonschema.validate(quick, SCHEMA)


def test_rows_are_full_and_an_epoch_sees_every_token_once(quick: dict[str, Any]) -> None:
    for kind in ("paragraphs", "articles"):
        assert all(share == 1 for share in quick["seen_once"][kind].values())
        assert all(share >= 0.99 for share in quick["fill"][kind].values())


def test_planning_writes_no_file_and_the_data_side_does_not_grow(quick: dict[str, Any]) -> None:
    assert quick["plan"]["bytes_written"] == 0
    assert quick["memory"]["growth_mb"] < 5


def test_the_table_says_that_a_quick_run_means_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_tokenizer_path: Path
) -> None:
    monkeypatch.setattr(data_benchmark, "is_installed", lambda: False)
    tool.main(["data", "--quick", "--tokenizer", str(tiny_tokenizer_path)])
    first, *lines = capsys.readouterr().out.splitlines()
    assert "its figures mean nothing" in first
    for beginning in (
        "machine",
        "plan: 200,000 documents",
        "random rows of 2048, articles",
        "an epoch of paragraphs at 128",
        "data side",
        "preprocessing against SentencePiece",
    ):
        assert sum(line.startswith(beginning) for line in lines) >= 1
    assert any("of tiny.model (512 pieces)" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--corpus", "none.jsonl"], r"--corpus none\.jsonl: no such file"),
        (["--corpus", __file__], "unknown kind of text file"),
        (["--tokenizer", "none.model"], r"cannot read tokenizer none\.model"),
        (["--tokenizer", "tokenizer.json"], r"give a SentencePiece \.model"),
    ],
)
def test_what_cannot_be_used_is_named_before_anything_is_measured(
    arguments: list[str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        tool.main(["data", "--quick", *arguments])


def test_a_missing_corpus_ends_the_tool_with_two_and_one_error(tmp_path: Path) -> None:
    done = run("--corpus", "none.jsonl", folder=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: --corpus none.jsonl")
    assert "Traceback" not in done.stderr


def test_what_does_not_exist_or_is_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match="invalid choice: 'network'"):
        tool.main(["network"])
    with pytest.raises(ConfigError, match="--steps: 0: give a whole number above 0"):
        tool.main(["step", "--steps", "0"])
    with pytest.raises(ConfigError, match="--dropout: x: give a number from 0"):
        tool.main(["step", "--dropout", "x"])


@pytest.mark.faults
def test_a_full_disk_ends_the_tool_with_two_and_leaves_nothing(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    done = subprocess.run(
        [sys.executable, tool.__file__, "data", "--quick"],
        capture_output=True,
        text=True,
        env={"TMPDIR": str(tmp_path)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000)),
        timeout=DEADLINE_SECONDS,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: cannot write benchmark data")
    assert "TMPDIR" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["kernels", "--micro-tokens", "512", "1024"],
        ["step", "--micro-batches", "3"],
        ["step", "--steps", "9"],
        ["peers", "--steps", "9"],
    ],
)
def test_what_a_quick_measurement_does_not_use_is_refused(arguments: list[str]) -> None:
    told = " ".join(arguments[1:])
    with pytest.raises(ConfigError, match=f"{told}: would have no effect; measure without --quick"):
        tool.main([*arguments, "--quick"])

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _megatron_bert_core import RowPlan

from megatron_bert.config.load import load_config
from megatron_bert.data.preprocess import preprocess
from megatron_bert.data.preprocess_options import PreprocessOptions
from megatron_bert.data.source import training_source
from megatron_bert.data.tokenizer import Tokenizer
from megatron_bert.data.tokenizer_training import train_tokenizer, write_model
from megatron_bert.errors import DataError
from tests.core.support import write_documents
from tools import inspect_data as tool

CONFIG = """
model: {{num_layers: 1, hidden_size: 8, ffn_hidden_size: 8, num_attention_heads: 1,
         num_query_groups: 1, max_position_embeddings: 64}}
data: {{tokenizer: {tokenizer}, train: [{{prefix: {prefix}}}]}}
curriculum: [{{seq_length: 16, steps: 3}}, {{seq_length: 64, steps: 2}}]
batch: {{global_size: 5}}
"""


@pytest.fixture(scope="module")
def prefix(
    tiny_texts: list[str], tiny_tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny_texts))
    preprocess(PreprocessOptions([corpus], tiny_tokenizer_path, folder / "corpus"))
    return folder / "corpus"


@pytest.fixture(scope="module")
def config(prefix: Path, tiny_tokenizer_path: Path) -> Path:
    path = prefix.with_name("run.yaml")
    path.write_text(CONFIG.format(tokenizer=tiny_tokenizer_path, prefix=prefix))
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    tool.main([str(argument) for argument in arguments])
    return capsys.readouterr().out.splitlines()


def test_the_unigram_entropy_is_that_of_the_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_documents(tmp_path / "even", [[5, 6, 7, 8], [8, 7, 6, 5]], 2)
    (shown,) = (line for line in run(capsys, "--prefix", tmp_path / "even") if "nats" in line)
    assert shown.startswith(f"unigram entropy {np.log(4):.3f} nats over 8 tokens")


def test_counts_and_histogram_add_up_to_the_dataset(
    prefix: Path,
    tiny_texts: list[str],
    tiny_tokenizer: Tokenizer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = run(capsys, "--prefix", prefix)
    lengths = [len(ids) for ids in tiny_tokenizer.encode_batch(tiny_texts)]
    assert "documents     300" in lines
    assert f"tokens        {sum(lengths):,} of 2 bytes" in lines
    assert any(tiny_tokenizer.hash in line for line in lines)
    bars = [re.fullmatch(r" *([\d,]+) - ([\d,]+) +([\d,]+) (#*)", line) for line in lines]
    found = 0
    for bar in filter(None, bars):
        low, high, count = (int(group.replace(",", "")) for group in bar.groups()[:3])
        assert count == sum(low <= length <= high for length in lengths)
        found += count
    assert found == 300


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_dataset_may_be_named_by_one_of_its_files(
    prefix: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    shown = run(capsys, "--prefix", prefix)
    assert run(capsys, "--prefix", f"{prefix}{suffix}") == shown
    with pytest.raises(DataError, match=r"--prefix \.: names no dataset; give a prefix"):
        tool.main(["--prefix", "."])


def test_samples_are_the_beginnings_of_documents(
    prefix: Path,
    tiny_texts: list[str],
    tiny_tokenizer_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = run(capsys, "--prefix", prefix, "--tokenizer", tiny_tokenizer_path, "--samples", "2")
    first, last = lines[-2:]
    assert first.startswith("document 0 (")
    assert repr(tiny_texts[0])[:30] in first
    assert last.startswith("document 299 (")


def test_samples_are_not_decoded_by_another_tokenizer(
    prefix: Path, tiny_texts: list[str], tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    write_model(train_tokenizer(tiny_texts, 480), tmp_path / "other.model")
    command = ["--prefix", str(prefix), "--tokenizer", str(tmp_path / "other.model")]
    with pytest.raises(DataError, match=f"SHA-256 {tiny_tokenizer.hash}, but other.model has"):
        tool.main(command)


def test_a_dataset_without_its_sidecar_is_shown(
    prefix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for suffix in (".bin", ".idx"):
        (tmp_path / f"x{suffix}").write_bytes(prefix.with_suffix(suffix).read_bytes())
    assert f"no {tmp_path / 'x'}.json: tokenizer and sources are not known" in run(
        capsys, "--prefix", tmp_path / "x"
    )


def test_each_step_has_the_hash_of_its_rows(
    config: Path, tiny_tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    source = training_source(load_config(config), tiny_tokenizer)
    expected = []
    for step, stage in enumerate((0, 0, 0, 1, 1), start=1):
        rows = np.arange((step - 1) * 5, step * 5)
        batch_hash = source.batch(rows, stage).batch_hash
        expected.append(f"step {step} stage {stage} batch_hash {batch_hash:016x}")
    assert run(capsys, "--config", config, "--steps", "1:5") == expected
    assert run(capsys, "--config", config, "--steps", "4:5") == expected[3:]
    assert run(capsys, "--config", config, "--steps", "2") == expected[1:2]


def test_a_step_is_shown_with_the_text_of_its_rows_before_masking(
    config: Path, tiny_texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    plain = run(capsys, "--config", config, "--steps", "3:4")
    lines = run(capsys, "--config", config, "--steps", "3:4", "--text")
    rows = [re.fullmatch(r"row (\d+) \((\d+) masked\): (.+)", line) for line in lines]
    assert [line for line, row in zip(lines, rows, strict=True) if row is None] == plain
    shown = [row for row in rows if row is not None]
    assert [int(row[1]) for row in shown] == list(range(10, 20))
    everything = "".join(text.replace(" ", "") for text in tiny_texts)
    for row in shown:
        assert int(row[2]) > 0
        for segment in row[3].split(" | "):
            assert ast.literal_eval(segment).replace(" ", "") in everything


def test_no_step_is_hashed_of_files_that_changed_while_its_rows_were_planned(
    config: Path, prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for suffix in (".bin", ".idx"):
        shutil.copy(prefix.with_suffix(suffix), tmp_path / f"own{suffix}")

    def change_and_plan(*args: Any) -> RowPlan:
        with (tmp_path / "own.bin").open("ab") as file:
            file.write(b"\0\0")
        return RowPlan(*args)

    monkeypatch.setattr("megatron_bert.data.source.RowPlan", change_and_plan)
    with pytest.raises(DataError, match=r"own\.bin.* while in use"):
        tool.main(
            ["--config", str(config), "--steps", "1:5", f"data.train.0.prefix={tmp_path}/own"]
        )


def test_a_step_is_hashed_alike_whole_or_in_parts(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(capsys, "--config", config, "--steps", "1:5")
    monkeypatch.setattr("megatron_bert.data.step_inspection._SLOTS_AT_A_TIME", 32)
    assert run(capsys, "--config", config, "--steps", "1:5") == whole


def test_overrides_stand_anywhere_on_the_command_line(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = run(capsys, "--config", config, "--steps", "1:1")
    other = run(capsys, "--config", config, "--steps", "1:1", "run.seed=7")
    assert other != plain
    assert run(capsys, "run.seed=7", "--config", config, "--steps", "1:1") == other
    assert run(capsys, "--config", config, "run.seed=7", "--steps", "1:1") == other


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("0:2", r"do not lie in the run, whose steps are 1:5"),
        ("1:6", r"do not lie in the run"),
        ("3:2", r"do not lie in the run"),
        ("one", r"give the first and the last step"),
        ("", r"give the first and the last step"),
    ],
)
def test_steps_outside_of_the_run_are_refused(config: Path, steps: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        tool.main(["--config", str(config), "--steps", steps])


def test_less_than_no_sample_is_refused(prefix: Path) -> None:
    with pytest.raises(DataError, match="--samples -1: give 0 or more"):
        tool.main(["--prefix", str(prefix), "--samples", "-1"])


def test_a_missing_dataset_ends_the_tool_with_two(tmp_path: Path) -> None:
    command = [sys.executable, tool.__file__, "--prefix", "none"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*none\.idx.*\n", done.stderr)
    assert done.stdout == ""

"""Rows, token by token, and duplicates between train and valid, by `tools/inspect_data.py`."""

from __future__ import annotations

import html
import io
import re
from pathlib import Path

import numpy as np
import pytest
from _megatron_bert_core import IndexedDataset

from megatron_bert.config.load import load_config
from megatron_bert.data.source import training_source
from megatron_bert.data.tokenizer import Tokenizer
from megatron_bert.errors import ConfigError, DataError, UserError
from megatron_bert.training.scores import REPLACEMENTS
from tests.core.support import write_documents
from tools import inspect_data as tool

CONFIG = """
model: {{num_layers: 1, hidden_size: 8, ffn_hidden_size: 8, num_attention_heads: 1,
         num_query_groups: 1, max_position_embeddings: 128}}
data: {{tokenizer: {data}/tiny.model, train: [{{prefix: {train}}}], valid: [{{prefix: {valid}}}]}}
mlm: {{probability: 0.3, mask_ratio: 0.6, random_ratio: 0.2}}
curriculum: [{{seq_length: 128, steps: 2}}]
batch: {{global_size: 6}}
"""


@pytest.fixture
def config(tiny_data: Path, tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(
        CONFIG.format(data=tiny_data, train=tiny_data / "train", valid=tiny_data / "valid")
    )
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    tool.main([str(argument) for argument in arguments])
    return capsys.readouterr().out.splitlines()


def plain(line: str) -> str:
    return re.sub(r"\x1b\[[\d;]*m", "", line)


def test_a_row_shows_what_the_model_sees_and_what_it_is_to_predict(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = run(capsys, "--config", config, "--steps", "2", "--rows", "4")
    loaded = load_config(config)
    tokenizer = Tokenizer.load(loaded.data.tokenizer)
    batch = training_source(loaded, tokenizer).batch(np.arange(6, 12), 0)
    titles = [number for number, line in enumerate(lines) if line.startswith("row ")]
    assert [lines[title].split(":")[0] for title in titles[:4]] == [
        f"row {n}" for n in range(6, 10)
    ]
    marks = {"<MASK>": 0, "=": 0, "other": 0}
    for row, title in enumerate(titles[:4]):
        segments = []
        for line in lines[title + 1 :]:
            if not line.startswith("  "):
                break
            segments.append(line.split())
        starts = np.flatnonzero(batch.positions_BS.numpy()[row] == 0)
        seen_S = batch.tokens_BS.numpy()[row]
        assert len(segments) == sum(seen_S[starts] != tokenizer.pad_id)
        shown = [token for tokens in segments for token in tokens]
        for slot, token in enumerate(shown):
            seen, label = tokenizer.id_to_piece(int(seen_S[slot])), None
            used = batch.weights_BM.numpy()[row] > 0
            (where,) = np.nonzero((batch.masked_BM.numpy()[row] == slot) & used)
            if not len(where):
                assert token == seen
                continue
            label = tokenizer.id_to_piece(int(batch.labels_BM.numpy()[row, where[0]]))
            mark = "=" if seen == label else seen
            assert token == f"[{mark}|{label}]"
            marks[mark if mark in marks else "other"] += 1
        padding = int((seen_S == tokenizer.pad_id).sum())
        assert len(shown) + padding == 128
        assert lines[title].endswith(f"{padding} slot(s) of padding")
    assert min(marks.values()) > 0


def test_the_shares_are_those_of_all_rows_of_the_steps(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = run(capsys, "--config", config, "--steps", "1:2", "--rows", "0")
    assert not any(line.startswith("row ") for line in lines)
    loaded = load_config(config)
    tokenizer = Tokenizer.load(loaded.data.tokenizer)
    batch = training_source(loaded, tokenizer).batch(np.arange(12), 0)
    padding = int((batch.tokens_BS == tokenizer.pad_id).sum())
    segments = int(((batch.positions_BS == 0) & (batch.tokens_BS != tokenizer.pad_id)).sum())
    text = 12 * 128 - padding - 2 * segments
    predicted = int(batch.weights_BM.sum())
    assert "rows          12 of 1,536 slots" in lines
    assert f"padding       {padding:,} of 1,536 slots ({padding / 1536:.2%})" in lines
    assert f"text          {text:,} of 1,536 slots ({text / 1536:.2%})" in lines
    assert f"unknown       0 of {text:,} text tokens (0.00%)" in lines
    assert f"predicted     {predicted:,} of {text:,} text tokens ({predicted / text:.2%})" in lines
    found = [re.fullmatch(r"  (\S+) +([\d,]+) of [\d,]+ predicted \(.*", line) for line in lines]
    kinds = {kind[1]: int(kind[2].replace(",", "")) for kind in found if kind}
    assert tuple(kinds) == REPLACEMENTS == ("masked", "random", "kept")
    assert sum(kinds.values()) == predicted
    seen = batch.tokens_BS.gather(1, batch.masked_BM.long())[batch.weights_BM > 0]
    labels = batch.labels_BM[batch.weights_BM > 0]
    assert kinds["masked"] == int((seen == tokenizer.mask_id).sum())
    assert kinds["kept"] == int((seen == labels).sum()) > 0
    bars = [re.fullmatch(r" *[\d,]+ - [\d,]+ +(\d+) #*", line) for line in lines]
    assert sum(int(bar[1]) for bar in bars if bar) == segments


def test_colours_are_for_terminals_and_for_those_who_ask(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["--config", str(config), "--steps", "1", "--rows", "1"]

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def on_terminal(*arguments: str) -> list[str]:
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdout", terminal := Terminal())
            tool.main([*command, *arguments])
        return terminal.getvalue().splitlines()

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    without = run(capsys, *command)
    assert "\x1b" not in "".join(without)
    coloured = on_terminal()
    assert "\x1b[7m[<MASK>|" in "".join(coloured)
    assert list(map(plain, coloured)) == without
    assert run(capsys, *command, "--color", "always") == coloured
    assert on_terminal("--color", "never") == without
    monkeypatch.setenv("NO_COLOR", "1")
    assert on_terminal() == without
    assert on_terminal("--color", "always") == coloured


def test_a_page_holds_the_rows_and_the_shares_and_needs_no_other_file(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--config", config, "--steps", "1:2", "--rows", "2"]
    shown = run(capsys, *command)
    assert run(capsys, *command, "--html", tmp_path / "rows.html") == [
        f"wrote {tmp_path}/rows.html"
    ]
    page = (tmp_path / "rows.html").read_text()
    assert not re.search(r"src=|href=|url\(|<script", page)
    assert page.count("<section>") == 4
    lines = html.unescape(page).splitlines()
    for line in shown:
        if line.startswith(("step ", "padding ", "predicted ")):
            assert any(line in other for other in lines)
    marked = " ".join(line for line in shown if line.startswith("  <CLS>"))
    assert page.count('class="masked"') == marked.count("[<MASK>|") + 1  # the legend
    tool.main([*map(str, command), "--html", str(tmp_path / "new" / "folder" / "x.html")])
    assert (tmp_path / "new" / "folder" / "x.html").read_text() == page
    with pytest.raises(
        UserError, match=r"cannot write .*x\.html: cannot make .*rows\.html: .*name"
    ):
        tool.main([*map(str, command), "--html", str(tmp_path / "rows.html" / "x.html")])


def test_control_characters_of_a_piece_do_not_reach_the_terminal(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tokenizer, "id_to_piece", lambda self, token: "\x1b[2J")
    shown = "".join(run(capsys, "--config", config, "--steps", "1", "--rows", "1"))
    assert "\x1b" not in shown
    assert r"\x1b[2J" in shown


def test_unknown_tokens_and_byte_pieces_of_a_dataset_are_counted(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = Tokenizer.load(tiny_data / "tiny.model")
    (unknown,), byte = tokenizer.unknown_ids, tokenizer.byte_ids[0]
    write_documents(tmp_path / "x", [[unknown, 300, 301, byte], [byte, 302, 303, 304]], 2)
    lines = run(capsys, "--prefix", tmp_path / "x", "--tokenizer", tiny_data / "tiny.model")
    assert "unknown       1 of 8 tokens (12.50%)" in lines
    assert "byte pieces   2 of 8 tokens (25.00%)" in lines


def test_documents_in_train_and_in_valid_are_found(
    config: Path,
    tiny_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("megatron_bert.data.overlap._DOCUMENTS_AT_A_TIME", 2)
    nothing: list[int] = []
    write_documents(tmp_path / "t", [[10, 11], [12], nothing, [13, 14], [12], [99]], 4)
    write_documents(tmp_path / "v", [[12], [15], nothing, [12], [13, 14], [11, 10], [12, 13]], 2)
    (tmp_path / "run.yaml").write_text(
        CONFIG.format(data=tiny_data, train=tmp_path / "t", valid=tmp_path / "v")
    )
    lines = run(capsys, "--config", config, "--duplicates", "--samples", "2")
    assert lines[:2] == [
        f"{tmp_path}/t: 3 of 5 documents (60.00%) stand in held-out text too",
        f"{tmp_path}/v: 3 of 6 documents (50.00%) are trained on",
    ]
    assert [line.split(" (")[0] for line in lines[2:]] == [
        f"document 1 of {tmp_path}/t = document 0 of {tmp_path}/v",
        f"document 3 of {tmp_path}/t = document 4 of {tmp_path}/v",
    ]


def test_the_two_sides_of_one_corpus_are_compared_and_no_document_with_itself(
    config: Path, tmp_path: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Each text stands twice, each time at a number that the split may send to the other side.
    write_documents(tmp_path / "t", [[10 + number % 50] for number in range(100)], 2)
    fraction = "data.held_out_fraction=0.3"
    lines = run(
        capsys, "--config", config, "--duplicates", "--samples", "100",
        "data.valid=[]", f"data.train.0.prefix={tmp_path}/t", fraction,
    )  # fmt: skip
    dataset = IndexedDataset(str(tmp_path / "t"))
    pairs = [re.findall(r"document (\d+) of", line) for line in lines[2:]]
    assert pairs
    for trained, held_out in pairs:
        assert abs(int(trained) - int(held_out)) == 50
        assert dataset.document(int(trained)) == dataset.document(int(held_out))
    assert f"{tmp_path}/t (held out): {len(pairs)} of " in lines[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config", "{config}", "--duplicates", "data.valid=[]"],
            r"data\.valid = \[\].*set",
        ),
        (["--config", "{config}", "--steps", "1", "--rows", "-1"], r"--rows -1: give 0"),
        (["--config", "{config}"], r"--steps is missing: give .*--duplicates"),
    ],
)
def test_what_cannot_be_shown_is_refused(config: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        tool.main([argument.format(config=config) for argument in arguments])


STEPS = ["--config", "{config}", "--steps", "1"]
DUPLICATES = ["--config", "{config}", "--duplicates"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*STEPS, "--tokenizer", "t"], r"--tokenizer t: .*set that, or leave"),
        ([*DUPLICATES, "--tokenizer", "t"], r"--tokenizer t: .*set that, or leave"),
        (["--prefix", "p", "--duplicates"], r"--duplicates: .*give a run's --config"),
        (["--prefix", "p", "--steps", "1"], r"--steps 1: .*give a run's --config"),
        (["--prefix", "p", "--text"], r"--text: .*--config and --steps"),
        ([*DUPLICATES, "--text"], r"--text: .*--config and --steps"),
        (["--prefix", "p", "--rows", "1"], r"--rows 1: .*--config and --steps"),
        ([*DUPLICATES, "--rows", "1"], r"--rows 1: .*--config and --steps"),
        ([*STEPS, "--html", "x"], r"--html x: .*give --rows N"),
        ([*STEPS, "--text", "--html", "x"], r"--html x: .*give --rows N"),
        (["--prefix", "p", "--html", "x"], r"--html x: .*give --rows N"),
        ([*STEPS, "--color", "auto"], r"--color auto: .*give --rows N, N from 1"),
        ([*STEPS, "--rows", "0", "--color", "never"], r"--color never: .*N from 1"),
        (
            [*STEPS, "--rows", "1", "--html", "x", "--color", "always"],
            r"--color always: .*no --html",
        ),
        (["--prefix", "p", "--color", "always"], r"--color always: .*give --rows N"),
        (["--prefix", "p", "--samples", "3"], r"--samples 3: .*give --tokenizer"),
        ([*STEPS, "--samples", "0"], r"--samples 0: .*--duplicates beside --config"),
        (["--prefix", "p", "run.seed=1"], r"run\.seed=1: .*--config"),
    ],
)
def test_options_without_effect_are_refused(
    config: Path, arguments: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tool.main([argument.format(config=config) for argument in arguments])

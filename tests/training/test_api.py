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
import torch

from megatron_bert import api
from megatron_bert.config.load import config_dict, load_config
from megatron_bert.config.schema import Config
from megatron_bert.data.shards import Shard
from megatron_bert.run.directory import FINISHED, STOPPED
from megatron_bert.run.metrics import read


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


@pytest.mark.parametrize("kind", [str, Path])
def test_paths_are_taken_as_text_too(
    kind: type, tiny_run: Callable[..., Config], tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(api.dump_config(tiny_run()))
    config = api.load_config(kind(path), "run.seed=3")
    assert config.run.seed == 3
    tree = api.config_dict(config)
    tree["data"]["tokenizer"] = kind(config.data.tokenizer)
    tree["data"]["train"] = ({"prefix": kind(config.data.train[0].prefix)},)
    assert api.build_config(tree).data == config.data
    tokenizer = api.Tokenizer.load(kind(config.data.tokenizer))
    assert tokenizer.decode(tokenizer.encode_batch(["Text"])[0]) == "Text"
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "Text"}\n')
    for inputs in (kind(text), [kind(text)]):
        options = api.PreprocessOptions(
            inputs, kind(config.data.tokenizer), kind(tmp_path / "new"), overwrite=True
        )
        assert api.preprocess(options).documents == 1
    api.write_model(b"model", kind(tmp_path / "new.model"))
    assert (tmp_path / "new.model").read_bytes() == b"model"
    with pytest.raises(api.UserError, match="no such run directory"):
        api.RunRecords.read(kind(tmp_path / "none"))
    with pytest.raises(api.UserError, match="no such directory"):
        api.export_model(kind(tmp_path / "none"), kind(tmp_path / "out"), tokenizer=kind("a"))


def test_a_bare_text_where_a_list_is_meant_is_refused(tiny_run: Callable[..., Config]) -> None:
    config = tiny_run()
    with pytest.raises(api.UserError, match="documents = 'Text': give a list of texts, not a bare"):
        api.train_tokenizer("Text", 300)
    with pytest.raises(api.UserError, match="texts = 'Text': give a list of texts, not a bare"):
        api.Tokenizer.load(config.data.tokenizer).encode_batch("Text")
    with pytest.raises(api.UserError, match="field_keys = 'url': give a list of texts, not a bare"):
        api.preprocess(api.PreprocessOptions("a", "b", "c", field_keys="url"))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda config: api.load_config(5), "path = 5: give text or a pathlib.Path"),
        (lambda config: api.load_config("a\0b"), "path = 'a\\x00b': give a path without"),
        (lambda config: api.load_config("a", [5]), "overrides[0] = 5: give text"),
        (lambda config: api.build_config("x"), "tree = 'x': give a dict"),
        (lambda config: api.build_config({2.5: 1}), "2.5 = 1: unknown key"),
        (
            lambda config: api.build_config({"data": {"train": ["x"]}}),
            'data.train.0 = "x": expected {prefix, weight, epochs}',
        ),
        (lambda config: api.dump_config({}), "config = {}: give a Config, which load_config"),
        (lambda config: api.train("x"), "config = 'x': give a Config, which load_config"),
        (lambda config: api.train(config, 2.5), "max_steps = 2.5: give a whole number or None"),
        (lambda config: api.train(config, True), "max_steps = True: give a whole number or None"),
        (lambda config: api.read_batch("1", 1), "config = '1': give a Config"),
        (lambda config: api.read_batch(config, "1"), "step = '1': give a whole number"),
        (lambda config: api.read_batch(config, 0), "step = 0: give at least 1"),
        (lambda config: api.read_batch(config, 99), "step = 99: the run has "),
        (lambda config: api.rows_as_text(config, 1, -1), "rows = -1: give at least 0"),
        (lambda config: api.draw_curves("runs/x"), "runs = 'runs/x': give RunRecords"),
        (lambda config: api.draw_curves([1]), "runs[0] = 1: give RunRecords, which train"),
        (lambda config: api.RunRecords.read(None), "directory = None: give text or"),
        (lambda config: api.export_model("a", "b", "fp16"), "dtype = 'fp16': give one of 'fp32'"),
        (lambda config: api.export_model("a", "b", license_id="My own"), "license_id = 'My own': "),
        (lambda config: api.Tokenizer.load(Path("a\0")), "give a path without characters that"),
        (
            lambda config: _tokenizer(config).encode_batch(["", "a\ud800"]),
            "texts[1]: '\\ud800'",
        ),
        (lambda config: api.Tokenizer.load(b"a"), "path = b'a': give text or a pathlib.Path"),
        (lambda config: _tokenizer(config).decode([3, 10**6]), "ids[1] = 1000000: tiny.model has"),
        (lambda config: _tokenizer(config).decode([-1]), "ids[0] = -1: tiny.model has no such id"),
        (lambda config: _tokenizer(config).id_to_piece(-1), "token = -1: tiny.model has no such"),
        (lambda config: _tokenizer(config).encode_batch([1]), "texts[0] = 1: give text"),
        (lambda config: api.train_tokenizer(["a", 1], 300), "documents[1] = 1: give text"),
        (lambda config: api.train_tokenizer(["a"], 10**30), "set vocab_size to 2147483647 or"),
        (lambda config: api.train_tokenizer(["a"], 300, normalization="x"), "normalization = 'x'"),
        (lambda config: api.train_tokenizer(["a"], 300, max_sentences=0), "max_sentences = 0: "),
        (lambda config: api.write_model("text", "m"), "model = 'text': give bytes"),
        (lambda config: api.write_model(b"", ""), "cannot write .: it is a folder"),
        (lambda config: api.preprocess({}), "options = {}: give PreprocessOptions(...)"),
        (lambda config: Shard(8, 8), "shard 8/8: give K/N with K from 0 to N - 1"),
    ],
)
def test_a_wrong_type_or_value_is_told_with_its_argument_and_what_to_give(
    tiny_run: Callable[..., Config], wrong: Callable[[Config], object], told: str
) -> None:
    with pytest.raises(api.UserError) as refused:
        wrong(tiny_run())
    assert told in str(refused.value)


def _tokenizer(config: Config) -> api.Tokenizer:
    return api.Tokenizer.load(config.data.tokenizer)


def test_whole_numbers_of_numpy_and_torch_are_taken(tiny_run: Callable[..., Config]) -> None:
    config = tiny_run()
    tree = api.config_dict(config)
    tree["run"]["seed"] = np.int64(5)
    tree["optimizer"]["lr"] = np.float64(0.5)
    changed = api.build_config(tree)
    assert (changed.run.seed, changed.optimizer.lr) == (5, 0.5)
    (step,) = torch.tensor([2])
    assert api.read_batch(config, np.int32(2)).batch_hash == api.read_batch(config, step).batch_hash
    tokenizer = _tokenizer(config)
    (ids,) = tokenizer.encode_batch(("Text",))
    assert tokenizer.decode(np.array(ids)) == tokenizer.decode(torch.tensor(ids)) == "Text"
    assert type(Shard(np.int64(0), np.int64(2)).count) is int


@pytest.mark.parametrize(
    ("line", "changes", "told"),
    [
        ('{"body": "a"}', {}, "name the text's with json_key; mend the line, or leave such lines "
        "out with on_error='skip'"),
        ("", {"inputs": "none.jsonl"}, "no such file; check inputs"),
        ("", {"output_prefix": "."}, "output_prefix .: is a folder; give a name in it"),
        ("", {"workers": 0}, "workers = 0: give at least 1"),
        ("", {"workers": "2"}, "workers = '2': give a whole number"),
        ("", {"inputs": 5}, "inputs = 5: give text or a pathlib.Path or a list of paths"),
        ("", {"overwrite": "no"}, "overwrite = 'no': give True or False"),
        ("", {"field_keys": ["a", "a"]}, "field_keys a: given twice"),
        ("", {"on_error": "ignore"}, "on_error = 'ignore': give one of 'fail', 'skip'"),
        ("", {"normalize": "NFKC"}, "normalize = 'NFKC': give one of 'none', 'nfkc'"),
        ("", {"txt_documents": "word"}, "txt_documents = 'word': give one of 'line'"),
        ("", {"word_boundaries": "x"}, "word_boundaries = 'x': give one of"),
        ("", {"shard": "0/2"}, "shard = '0/2': give a Shard"),
        ('{"text": "a"}', {"overwrite": False}, "choose another output_prefix, or replace the "
        "dataset with overwrite=True"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_called_by_the_argument_and_not_by_an_option(
    tiny_run: Callable[..., Config],
    tmp_path: Path,
    line: str,
    changes: dict[str, object],
    told: str,
) -> None:
    (tmp_path / "text.jsonl").write_text(line + "\n")
    (tmp_path / "new.idx").touch()
    given = {"inputs": tmp_path / "text.jsonl", "output_prefix": tmp_path / "new"}
    given |= {"tokenizer": tiny_run().data.tokenizer, "overwrite": True}
    with pytest.raises(api.UserError) as refused:
        api.preprocess(api.PreprocessOptions(**{**given, **changes}))
    assert told in str(refused.value)
    assert "--" not in str(refused.value)


def test_work_of_other_arguments_is_told_by_their_names(
    tiny_run: Callable[..., Config], tmp_path: Path
) -> None:
    good, bad = ('{"text": "Text"}\n' * 9, "{broken\n")
    (tmp_path / "good.jsonl").write_text(good)
    (tmp_path / "bad.jsonl").write_text(bad)
    inputs = [tmp_path / "good.jsonl", tmp_path / "bad.jsonl"]
    tokenizer, new = tiny_run().data.tokenizer, tmp_path / "new"
    with pytest.raises(api.UserError, match="on_error='skip'; what was done until then is kept"):
        api.preprocess(api.PreprocessOptions(inputs, tokenizer, new))
    options = api.PreprocessOptions(inputs, tokenizer, new, field_keys=["url"])
    with pytest.raises(api.UserError, match=r'field_keys was \[\] and is now \["url"\]'):
        api.preprocess(options)
    (tmp_path / "good.jsonl").write_text(good + good)
    with pytest.raises(api.UserError, match="restore it, or begin anew with restart=True"):
        api.preprocess(api.PreprocessOptions(inputs, tokenizer, new))


def test_curves_need_no_list_of_one_run_and_say_where_matplotlib_lacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    columns = {name: np.array([1.0, 2.0]) for name in ("step", "stage", "seq_length", "loss")}
    run = api.RunRecords(Path("run"), columns)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(api.UserError, match=f"cannot be imported by {sys.executable}; install"):
        api.draw_curves(run)
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    one, listed = api.draw_curves(run), api.draw_curves([run])
    assert len(one.axes[0].lines) == len(listed.axes[0].lines)


def test_training_goes_on_step_by_step_and_gives_the_signals_back(
    tiny_run: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    handler, print_traceback = signal.getsignal(signal.SIGINT), sys.excepthook
    unlike_python = signal.getsignal(signal.SIGUSR2)
    random_state = torch.get_rng_state()
    # A program that embeds Python may have put a handler of its own behind a signal.
    monkeypatch.setattr(
        api.signal,
        "getsignal",
        lambda number, get=signal.getsignal: None if number == signal.SIGUSR2 else get(number),
    )
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
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is handler
    assert signal.getsignal(signal.SIGUSR2) is unlike_python
    assert torch.equal(torch.get_rng_state(), random_state)
    assert sys.excepthook is print_traceback
    with pytest.raises(api.UserError, match="max_steps = 0: give at least 1"):
        api.train(config, max_steps=0)
    with (
        ThreadPoolExecutor(1) as other,
        pytest.raises(api.UserError, match="only the main thread can listen"),
    ):
        other.submit(api.train, config).result()


def test_the_package_itself_loads_neither_the_api_nor_torch() -> None:
    look = (
        "import sys, megatron_bert; sys.exit(bool({'torch', 'megatron_bert.api'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", look], check=False).returncode == 0

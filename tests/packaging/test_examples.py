"""Every example's configuration passes a dry run on stand-ins for the data that it names."""

from __future__ import annotations

import json
import logging
import re
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_bert.checkpoint.huggingface_config import huggingface_config
from megatron_bert.checkpoint.huggingface_import import import_model
from megatron_bert.checkpoint.huggingface_names import model_parameters
from megatron_bert.config.checks import check_config
from megatron_bert.config.load import load_config
from megatron_bert.config.schema import Config
from megatron_bert.data.tokenizer import Tokenizer
from megatron_bert.training.main import main

CHECKOUT = Path(__file__).resolve().parents[2]
EXAMPLES = {path.name: path for path in sorted((CHECKOUT / "examples").glob("*.yaml"))}
# Ranks that the head of an example starts it on, where there are several.
RANKS = {"eight_gpus.yaml": 8, "five_corpora.yaml": 8, "modernbert_base.yaml": 8,
         "retrievabert_1.3b.yaml": 8}  # fmt: skip
# Of sixty documents so many are held out at least; a thousandth of them is none.
HELD_OUT = 0.1


def test_there_is_an_example_for_every_beginning() -> None:
    assert {
        "small_cpu.yaml", "one_gpu.yaml", "eight_gpus.yaml", "retrievabert_1.3b.yaml",
        "modernbert_base.yaml", "continue_from_huggingface.yaml", "five_corpora.yaml",
    } <= set(EXAMPLES)  # fmt: skip


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_says_in_its_first_lines_what_it_is_for(name: str) -> None:
    comments = [line for line in EXAMPLES[name].read_text().splitlines()[:6] if line[:2] == "# "]
    assert any("language-server" not in line for line in comments)


def test_the_tutorials_overrides_make_a_modernbert_of_the_small_example() -> None:
    tutorial = (CHECKOUT / "docs" / "tutorial.md").read_text("utf-8")
    (given,) = re.findall(r"over `examples/small_cpu.yaml`\s+`([^`]+)`", tutorial)
    config = load_config(EXAMPLES["small_cpu.yaml"], given.split())
    assert config.model.architecture == "modernbert"
    check_config(config, world_size=1)


def test_the_examples_agree_on_where_tokenizer_and_datasets_lie() -> None:
    datas = [load_config(path).data for path in EXAMPLES.values()]
    published = "data/llm-jp-tokenizer-100k.ver3.0b1.model"
    assert {data.tokenizer for data in datas} == {"data/my.model", published}
    own = [data for data in datas if data.tokenizer != published]
    assert all("data/train" in [corpus.prefix for corpus in data.train] for data in own)
    assert {corpus.prefix for data in own for corpus in data.valid} == {"data/valid"}
    readme = (CHECKOUT / "README.md").read_text("utf-8")
    assert "--output data/my.model" in readme
    assert "--output-prefix data/train" in readme


@pytest.fixture(scope="module")
def stand_ins(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the files lie that the examples name, all with the tiny corpus' content."""
    folder = tmp_path_factory.mktemp("stand-ins")
    for example in EXAMPLES.values():
        config = load_config(example)
        _link(tiny_data / "tiny.model", folder / config.data.tokenizer)
        for corpus in (*config.data.train, *config.data.valid):
            for suffix in (".bin", ".idx", ".json"):
                _link(tiny_data / f"train{suffix}", folder / f"{corpus.prefix}{suffix}")
    continued = load_config(EXAMPLES["continue_from_huggingface.yaml"])
    _write_model(continued, folder / "data" / "my-encoder", tiny_data / "tiny.model")
    import_model(
        folder / "data" / "my-encoder", folder / "data" / "start", folder / "data" / "my.model"
    )
    return folder


def _link(source: Path, name: Path) -> None:
    name.parent.mkdir(exist_ok=True)
    if not name.exists():
        name.symlink_to(source)


def _write_model(config: Config, directory: Path, tokenizer: Path) -> None:
    """A Hugging Face directory of the example's shape, all of its weights zero."""
    directory.mkdir()
    pieces = Tokenizer.load(tokenizer).vocab_size
    shape = huggingface_config(config.model, pieces, "fp32", defaultdict(lambda: None))
    (directory / "config.json").write_text(json.dumps(shape))
    parameters = model_parameters(config.model, pieces)
    weights = {parameter.theirs: torch.zeros(parameter.shape) for parameter in parameters}
    save_file(weights, directory / "model.safetensors")


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_passes_a_dry_run_on_the_data_that_it_names(
    name: str, stand_ins: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.chdir(stand_ins)
    monkeypatch.setenv("WORLD_SIZE", str(RANKS.get(name, 1)))
    config = load_config(EXAMPLES[name])
    # So many rows as the real curricula have need not be planned here.
    overrides = [f"curriculum.{stage}.steps=3" for stage in range(len(config.curriculum))]
    if config.data.held_out_fraction:
        overrides.append(f"data.held_out_fraction={HELD_OUT}")
    assert main(["--config", str(EXAMPLES[name]), "--dry-run", *overrides]) == 0
    start = "goes on     from" if name.startswith("continue") else "begins      afresh"
    assert start in caplog.text

"""A tiny corpus on disk and runs on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_bert.config.schema import Config
from megatron_bert.data.preprocess import PreprocessOptions, preprocess
from tests.training.runs import run_config


@pytest.fixture(scope="session")
def tiny_data(
    tiny_texts: list[str], tiny_tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Folder with `train` and `valid` datasets and `tiny.model`, the tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "tiny.model").write_bytes(tiny_tokenizer_path.read_bytes())
    for name, texts in (("train", tiny_texts[:60]), ("valid", tiny_texts[250:])):
        source = folder / f"{name}.txt"
        source.write_text("\n".join(text.replace("\n", "") for text in texts) + "\n")
        preprocess(
            PreprocessOptions(
                inputs=(source,),
                tokenizer=folder / "tiny.model",
                output_prefix=folder / name,
                workers=1,
            )
        )
    return folder


@pytest.fixture
def tiny_run(tiny_data: Path, tmp_path: Path) -> Callable[..., Config]:
    """Configuration of a run on the tiny corpus, named and changed by the arguments."""

    def configure(name: str = "run", **changes: Any) -> Config:
        return run_config(tiny_data, tmp_path / name, **changes)

    return configure

"""Fixtures that several rooms' tests share."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from megatron_bert.data.preprocess import preprocess
from megatron_bert.data.preprocess_options import PreprocessOptions
from megatron_bert.data.tokenizer import Tokenizer
from megatron_bert.data.tokenizer_training import train_tokenizer, write_model

if TYPE_CHECKING:
    from megatron_bert.config.schema import Config

if not Path("/dev/nvidiactl").exists():
    # Where there is no GPU Triton's kernels are interpreted. Read when Triton is imported, which
    # parts of PyTorch do.
    os.environ.setdefault("TRITON_INTERPRET", "1")

_CHECKOUT = Path(__file__).resolve().parents[1]

_JAPANESE = (
    "吾輩は猫である 名前はまだ無い どこで生れたか とんと見当がつかぬ 薄暗い じめじめした 所で "
    "ニャーニャー 泣いていた 事だけは 記憶している コンピュータ タワー 東京 大阪 学校 2024年 。 、 "
    "という 人間 書生 種族 話 見た"
)
_ENGLISH = "The quick brown fox jumps over a lazy dog and runs to the tower of London in 1868 ."


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real corpora and tokenizers; the test is skipped where it is absent."""
    folder = Path(os.environ.get("MEGATRON_BERT_TEST_DATA", _CHECKOUT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (set MEGATRON_BERT_TEST_DATA)")
    return folder


@pytest.fixture(scope="session")
def tiny_texts() -> list[str]:
    """Three hundred generated documents, Japanese and English, one to four lines each."""
    choose = random.Random(20240401)
    japanese, english = _JAPANESE.split(), _ENGLISH.split()
    texts = []
    for number in range(300):
        lines = []
        for _ in range(choose.randint(1, 4)):
            if number % 3:
                lines.append("".join(choose.choices(japanese, k=choose.randint(5, 40))))
            else:
                lines.append(" ".join(choose.choices(english, k=choose.randint(5, 30))))
        texts.append("\n".join(lines))
    return texts


@pytest.fixture(scope="session")
def tiny_tokenizer_path(tiny_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of 512 pieces trained on `tiny_texts`."""
    path = tmp_path_factory.mktemp("tokenizer") / "tiny.model"
    write_model(train_tokenizer(tiny_texts, 512), path)
    return path


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_tokenizer_path: Path) -> Tokenizer:
    """The tokenizer of `tiny_tokenizer_path`."""
    return Tokenizer.load(tiny_tokenizer_path)


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
    from tests.training.runs import run_config

    def configure(name: str = "run", **changes: Any) -> Config:
        return run_config(tiny_data, tmp_path / name, **changes)

    return configure

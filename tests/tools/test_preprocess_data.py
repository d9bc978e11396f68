from __future__ import annotations

import gzip
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from megatron_bert.config.errors import DataError
from megatron_bert.data.indexed_dataset import open_dataset
from megatron_bert.data.preprocess import PreprocessCounts, PreprocessOptions, preprocess
from megatron_bert.data.tokenizer import Tokenizer
from tools import preprocess_data as tool

TOOL = Path(tool.__file__)


def jsonl(texts: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({key: text}, ensure_ascii=False) + "\n" for text in texts).encode()


def documents(prefix: Path) -> list[list[int]]:
    dataset = open_dataset(str(prefix))
    return [dataset.document(i).tolist() for i in range(dataset.num_documents)]


class Workshop:
    """A folder with a corpus, and `run` that preprocesses it."""

    def __init__(self, folder: Path, tokenizer: Path) -> None:
        self.folder = folder
        self.prefix = folder / "out" / "corpus"
        self._tokenizer = tokenizer

    def write(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content)
        return path

    def run(self, *inputs: Path, **options: Any) -> PreprocessCounts:
        options = {"tokenizer": self._tokenizer, "output_prefix": self.prefix, **options}
        return preprocess(PreprocessOptions(inputs=inputs, **options))

    def left_behind(self) -> list[str]:
        return sorted(p.name for p in self.prefix.parent.iterdir())


@pytest.fixture
def workshop(tmp_path: Path, tiny_tokenizer_path: Path) -> Workshop:
    return Workshop(tmp_path, tiny_tokenizer_path)


def test_documents_are_the_tokens_of_the_texts_in_input_order(
    workshop: Workshop, tiny_texts: list[str], tiny_tokenizer: Tokenizer
) -> None:
    inputs = [
        workshop.write("a.jsonl", jsonl(tiny_texts[:100])),
        workshop.write("b.jsonl.gz", gzip.compress(jsonl(tiny_texts[100:200]))),
        workshop.write("c.jsonl.zst", zstandard.compress(jsonl(tiny_texts[200:]))),
    ]
    counts = workshop.run(*inputs)
    expected = tiny_tokenizer.encode_batch(tiny_texts)
    assert documents(workshop.prefix) == expected
    assert counts == PreprocessCounts(documents=300, tokens=sum(map(len, expected)))
    assert open_dataset(str(workshop.prefix)).token_bytes == 2
    assert workshop.left_behind() == ["corpus.bin", "corpus.idx", "corpus.json"]


def test_any_number_of_workers_writes_the_same_bytes(
    workshop: Workshop, tiny_texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_bert.data.preprocess._BATCH_BYTES", 500)
    corpus = workshop.write("a.jsonl", jsonl(tiny_texts))
    written = set()
    for workers in (1, 2, 5):
        workshop.run(corpus, workers=workers, overwrite=True)
        written.add(workshop.prefix.with_suffix(".bin").read_bytes())
        written.add(workshop.prefix.with_suffix(".idx").read_bytes())
    assert len(written) == 2


def test_the_sidecar_tells_tokenizer_counts_and_sources(
    workshop: Workshop, tiny_tokenizer: Tokenizer
) -> None:
    corpus = workshop.write("a.jsonl", jsonl(["吾輩は猫である", "", "the fox"]) + b"{\n")
    counts = workshop.run(corpus, on_error="skip")
    info = json.loads(workshop.prefix.with_suffix(".json").read_text())
    assert info["tokenizer_hash"] == tiny_tokenizer.hash
    assert info["tokenizer_name"] == "tiny.model"
    assert info["vocab_size"] == 512
    assert info["documents"] == counts.documents == 2
    assert info["tokens"] == counts.tokens
    assert info["skipped_lines"] == counts.skipped_lines == 1
    assert info["empty_documents"] == counts.empty_documents == 1
    (source,) = info["sources"]
    assert source["path"] == str(corpus)
    assert source["bytes"] == corpus.stat().st_size


def test_literal_special_pieces_never_reach_the_dataset_as_special_tokens(
    workshop: Workshop, tiny_tokenizer: Tokenizer
) -> None:
    texts = ["<MASK>", "a</s><s>b", "<CLS>吾輩<SEP><EOD><PAD><unk>"]
    workshop.run(workshop.write("a.jsonl", jsonl(texts)))
    written = documents(workshop.prefix)
    assert not {token for ids in written for token in ids} & set(tiny_tokenizer.special_ids)
    assert [tiny_tokenizer.decode(ids) for ids in written] == texts


def test_blocks_of_txt_and_other_keys_of_jsonl_can_be_read(
    workshop: Workshop, tiny_tokenizer: Tokenizer
) -> None:
    text = workshop.write("a.txt", "一\n二\n\n三\n".encode())
    other = workshop.write("b.jsonl", jsonl(["四"], key="body"))
    workshop.run(text, other, json_key="body", txt_documents="blank-line")
    texts = [tiny_tokenizer.decode(ids) for ids in documents(workshop.prefix)]
    assert texts == ["一\n二", "三", "四"]


def test_the_first_broken_line_ends_the_work_and_leaves_nothing(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_bert.data.preprocess._BATCH_BYTES", 100)
    good = jsonl(["吾輩は猫である"] * 200)
    corpus = workshop.write("a.jsonl", good + b'{"text": "\xe3"}\n' + good + b"{\n")
    for workers in (1, 3):
        with pytest.raises(DataError, match=r"a\.jsonl, line 201: invalid UTF-8"):
            workshop.run(corpus, workers=workers)
        assert workshop.left_behind() == []


@pytest.mark.parametrize("content", [b"", b"\n\n", jsonl(["", ""])])
def test_an_input_without_a_token_is_an_error_and_leaves_nothing(
    workshop: Workshop, content: bytes
) -> None:
    with pytest.raises(DataError, match="holds no token"):
        workshop.run(workshop.write("a.jsonl", content))
    assert workshop.left_behind() == []


def test_an_existing_dataset_is_replaced_only_when_asked_to(workshop: Workshop) -> None:
    first = workshop.write("a.jsonl", jsonl(["猫"]))
    second = workshop.write("b.jsonl", jsonl(["人間", "書生"]))
    workshop.run(first)
    before = documents(workshop.prefix)
    with pytest.raises(DataError, match=r"corpus\.idx.*already there.*--overwrite"):
        workshop.run(second)
    assert documents(workshop.prefix) == before
    with pytest.raises(DataError, match="holds no token"):
        workshop.run(workshop.write("c.jsonl", b""), overwrite=True)
    assert documents(workshop.prefix) == before
    workshop.run(second, overwrite=True)
    assert len(documents(workshop.prefix)) == 2


def test_a_prefix_with_a_datasets_suffix_is_refused(workshop: Workshop) -> None:
    source = workshop.write("a.txt", b"text\n")
    workshop.prefix = workshop.prefix.with_name("data.bin")
    with pytest.raises(DataError, match=r"leave off \.bin"):
        workshop.run(source)


def test_a_disk_that_fills_up_leaves_the_old_dataset_as_it_was(
    workshop: Workshop, tiny_texts: list[str], tiny_tokenizer_path: Path
) -> None:
    resource = pytest.importorskip("resource")
    workshop.run(workshop.write("a.jsonl", jsonl(["猫"])))
    before = {path.name: path.read_bytes() for path in workshop.prefix.parent.iterdir()}
    corpus = workshop.write("b.jsonl", jsonl(tiny_texts))
    done = subprocess.run(
        command(workshop, tiny_tokenizer_path, corpus, "--overwrite"),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)),
    )
    assert done.returncode == 2, done.stderr
    assert "cannot write" in done.stderr
    assert {path.name: path.read_bytes() for path in workshop.prefix.parent.iterdir()} == before


def test_a_large_vocabulary_is_written_in_four_bytes(workshop: Workshop, shared_data: Path) -> None:
    tokenizer = shared_data / "tokenizer" / "llm-jp-tokenizer-100k.ver3.0b1.model"
    text = "こんにちは、世界。"
    workshop.run(workshop.write("a.jsonl", jsonl([text])), tokenizer=tokenizer)
    assert open_dataset(str(workshop.prefix)).token_bytes == 4
    assert documents(workshop.prefix) == Tokenizer.load(tokenizer).encode_batch([text])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "--workers 0"),
        ({"tokenizer": Path("none.model")}, r"cannot read tokenizer none\.model"),
        ({"output_prefix": Path("/dev/null/corpus")}, "cannot make /dev/null"),
        ({"output_prefix": Path("c" * 300)}, r"cannot make c+\.idx: .*too long"),
    ],
)
def test_unusable_options_are_refused_at_once(
    workshop: Workshop, options: dict[str, Any], message: str
) -> None:
    corpus = workshop.write("a.jsonl", jsonl(["猫"]))
    with pytest.raises(DataError, match=message):
        workshop.run(corpus, **options)


def test_a_long_document_keeps_every_token(
    workshop: Workshop, tiny_texts: list[str], tiny_tokenizer: Tokenizer
) -> None:
    text = "\n".join(tiny_texts * 10)
    counts = workshop.run(workshop.write("a.jsonl", jsonl([text, "猫"])), workers=2)
    assert counts.documents == 2
    first, _ = documents(workshop.prefix)
    assert np.array_equal(first, tiny_tokenizer.encode_batch([text])[0])


def command(workshop: Workshop, tokenizer: Path, corpus: Path, *more: str) -> list[str]:
    options = ["--tokenizer", str(tokenizer), "--output-prefix", str(workshop.prefix), *more]
    return [sys.executable, str(TOOL), "--input", str(corpus), *options]


def test_the_tool_reports_what_it_wrote_and_left_out(
    workshop: Workshop, tiny_tokenizer_path: Path
) -> None:
    corpus = workshop.write("a.jsonl", jsonl(["猫", ""]) + b"{\n")
    run = command(workshop, tiny_tokenizer_path, corpus, "--on-error", "skip", "--workers", "2")
    done = subprocess.run(run, capture_output=True, text=True, cwd=workshop.folder)
    assert done.returncode == 0, done.stderr
    assert "1 documents" in done.stdout
    assert "left out 1 lines that cannot be used and 1 empty documents" in done.stdout
    assert "a.jsonl, line 3: broken JSON" in done.stderr


def test_the_tool_ends_with_two_and_one_line_at_bad_input(
    workshop: Workshop, tiny_tokenizer_path: Path
) -> None:
    corpus = workshop.write("a.jsonl", b"{\n")
    run = command(workshop, tiny_tokenizer_path, corpus)
    done = subprocess.run(run, capture_output=True, text=True, cwd=workshop.folder)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert workshop.left_behind() == []


ENDLESS = """
import signal, sys
from itertools import count
from pathlib import Path
from megatron_bert.data import preprocess
from megatron_bert.data.text import DocumentReader, RawDocument

# Tests that run in the background of a script inherit an ignored SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)

def endless(self):
    for number in count(1):
        if number == 50_000:
            print("begun", flush=True)
        yield RawDocument(self.paths[0], number, "吾輩は猫である".encode(), json=False)

DocumentReader.__iter__ = endless
corpus, tokenizer, prefix = map(Path, sys.argv[1:])
preprocess.preprocess(preprocess.PreprocessOptions([corpus], tokenizer, prefix, workers=2))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_tool_leaves_no_dataset(
    workshop: Workshop, tiny_tokenizer_path: Path, number: signal.Signals
) -> None:
    corpus = workshop.write("a.txt", b"a")
    arguments = [str(corpus), str(tiny_tokenizer_path), str(workshop.prefix)]
    with subprocess.Popen(
        [sys.executable, "-c", ENDLESS, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=TOOL.parents[1],
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        process.send_signal(number)
        assert process.wait(timeout=60) != 0
    assert not {"corpus.bin", "corpus.idx", "corpus.json"}.intersection(workshop.left_behind())
    if number == signal.SIGINT:
        assert workshop.left_behind() == []

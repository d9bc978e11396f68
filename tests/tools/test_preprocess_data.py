from __future__ import annotations

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tokenizers
import zstandard
from tokenizers import models, pre_tokenizers

from megatron_bert.data import preprocess as preprocess_module
from megatron_bert.data.dictionary_words import Dictionary, token_starts
from megatron_bert.data.indexed_dataset import open_dataset, read_dataset_info
from megatron_bert.data.merge import merge_datasets
from megatron_bert.data.preprocess import preprocess
from megatron_bert.data.preprocess_options import PreprocessOptions
from megatron_bert.data.preprocess_state import PreprocessCounts
from megatron_bert.data.shards import Shard
from megatron_bert.data.tokenizer import SPECIAL_PIECES, Tokenizer
from megatron_bert.data.tokenizer_backends import EncodedTexts
from megatron_bert.errors import DataError, UserError
from tests.deadlines import DEADLINE_SECONDS
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
    assert info["word_boundaries"] is None
    (source,) = info["sources"]
    assert source["path"] == str(corpus)
    assert source["bytes"] == corpus.stat().st_size
    assert source["sha256"] == hashlib.sha256(corpus.read_bytes()).hexdigest()


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


def test_the_first_broken_line_ends_the_work_and_what_came_before_it_is_continued(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_bert.data.preprocess._BATCH_BYTES", 100)
    good = jsonl(["吾輩は猫である"] * 200)
    corpus = workshop.write("a.jsonl", good + b'{"text": "\xe3"}\n' + good + b"{\n")
    for workers in (1, 3):
        with pytest.raises(DataError, match=r"a\.jsonl, line 201: invalid UTF-8.*kept in .*--rest"):
            workshop.run(corpus, workers=workers)
        assert workshop.left_behind() == ["corpus.partial"]
    counts = workshop.run(corpus, on_error="skip")
    assert (counts.documents, counts.skipped_lines) == (400, 2)
    assert len(documents(workshop.prefix)) == 400
    assert workshop.left_behind() == ["corpus.bin", "corpus.idx", "corpus.json"]


@pytest.mark.parametrize("workers", [1, 3])
def test_all_documents_before_a_cut_in_a_file_are_kept_and_the_next_file_may_be_replaced(
    workshop: Workshop, tiny_texts: list[str], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr("megatron_bert.data.preprocess._BATCH_BYTES", 2000)
    first = workshop.write("a.jsonl", jsonl(tiny_texts[:100]))
    content = gzip.compress(jsonl(tiny_texts[100:]))
    second = workshop.write("b.jsonl.gz", content[:12])
    with pytest.raises(DataError, match=r"b\.jsonl\.gz is damaged or.*the same again"):
        workshop.run(first, second, workers=workers)
    journal = json.loads((workshop.prefix.parent / "corpus.partial/journal.json").read_text())
    assert journal["progress"]["note"]["counts"]["documents"] == 100
    workshop.write("b.jsonl.gz", content)
    workshop.run(first, second, workers=workers)
    resumed = {path.name: path.read_bytes() for path in workshop.prefix.parent.iterdir()}
    workshop.run(first, second, overwrite=True)
    assert resumed == {path.name: path.read_bytes() for path in workshop.prefix.parent.iterdir()}


def test_a_broken_file_is_not_taken_for_another_whose_name_ends_its_own(
    workshop: Workshop, tiny_texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_bert.data.preprocess._BATCH_BYTES", 2000)
    monkeypatch.chdir(workshop.write("1.jsonl", jsonl(tiny_texts[:100])).parent)
    workshop.write("11.jsonl", b"{\n")
    with pytest.raises(DataError, match=r"^11\.jsonl, line 1.*mend that and do the same again"):
        workshop.run(Path("1.jsonl"), Path("11.jsonl"))


def test_all_whole_batches_before_a_cut_are_kept_however_far_the_reader_is_ahead(
    workshop: Workshop, tiny_texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_bert.data.preprocess._BATCH_BYTES", 2000)
    whole = zstandard.compress(jsonl(tiny_texts[:200]))
    corpus = workshop.write("a.jsonl.zst", whole + zstandard.compress(jsonl(tiny_texts[200:]))[:20])
    with pytest.raises(DataError, match=r"a\.jsonl\.zst is damaged or.*anew with"):
        workshop.run(corpus, workers=3)
    journal = json.loads((workshop.prefix.parent / "corpus.partial/journal.json").read_text())
    assert 195 <= journal["progress"]["note"]["counts"]["documents"] <= 200


def test_a_json_array_in_place_of_lines_is_known_by_its_beginning(workshop: Workshop) -> None:
    text = json.dumps([{"text": "a"}, {"text": "b"}], indent=1).encode()
    with pytest.raises(DataError, match=r"line 1: broken JSON.*one JSON array.*jq -c '\.\[\]'"):
        workshop.run(workshop.write("a.jsonl", text))
    with pytest.raises(DataError, match=r"line 1: not a JSON object.*one JSON array"):
        workshop.run(workshop.write("a.jsonl", b'[{"text": "a"}, {"text": "b"}]\n'))


def test_a_broken_first_line_leaves_nothing(workshop: Workshop) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: broken JSON"):
        workshop.run(workshop.write("a.jsonl", b"{\n"))
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
    assert "cannot make dataset" in done.stderr
    assert {path.name: path.read_bytes() for path in workshop.prefix.parent.iterdir()} == before


@pytest.mark.faults
def test_a_disk_that_fills_up_at_the_end_of_the_index_leaves_the_old_dataset(
    workshop: Workshop, tiny_texts: list[str], tiny_tokenizer_path: Path
) -> None:
    resource = pytest.importorskip("resource")
    corpus = workshop.write("b.jsonl", jsonl([*tiny_texts, *["猫"] * 9000]))
    workshop.run(corpus)
    # It is the largest of the files.
    limit = workshop.prefix.with_suffix(".idx").stat().st_size - 50
    assert limit > workshop.prefix.with_suffix(".bin").stat().st_size
    for path in workshop.prefix.parent.iterdir():
        path.unlink()
    workshop.run(workshop.write("a.jsonl", jsonl(["猫"])))
    before = {path.name: path.read_bytes() for path in workshop.prefix.parent.iterdir()}
    done = subprocess.run(
        command(workshop, tiny_tokenizer_path, corpus, "--overwrite"),
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 2, done.stderr
    assert "cannot make dataset" in done.stderr
    folder = workshop.prefix.parent
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_a_large_vocabulary_is_written_in_four_bytes(workshop: Workshop, shared_data: Path) -> None:
    tokenizer = shared_data / "tokenizer" / "llm-jp-tokenizer-100k.ver3.0b1.model"
    text = "こんにちは、世界。"
    workshop.run(workshop.write("a.jsonl", jsonl([text])), tokenizer=tokenizer)
    assert open_dataset(str(workshop.prefix)).token_bytes == 4
    assert documents(workshop.prefix) == Tokenizer.load(tokenizer).encode_batch([text])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "--workers = 0: "),
        ({"field_keys": ["a", "b", "a"]}, "--field-key a: given twice"),
        *[
            (
                {"output_prefix": name, "shard": shard},
                f"--output-prefix .*: is a folder; give a name in it, as {Path(name, 'train')}",
            )
            for name in (".", "", "/", "..", "new/", tempfile.gettempdir())
            for shard in (None, Shard(0, 2))
        ],
        ({"tokenizer": Path("none.model")}, r"cannot read tokenizer none\.model"),
        ({"output_prefix": Path("/dev/null/corpus")}, "cannot make /dev/null"),
        ({"output_prefix": Path("c" * 300)}, r"cannot make c+\.bin: .*too long"),
    ],
)
def test_unusable_options_are_refused_at_once(
    workshop: Workshop, options: dict[str, Any], message: str
) -> None:
    corpus = workshop.write("a.jsonl", jsonl(["猫"]))
    with pytest.raises(UserError, match=message):
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


def test_the_tool_tokenizes_with_a_thread_for_each_core_that_it_may_use(
    workshop: Workshop, tiny_tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 8})
    monkeypatch.setattr(os, "cpu_count", lambda: 192)
    arguments = command(workshop, tiny_tokenizer_path, Path("a.jsonl"))[2:]
    assert tool._parser().parse_args(arguments).workers == 3


def test_the_tool_reports_what_it_wrote_and_left_out(
    workshop: Workshop, tiny_tokenizer_path: Path
) -> None:
    corpus = workshop.write("a.jsonl", jsonl(["猫", ""]) + b"{\n")
    run = command(workshop, tiny_tokenizer_path, corpus, "--on-error", "skip", "--workers", "2")
    done = subprocess.run(run, capture_output=True, text=True, cwd=workshop.folder)
    assert done.returncode == 0, done.stderr
    assert "1 documents" in done.stdout
    assert "left out 1 line that cannot be used, 1 empty document and 0 duplicates" in done.stdout
    assert "a.jsonl, line 3: broken JSON" in done.stderr


@pytest.mark.parametrize(
    "more", [["--output-prefix", "."], ["--output-prefix", "", "--shard", "0/2"]]
)
def test_the_tool_ends_with_two_and_one_line_at_a_prefix_without_a_name(
    workshop: Workshop, tiny_tokenizer_path: Path, more: list[str]
) -> None:
    corpus = workshop.write("a.jsonl", jsonl(["猫"]))
    run = command(workshop, tiny_tokenizer_path, corpus, *more)
    done = subprocess.run(run, capture_output=True, text=True, cwd=workshop.folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --output-prefix .: is a folder; give a name in it, as train\n"


@pytest.mark.parametrize("shard", [[], ["--shard", "0/2"]])
def test_a_file_given_twice_is_refused_as_its_documents_would_count_twice(
    workshop: Workshop, tiny_tokenizer_path: Path, shard: list[str]
) -> None:
    corpus = workshop.write("a.jsonl", jsonl(["猫", "犬"]))
    again = corpus.parent / ".." / corpus.parent.name / corpus.name
    run = ["--input", str(corpus), str(again), "--tokenizer", str(tiny_tokenizer_path), *shard]
    with pytest.raises(DataError, match=r"--input .*a\.jsonl, .*a\.jsonl: given twice; give each"):
        tool.main([*run, "--output-prefix", str(workshop.prefix)])
    assert [path.name for path in workshop.folder.iterdir()] == ["a.jsonl"]


def test_a_prefix_that_names_a_folder_is_refused_and_nothing_is_written(
    workshop: Workshop, tiny_tokenizer_path: Path
) -> None:
    corpus = workshop.write("a.jsonl", jsonl(["猫"]))
    run = ["--input", str(corpus), "--tokenizer", str(tiny_tokenizer_path), "--output-prefix"]
    for prefix in (f"{workshop.folder}/new/", str(workshop.folder)):
        with pytest.raises(DataError, match=f"{prefix}: is a folder; give a name in it, as "):
            tool.main([*run, prefix])
    assert [path.name for path in workshop.folder.iterdir()] == ["a.jsonl"]


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
from megatron_bert.data.raw_documents import RawLines
from megatron_bert.data.text import DocumentReader

# Tests that run in the background of a script inherit an ignored SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)

def endless(self, number, batch_bytes, batch_documents):
    for batch in count():
        if batch == 50:
            print("begun", flush=True)
        lines = ["吾輩は猫である".encode()] * 1000
        yield RawLines(self.paths[0], 1 + 1000 * batch, lines, json=False)

DocumentReader.batches_of = endless
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
        assert process.wait(timeout=DEADLINE_SECONDS) != 0
    assert not {"corpus.bin", "corpus.idx", "corpus.json"}.intersection(workshop.left_behind())
    if number == signal.SIGINT:
        assert workshop.left_behind() == []


class StrangeIds:
    """Ids that no right tokenizer gives."""

    def __init__(self, given: int) -> None:
        self._given = given

    def encode(self, texts: list[str]) -> EncodedTexts:
        of_text = {"wrong": [20, self._given], "": []}
        ids = [of_text.get(text, [20]) for text in texts]
        return EncodedTexts(
            np.array([number for some in ids for number in some], dtype=np.int32),
            np.array([len(some) for some in ids]),
        )


@pytest.mark.parametrize("given", [-1, 512, 70_000, 3])
def test_an_id_that_text_cannot_have_is_refused_with_its_documents_line(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, given: int
) -> None:
    monkeypatch.setattr(Tokenizer, "encode", StrangeIds(given).encode)
    corpus = workshop.write("a.jsonl", jsonl(["good", ""]) + b"{\n" + jsonl(["wrong", "good"]))
    with pytest.raises(DataError, match=rf"a\.jsonl, line 4: tokenizer .* gives the id {given},"):
        workshop.run(corpus, on_error="skip")
    assert workshop.left_behind() == []


def test_unknown_characters_are_allowed_where_there_is_no_byte_fallback(
    workshop: Workshop, tmp_path: Path
) -> None:
    vocabulary = {piece: number for number, piece in enumerate([*SPECIAL_PIECES, "cat"])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.add_special_tokens(list(SPECIAL_PIECES))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    corpus = workshop.write("a.jsonl", jsonl(["cat dog"]))
    workshop.run(corpus, tokenizer=tmp_path / "tokenizer.json")
    assert documents(workshop.prefix) == [[8, 0]]


def merged(workshop: Workshop, shards: int, *inputs: Path) -> Path:
    """Preprocess in shards and join them."""
    for number in range(shards):
        workshop.run(*inputs, shard=Shard(number, shards), on_error="skip")
    prefixes = [Shard(number, shards).prefix(workshop.prefix) for number in range(shards)]
    merge_datasets(prefixes, workshop.folder / "merged")
    return workshop.folder / "merged"


@pytest.mark.parametrize("shards", [1, 2, 3, 4, 5])
def test_shards_of_whole_files_give_the_files_of_one_job(
    workshop: Workshop, tiny_texts: list[str], shards: int
) -> None:
    inputs = [workshop.write(f"{k}.jsonl", jsonl(tiny_texts[k::5]) + b"{\n") for k in range(5)]
    whole = merged(workshop, shards, *inputs)
    workshop.run(*inputs, on_error="skip")
    for suffix in (".bin", ".idx", ".json"):
        expected = workshop.prefix.with_suffix(suffix).read_bytes()
        assert whole.with_suffix(suffix).read_bytes() == expected


def test_a_shard_of_more_files_takes_a_block_of_them(
    workshop: Workshop, tiny_texts: list[str]
) -> None:
    inputs = [workshop.write(f"{k}.jsonl", jsonl(tiny_texts[k : k + 1])) for k in range(5)]
    workshop.run(*inputs, shard=Shard(1, 2))
    workshop.run(*inputs[2:])
    shard = Shard(1, 2).prefix(workshop.prefix)
    assert shard.name == "corpus-00001-of-00002"
    assert documents(shard) == documents(workshop.prefix)


def test_more_shards_than_files_share_the_documents(
    workshop: Workshop, tiny_texts: list[str]
) -> None:
    inputs = [
        workshop.write("a.jsonl", jsonl([*tiny_texts[:50], ""]) + b"{\n"),
        workshop.write("b.jsonl", jsonl(tiny_texts[50:80])),
    ]
    whole = merged(workshop, 4, *inputs)
    workshop.run(*inputs, on_error="skip")
    assert sorted(documents(whole)) == sorted(documents(workshop.prefix))
    assert read_dataset_info(whole) == read_dataset_info(workshop.prefix)
    info = read_dataset_info(Shard(3, 4).prefix(workshop.prefix))
    assert info is not None
    assert [source.part for source in info.sources] == ["3/4", "3/4"]


@pytest.mark.parametrize("shards", [2, 6])
def test_shards_of_different_inputs_are_not_merged(
    workshop: Workshop, tiny_texts: list[str], shards: int
) -> None:
    inputs = [workshop.write(f"{k}.jsonl", jsonl(tiny_texts[k : k + 5])) for k in range(4)]
    for number in range(shards):
        workshop.run(*inputs[number == 0 :], shard=Shard(number, shards))
    prefixes = [Shard(number, shards).prefix(workshop.prefix) for number in range(shards)]
    with pytest.raises(DataError, match=r"corpus-00000-of-.* and .*corpus-00001-.* not shards of"):
        merge_datasets(prefixes, workshop.folder / "merged")
    assert not list(workshop.folder.glob("merged*"))
    workshop.run(*inputs, shard=Shard(0, shards), overwrite=True)
    merge_datasets(prefixes, workshop.folder / "merged")
    info = read_dataset_info(workshop.folder / "merged")
    assert info is not None
    assert info.shard_set is None


def test_shards_that_share_a_file_which_changed_between_them_are_not_merged(
    workshop: Workshop,
) -> None:
    corpus = workshop.write("a.jsonl", jsonl(["猫", "人間"]))
    workshop.run(corpus, shard=Shard(0, 2))
    workshop.write("a.jsonl", jsonl(["書生", "猫", "人間"]))
    workshop.run(corpus, shard=Shard(1, 2))
    prefixes = [Shard(number, 2).prefix(workshop.prefix) for number in range(2)]
    with pytest.raises(DataError, match=r"not shards of one input.*make one of them anew"):
        merge_datasets(prefixes, workshop.folder / "merged")


def test_a_shard_without_documents_is_an_empty_dataset(
    workshop: Workshop, tiny_tokenizer: Tokenizer
) -> None:
    corpus = workshop.write("a.jsonl", jsonl(["猫"]))
    assert workshop.run(corpus, shard=Shard(1, 2)) == PreprocessCounts()
    assert documents(Shard(1, 2).prefix(workshop.prefix)) == []
    assert documents(merged(workshop, 3, corpus)) == tiny_tokenizer.encode_batch(["猫"])


@pytest.mark.parametrize("text", ["8/8", "1", "-1/4", "a/b", "0/0", f"0/{'9' * 5000}"])
def test_a_shard_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=f"--shard {text}: give K/N"):
        Shard.parse(text)


class FakeFinder:
    """Words of three characters."""

    def __init__(self, dictionary: str) -> None:
        self.name = f"fake {dictionary}"

    def word_begins(self, text: str) -> npt.NDArray[np.int64]:
        return np.arange(0, len(text), 3)


def word_starts(prefix: Path) -> list[int]:
    packed = np.fromfile(prefix.with_suffix(".words"), dtype=np.uint8)
    count = open_dataset(prefix).num_tokens
    return np.unpackbits(packed, count=count, bitorder="little").tolist()


def test_the_beginnings_of_words_stand_beside_the_tokens(
    workshop: Workshop, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preprocess_module, "WordFinder", FakeFinder)
    monkeypatch.setattr("megatron_bert.data.dataset_writer._STARTS_AT_A_TIME", 8)
    texts = ["abcdefghij", "", "名前はまだ無い", "the fox"]
    corpus = workshop.write("a.jsonl", jsonl(texts))
    workshop.run(corpus, word_boundaries="mecab")
    assert documents(workshop.prefix) == tiny_tokenizer.encode_batch([t for t in texts if t])
    expected: list[int] = []
    for text, (_, offsets) in zip(texts, tiny_tokenizer.encode_with_offsets(texts), strict=True):
        expected += token_starts(text, np.arange(0, len(text), 3), offsets).tolist()
    assert word_starts(workshop.prefix) == expected
    info = read_dataset_info(workshop.prefix)
    assert info is not None
    assert info.word_boundaries == "fake mecab"
    workshop.run(corpus, overwrite=True)
    assert workshop.left_behind() == ["corpus.bin", "corpus.idx", "corpus.json"]


def test_merged_shards_keep_their_words_if_all_have_them(
    workshop: Workshop, tiny_texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preprocess_module, "WordFinder", FakeFinder)
    inputs = [workshop.write(f"{k}.jsonl", jsonl(tiny_texts[k::3])) for k in range(2)]
    shards = [Shard(number, 2) for number in range(2)]
    for shard in shards:
        workshop.run(*inputs, shard=shard, word_boundaries="mecab")
    workshop.run(*inputs, word_boundaries="mecab")
    prefixes = [shard.prefix(workshop.prefix) for shard in shards]
    merge_datasets(prefixes, workshop.folder / "merged")
    for suffix in (".bin", ".words", ".json"):
        expected = workshop.prefix.with_suffix(suffix).read_bytes()
        assert (workshop.folder / f"merged{suffix}").read_bytes() == expected
    workshop.run(*inputs, shard=shards[1], overwrite=True)
    merge_datasets(prefixes, workshop.folder / "merged", overwrite=True)
    info = read_dataset_info(workshop.folder / "merged")
    assert info is not None
    assert info.word_boundaries is None
    assert not (workshop.folder / "merged.words").exists()


@pytest.mark.peers
@pytest.mark.parametrize("dictionary", ["mecab", "sudachi"])
def test_a_real_dictionarys_words_are_stored(
    workshop: Workshop, tiny_texts: list[str], dictionary: Dictionary
) -> None:
    pytest.importorskip("fugashi" if dictionary == "mecab" else "sudachipy")
    corpus = workshop.write("a.jsonl", jsonl(tiny_texts))
    counts = workshop.run(corpus, word_boundaries=dictionary, workers=2)
    assert 0.2 < sum(word_starts(workshop.prefix)) / counts.tokens < 0.9


def test_a_text_that_was_there_before_is_left_out_and_counted(
    workshop: Workshop, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preprocess_module, "_BATCH_BYTES", 30)
    monkeypatch.setattr(preprocess_module, "WordFinder", FakeFinder)
    first = workshop.write("a.jsonl", jsonl(["猫", "人間", "", "猫", "ＡＢＣ"]))
    second = workshop.write("b.txt", "人間\nABC\n書生\n".encode())
    options: dict[str, Any] = {"deduplicate": True, "normalize": "nfkc", "workers": 3}
    counts = workshop.run(first, second, word_boundaries="mecab", **options)
    expected = tiny_tokenizer.encode_batch(["猫", "人間", "ABC", "書生"])
    assert documents(workshop.prefix) == expected
    assert (counts.duplicate_documents, counts.empty_documents) == (3, 1)
    assert len(word_starts(workshop.prefix)) == sum(map(len, expected))
    info = read_dataset_info(workshop.prefix)
    assert info is not None
    assert (info.duplicate_documents, info.normalization) == (3, "nfkc")


def test_documents_and_tokens_are_counted_by_fields_and_added_up_by_a_merge(
    workshop: Workshop, tiny_tokenizer: Tokenizer
) -> None:
    lines = [{"text": "猫", "meta": {"lang": "ja"}}, {"text": "fox"}, {"text": ""}]
    inputs = [
        workshop.write("a.jsonl", "\n".join(map(json.dumps, lines)).encode()),
        workshop.write("b.jsonl", json.dumps(lines[0]).encode()),
    ]
    workshop.run(*inputs, field_keys=["meta.lang"])
    info = read_dataset_info(workshop.prefix)
    assert info is not None
    cat, fox = map(len, tiny_tokenizer.encode_batch(["猫", "fox"]))
    assert info.fields["meta.lang"]["values"] == {"ja": {"documents": 2, "tokens": 2 * cat}}
    assert info.fields["meta.lang"]["absent"] == {"documents": 1, "tokens": fox}
    for number in range(2):
        workshop.run(*inputs, field_keys=["meta.lang"], shard=Shard(number, 2))
    prefixes = [Shard(number, 2).prefix(workshop.prefix) for number in range(2)]
    merge_datasets(prefixes, workshop.folder / "merged")
    assert read_dataset_info(workshop.folder / "merged") == info


def test_rows_of_parquet_become_documents(workshop: Workshop, tiny_tokenizer: Tokenizer) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = workshop.folder / "a.parquet"
    table = pyarrow.table({"body": ["猫", "fox", "人間"], "lang": ["ja", "en", "ja"]})
    parquet.write_table(table, path, row_group_size=2)
    workshop.run(path, json_key="body", field_keys=["lang"])
    assert documents(workshop.prefix) == tiny_tokenizer.encode_batch(["猫", "fox", "人間"])
    info = read_dataset_info(workshop.prefix)
    assert info is not None
    assert list(info.fields["lang"]["values"]) == ["ja", "en"]
    assert info.sources[0].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()

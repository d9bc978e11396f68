"""Preprocessing that was interrupted, and goes on where it was."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_bert.data import encoding, partial_work
from megatron_bert.data.input_documents import FileHashes
from megatron_bert.data.parsing import ParsedTexts, parse_all
from megatron_bert.data.preprocess import preprocess
from megatron_bert.data.preprocess_options import PreprocessOptions
from megatron_bert.data.raw_documents import RawBatch
from megatron_bert.data.shards import Shard
from megatron_bert.errors import DataError
from tests.deadlines import DEADLINE_SECONDS

# Forks a job for every moment at which it touches a file under the output folder, kills it there,
# runs it again and compares the result: one process, so that the libraries are loaded once.
KILLED_EVERYWHERE = """
import os, shutil, signal, sys
from pathlib import Path
import numpy as np
from megatron_bert.errors import DataError
from megatron_bert.data import partial_work, preprocess as module

folder, tokenizer, *inputs = map(Path, sys.argv[1:])
module._BATCH_BYTES = 2000
partial_work._BYTES_BETWEEN_COMMITS = 9000

class Finder:
    def __init__(self, dictionary):
        self.name = dictionary
    def word_begins(self, text):
        return np.arange(0, len(text), 3)

module.WordFinder = Finder

def run(prefix):
    options = dict(
        word_boundaries="mecab", field_keys=["lang"], normalize="nfkc", deduplicate=True,
        workers=2, on_error="skip", overwrite=prefix == old,
    )
    module.preprocess(module.PreprocessOptions(inputs, tokenizer, prefix, **options))

def in_child(prefix, die_at=None):
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    code = 1
    try:
        touched = 0
        def watch(event, arguments):
            nonlocal touched
            if arguments and str(arguments[0]).startswith(str(prefix)):
                touched += 1
                if touched == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
        if die_at:
            sys.addaudithook(watch)
        sys.stderr = open(os.devnull, "w")
        try:
            run(prefix)
            code = 0
        except DataError as error:
            # All was done but for the last of the empty folder.
            code = 0 if "already there" in str(error) else 2
    finally:
        os._exit(code)

def contents(prefix):
    return {path.name: path.read_bytes() for path in prefix.parent.iterdir()}

expected, new, old = (folder / name / "set" for name in ("expected", "new", "old"))
assert in_child(expected) == 0
moments = {new: 0, old: 0}
for prefix in moments:
    # Where a dataset stands already only the last moments differ, in which it is replaced.
    moments[old] = max(0, moments[new] - 40)
    while True:
        shutil.rmtree(prefix.parent, ignore_errors=True)
        if prefix == old:
            shutil.copytree(expected.parent, old.parent)
        moments[prefix] += 1
        status = in_child(prefix, moments[prefix])
        if status == 0:
            break
        assert status == signal.SIGKILL, status
        assert in_child(prefix) == 0, moments
        assert contents(prefix) == contents(expected), moments
print(*moments.values())
"""


def write_corpus(folder: Path, texts: list[str]) -> list[Path]:
    lines = [
        json.dumps({"text": text, "lang": ["ja", "en"][text.isascii()]}, ensure_ascii=False)
        for text in texts
    ]
    first, second = folder / "a.jsonl", folder / "b.jsonl.gz"
    first.write_text("\n".join([*lines[:150], "{broken", *lines[150:200]]) + "\n")
    second.write_bytes(
        gzip.compress(("\n".join(["", *lines[200:], "{}", *lines[100:120]]) + "\n").encode())
    )
    return [first, second]


@pytest.mark.faults
def test_a_job_killed_at_any_moment_ends_with_the_bytes_of_one_that_was_not(
    tmp_path: Path, tiny_texts: list[str], tiny_tokenizer_path: Path
) -> None:
    inputs = write_corpus(tmp_path, tiny_texts)
    done = subprocess.run(
        [sys.executable, "-c", KILLED_EVERYWHERE, tmp_path, tiny_tokenizer_path, *inputs],
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    # Enough moments for several commits, the last steps and the renames.
    assert all(int(count) > 40 for count in done.stdout.split())


class Interrupted(BaseException):
    """A job's end as if by a kill, in a test's own process."""


class Corpus:
    """Two files, and a `run` that may be cut short after some commits."""

    def __init__(
        self,
        folder: Path,
        texts: list[str],
        tokenizer: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        self.inputs = write_corpus(folder, texts)
        self.prefix = folder / "out" / "set"
        self.tokenizer = tokenizer
        self._monkeypatch = monkeypatch
        monkeypatch.setattr("megatron_bert.data.preprocess._BATCH_BYTES", 2000)
        monkeypatch.setattr("megatron_bert.data.partial_work._BYTES_BETWEEN_COMMITS", 1)

    def run(self, **options: object) -> None:
        given = {
            "field_keys": ["lang"],
            "deduplicate": True,
            "tokenizer": self.tokenizer,
            "output_prefix": self.prefix,
            "on_error": "skip",
            **options,
        }
        preprocess(PreprocessOptions(self.inputs, **given))  # type: ignore[arg-type]

    def interrupt(self, after: int, **options: object) -> None:
        write, written = partial_work.write_atomically, 0

        def write_and_stop(path: Path, content: str) -> None:
            nonlocal written
            write(path, content)
            written += 1
            if written == after:
                raise Interrupted

        with self._monkeypatch.context() as patch:
            patch.setattr(partial_work, "write_atomically", write_and_stop)
            with pytest.raises(Interrupted):
                self.run(**options)

    def contents(self, prefix: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in prefix.parent.iterdir() if path.is_file()}


@pytest.fixture
def corpus(
    tmp_path: Path,
    tiny_texts: list[str],
    tiny_tokenizer_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Corpus:
    return Corpus(tmp_path, tiny_texts, tiny_tokenizer_path, monkeypatch)


def test_what_is_committed_is_not_done_again(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus.interrupt(after=4)
    journal = json.loads((corpus.prefix.parent / "set.partial" / "journal.json").read_text())
    done = journal["progress"]["note"]["position"]["documents"]
    assert done > 0
    parsed = 0

    def count(documents: RawBatch, *arguments: Any) -> ParsedTexts:
        nonlocal parsed
        parsed += len(documents)
        return parse_all(documents, *arguments)

    monkeypatch.setattr(encoding, "parse_all", count)
    corpus.run()
    assert parsed == 201 + 121 - done


@pytest.mark.parametrize("shard", [None, Shard(0, 2), Shard(1, 3)])
def test_an_interrupted_job_ends_with_the_bytes_of_one_that_was_not(
    corpus: Corpus, tmp_path: Path, shard: Shard | None
) -> None:
    corpus.run(output_prefix=tmp_path / "expected" / "set", shard=shard)
    corpus.interrupt(after=2, shard=shard, workers=3)
    corpus.interrupt(after=1, shard=shard)
    corpus.run(shard=shard, workers=2)
    assert corpus.contents(corpus.prefix) == corpus.contents(tmp_path / "expected" / "set")
    assert not list(corpus.prefix.parent.glob("*.partial"))


def test_checksums_are_right_after_an_interruption_in_the_middle_of_a_file(corpus: Corpus) -> None:
    corpus.interrupt(after=3)
    corpus.run()
    info = json.loads(corpus.prefix.with_suffix(".json").read_text())
    expected = [hashlib.sha256(path.read_bytes()).hexdigest() for path in corpus.inputs]
    assert [source["sha256"] for source in info["sources"]] == expected


def test_duplicates_and_fields_are_told_across_an_interruption(corpus: Corpus) -> None:
    corpus.interrupt(after=5)
    corpus.run()
    info = json.loads(corpus.prefix.with_suffix(".json").read_text())
    assert (info["documents"], info["duplicate_documents"]) == (300, 20)
    languages = info["fields"]["lang"]["values"]
    assert {key: amount["documents"] for key, amount in languages.items()} == {
        "en": 100,
        "ja": 200,
    }
    assert sum(amount["tokens"] for amount in languages.values()) == info["tokens"]


def test_a_changed_input_or_option_is_named_and_restart_begins_anew(
    corpus: Corpus, tmp_path: Path
) -> None:
    corpus.interrupt(after=2)
    with pytest.raises(DataError, match=r"--txt-documents was line and is now blank-line.*--rest"):
        corpus.run(txt_documents="blank-line")
    other = tmp_path / "other.model"
    other.write_bytes(corpus.tokenizer.read_bytes() + b"\x9a\x06\x00")
    with pytest.raises(DataError, match=r"the tokenizer's SHA-256 was [0-9a-f]{64} and is now"):
        corpus.run(tokenizer=other)
    corpus.inputs[0].touch()
    with pytest.raises(DataError, match=r"a\.jsonl was of .* bytes modified at .* --restart"):
        corpus.run()
    corpus.inputs.pop()
    with pytest.raises(DataError, match=r"input 1 was .* and is now not given"):
        corpus.run()
    corpus.run(restart=True)
    corpus.run(output_prefix=tmp_path / "expected" / "set")
    assert corpus.contents(corpus.prefix) == corpus.contents(tmp_path / "expected" / "set")


def test_an_input_that_changes_while_it_is_read_is_an_error(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touch_and_parse(*arguments: Any) -> ParsedTexts:
        os.utime(corpus.inputs[0], ns=(1, 1))
        return parse_all(*arguments)

    monkeypatch.setattr(encoding, "parse_all", touch_and_parse)
    with pytest.raises(DataError, match=r"a\.jsonl changed while it was read.*--restart"):
        corpus.run()
    assert not corpus.prefix.with_suffix(".idx").exists()


def test_a_file_that_was_not_begun_may_be_replaced_between_jobs(
    corpus: Corpus, tmp_path: Path
) -> None:
    corpus.interrupt(after=2)
    corpus.inputs[1].write_bytes(gzip.compress(b'{"text": "another", "lang": "en"}\n'))
    corpus.run()
    corpus.run(output_prefix=tmp_path / "expected" / "set")
    assert corpus.contents(corpus.prefix) == corpus.contents(tmp_path / "expected" / "set")


def test_an_input_that_is_removed_while_it_is_read_is_named(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_hashes = FileHashes.all

    def hash_and_remove(hashes: FileHashes) -> list[str]:
        computed = all_hashes(hashes)
        corpus.inputs[0].unlink()
        return computed

    monkeypatch.setattr(FileHashes, "all", hash_and_remove)
    with pytest.raises(DataError, match=r"cannot read .*a\.jsonl: No such file.*put it back"):
        corpus.run()
    assert not corpus.prefix.with_suffix(".idx").exists()


def test_field_keys_with_spaces_are_told_from_several(corpus: Corpus) -> None:
    corpus.interrupt(after=2, field_keys=["lang text"])
    with pytest.raises(DataError, match=r'--field-key was \["lang text"\] and is now \["lang", '):
        corpus.run(field_keys=["lang", "text"])


def test_another_version_of_the_tokenizers_library_is_named(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus.interrupt(after=2, normalize="nfkc")
    with monkeypatch.context() as patch:
        patch.setattr("megatron_bert.data.preprocess.version", lambda _: "9.9")
        with pytest.raises(DataError, match=r"library was .* and is now sentencepiece 9\.9, tok"):
            corpus.run(normalize="nfkc")
    monkeypatch.setattr("unicodedata.unidata_version", "99.0")
    with pytest.raises(DataError, match=r"--normalize was .* and is now nfkc of Unicode 99\.0"):
        corpus.run(normalize="nfkc")


def test_a_second_live_job_is_refused_with_the_firsts_process(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = []

    def begin_another(*arguments: Any) -> ParsedTexts:
        if not refused:
            with pytest.raises(DataError, match="in use by a live job") as error:
                corpus.run()
            refused.append(str(error.value))
        return parse_all(*arguments)

    monkeypatch.setattr(encoding, "parse_all", begin_another)
    corpus.run()
    assert f"process {os.getpid()}," in refused[0]


def test_damaged_work_is_named(corpus: Corpus) -> None:
    corpus.interrupt(after=2)
    partial = corpus.prefix.parent / "set.partial"
    (partial / "lengths").write_bytes(b"")
    with pytest.raises(DataError, match=r"lengths has 0 bytes and its journal tells of .*--rest"):
        corpus.run()
    (partial / "journal.json").write_text("{")
    with pytest.raises(DataError, match=r"journal\.json is damaged .*--restart"):
        corpus.run()
    corpus.run(restart=True)
    assert corpus.prefix.with_suffix(".idx").exists()


def test_an_old_dataset_stays_while_work_is_kept_and_needs_overwrite(corpus: Corpus) -> None:
    corpus.run()
    before = corpus.contents(corpus.prefix)
    corpus.interrupt(after=2, overwrite=True)
    with pytest.raises(DataError, match=r"already there.*--overwrite"):
        corpus.run()
    assert corpus.contents(corpus.prefix) == before
    corpus.run(overwrite=True)
    assert corpus.contents(corpus.prefix) == before

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_bert.data import index_file, merge, word_starts
from megatron_bert.data.indexed_dataset import (
    SourceFile,
    read_dataset_info,
    write_dataset_info,
)
from megatron_bert.data.merge import merge_datasets, merge_infos
from megatron_bert.data.preprocess import preprocess
from megatron_bert.data.preprocess_options import PreprocessOptions
from megatron_bert.errors import DataError
from tests.core.support import write_documents, write_sequences
from tests.deadlines import DEADLINE_SECONDS
from tests.tools.merge_support import INFO, contents, names, write_set, write_word_starts
from tools import merge_datasets as tool


def test_merged_shards_are_the_files_of_preprocessing_all_at_once(
    tmp_path: Path, tiny_texts: list[str], tiny_tokenizer_path: Path
) -> None:
    files = []
    for number, begin in enumerate(range(0, 300, 100)):
        files.append(tmp_path / f"{number}.jsonl")
        lines = [json.dumps({"text": text}) for text in [*tiny_texts[begin : begin + 100], ""]]
        files[-1].write_text("\n".join([*lines, "{broken"]) + "\n")

    def make(inputs: Sequence[Path], prefix: Path) -> None:
        preprocess(PreprocessOptions(inputs, tiny_tokenizer_path, prefix, on_error="skip"))

    make(files, tmp_path / "at_once")
    shards = [tmp_path / f"shard-{number:05}-of-00003" for number in range(3)]
    for file, shard in zip(files, shards, strict=True):
        make([file], shard)
    merge_datasets([shards[1], shards[2], shards[0]], tmp_path / "merged")
    for suffix in (".bin", ".idx", ".json"):
        expected = (tmp_path / f"at_once{suffix}").read_bytes()
        assert (tmp_path / f"merged{suffix}").read_bytes() == expected
    info = read_dataset_info(tmp_path / "merged")
    assert info is not None
    assert (info.skipped_lines, info.empty_documents) == (3, 3)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("token_bytes", [2, 4])
def test_sequences_and_documents_keep_their_order_and_boundaries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token_bytes: int, inside: bool
) -> None:
    monkeypatch.setattr(index_file, "_ITEMS_AT_A_TIME", 3)
    monkeypatch.setattr(merge, "_BLOCK_BYTES", 10)
    if not inside:
        # As between two filesystems, or on one that cannot.
        monkeypatch.setattr(os, "copy_file_range", refuse_to_copy)
    choose = random.Random(7)
    all_sequences: list[list[int]] = []
    all_boundaries = [0]
    prefixes = []
    for number in range(4):
        sizes = [choose.randrange(4) for _ in range(choose.randrange(12))]
        sequences = [[choose.randrange(60000) for _ in range(size)] for size in sizes]
        boundaries = [0, *sorted(choose.choices(range(len(sizes) + 1), k=3)), len(sizes)]
        prefixes.append(tmp_path / f"part{number}")
        write_sequences(prefixes[-1], sequences, boundaries, token_bytes)
        all_boundaries += [len(all_sequences) + boundary for boundary in boundaries[1:]]
        all_sequences += sequences
    write_sequences(tmp_path / "expected", all_sequences, all_boundaries, token_bytes)
    merge_datasets(prefixes, tmp_path / "merged")
    for suffix in (".bin", ".idx"):
        expected = (tmp_path / f"expected{suffix}").read_bytes()
        assert (tmp_path / f"merged{suffix}").read_bytes() == expected
    assert contents(tmp_path / "merged") == [
        document for prefix in prefixes for document in contents(prefix)
    ]


def refuse_to_copy(*_: Any) -> int:
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))


def test_empty_sets_join_to_what_the_others_hold(tmp_path: Path) -> None:
    for name, documents in (("none", []), ("some", [[1], [2, 3]]), ("empty", [[]])):
        write_documents(tmp_path / name, documents)
    parts = [tmp_path / name for name in ("none", "some", "none2", "empty")]
    write_documents(tmp_path / "none2", [])
    merge_datasets(parts, tmp_path / "merged")
    assert contents(tmp_path / "merged") == [[1], [2, 3], []]
    merge_datasets([tmp_path / "none", tmp_path / "none2"], tmp_path / "nothing")
    assert (tmp_path / "nothing.idx").stat().st_size == 42


def test_word_starts_are_joined_bit_by_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_starts, "_BITS_AT_A_TIME", 8)
    choose = random.Random(3)
    joined: list[int] = []
    prefixes = []
    for number, length in enumerate([3, 0, 21, 5, 8, 11]):
        prefixes.append(tmp_path / f"part{number}")
        write_documents(prefixes[-1], [[7] * length])
        bits = [choose.randrange(2) for _ in range(length)]
        write_word_starts(prefixes[-1], bits)
        joined += bits
    merge_datasets(prefixes, tmp_path / "merged")
    write_word_starts(tmp_path / "expected", joined)
    expected = (tmp_path / "expected.words").read_bytes()
    assert (tmp_path / "merged.words").read_bytes() == expected


@pytest.mark.parametrize(
    ("dictionaries", "message"),
    [
        (
            {"a": "mecab 1", "b": "mecab 2"},
            r"a\.words were found by mecab 1, .*b\.words .* mecab 2",
        ),
        (
            {"a": None, "b": "mecab"},
            r"found the words of .*/a\.words is not known, but .* by mecab",
        ),
        (
            {"a": "mecab"},
            r"/a\.words were found by mecab, but .* words of .*/b\.words is not known",
        ),
        ({"a": "mecab", "b": "mecab"}, None),
        ({}, None),
    ],
)
def test_words_of_different_dictionaries_are_refused(
    tmp_path: Path, dictionaries: dict[str, str | None], message: str | None
) -> None:
    for name in "ab":
        if name in dictionaries:
            write_set(tmp_path / name, [[1], [2, 3]], word_boundaries=dictionaries[name])
        else:
            write_documents(tmp_path / name, [[1], [2, 3]])
        write_word_starts(tmp_path / name, [1, 0, 1])
    merged = tmp_path / "out" / "merged"

    def merge_both() -> None:
        merge_datasets([tmp_path / "a", tmp_path / "b"], merged)

    if message is None:
        merge_both()
        assert Path(f"{merged}.words").read_bytes() == bytes([0b101101])
        info = read_dataset_info(merged)
        assert dictionaries.get("a") == (None if info is None else info.word_boundaries)
        return
    with pytest.raises(DataError, match=message):
        merge_both()
    assert not (tmp_path / "out").exists()
    # Without them the result has no words at all.
    (tmp_path / "a.words").unlink()
    merge_both()
    assert not Path(f"{merged}.words").exists()
    info = read_dataset_info(merged)
    assert info is None or info.word_boundaries is None


def test_the_tool_says_which_sidecars_are_absent_and_writes_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_set(tmp_path / "a", [[1], [2]])
    write_word_starts(tmp_path / "a", [1, 0])
    write_documents(tmp_path / "b", [[3]])
    arguments = ["--input", str(tmp_path / "a.idx"), str(tmp_path / "b.idx")]
    tool.main([*arguments, "--output-prefix", str(tmp_path / "out" / "merged")])
    assert capsys.readouterr().out == (
        f"no {tmp_path}/out/merged.json, because there is no {tmp_path}/b.json\n"
        f"no {tmp_path}/out/merged.words, because there is no {tmp_path}/b.words\n"
        f"wrote {tmp_path}/out/merged: 2 datasets, 3 documents, 3 tokens\n"
    )
    assert names(tmp_path / "out") == ["merged.bin", "merged.idx"]


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_a_dataset_may_be_named_by_one_of_its_files(tmp_path: Path, suffix: str) -> None:
    write_documents(tmp_path / "a.b", [[1, 2]])
    output = str(tmp_path / "merged")
    tool.main(["--input", f"{tmp_path}/a.b{suffix}", "--output-prefix", output])
    assert contents(tmp_path / "merged") == [[1, 2]]


@pytest.mark.parametrize("given", [".", "", "/", "..", "dir/.idx", "dir/.bin", "dir/.."])
def test_an_input_without_a_name_is_refused(tmp_path: Path, given: str) -> None:
    with pytest.raises(DataError, match=r"--input .*: names no dataset; give a prefix, as data/tr"):
        tool.main(["--input", given, "--output-prefix", str(tmp_path / "merged")])


def test_more_datasets_are_joined_than_files_may_be_open(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    shards = [tmp_path / f"s-{number}-of-100" for number in range(100)]
    for number, shard in enumerate(shards):
        write_documents(shard, [[number], [number, 7]])
    arguments = ["--output-prefix", str(tmp_path / "merged"), "--input", *map(str, shards)]
    done = subprocess.run(
        [sys.executable, tool.__file__, *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)),
    )
    assert (done.returncode, done.stderr) == (0, "")
    expected = [document for number in range(100) for document in ([number], [number, 7])]
    assert contents(tmp_path / "merged") == expected


def test_sidecars_are_summed_and_joined() -> None:
    other = replace(
        INFO, tokenizer_name="renamed.model", documents=5, sources=(SourceFile("b.txt", 3, "cd"),)
    )
    assert merge_infos([INFO, other]) == replace(
        INFO,
        documents=7,
        tokens=6,
        sources=(SourceFile("a.jsonl", 12), SourceFile("b.txt", 3, "cd")),
        skipped_lines=2,
        empty_documents=4,
    )


def test_datasets_of_other_tokenizers_are_refused_with_both_hashes(tmp_path: Path) -> None:
    write_set(tmp_path / "a", [[1]])
    write_documents(tmp_path / "b", [[1]])
    write_set(tmp_path / "c", [[1]], tokenizer_hash="cd" * 32, tokenizer_name="c.model")
    with pytest.raises(DataError, match=rf"a\.model.*{'ab' * 32}.*c\.model.*{'cd' * 32}.*anew"):
        merge_datasets([tmp_path / name for name in "abc"], tmp_path / "out" / "merged")
    assert not (tmp_path / "out").exists()


def test_datasets_that_differ_in_another_common_field_are_refused(tmp_path: Path) -> None:
    write_set(tmp_path / "a", [[1]])
    write_set(tmp_path / "b", [[1]], vocab_size=98)
    with pytest.raises(DataError, match=r"not made alike \(vocab_size is 99 in one and 98 in anot"):
        merge_datasets([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")


def test_tokens_of_two_and_of_four_bytes_are_not_mixed(tmp_path: Path) -> None:
    write_documents(tmp_path / "a", [[1]], 2)
    write_documents(tmp_path / "b", [[1]], 4)
    with pytest.raises(DataError, match=r"/a has tokens of 2 bytes and .*/b of 4.*make one of the"):
        merge_datasets([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")


def test_a_sidecar_of_another_set_is_refused(tmp_path: Path) -> None:
    write_set(tmp_path / "a", [[1]])
    write_dataset_info(tmp_path / "a", replace(INFO, documents=1, tokens=2))
    with pytest.raises(DataError, match=r"a\.json tells of 1 documents and 2 tokens, but .*a\.idx"):
        merge_datasets([tmp_path / "a"], tmp_path / "merged")


def test_word_starts_of_another_set_are_refused(tmp_path: Path) -> None:
    write_documents(tmp_path / "a", [[1]])
    write_word_starts(tmp_path / "a", [1] * 9)
    with pytest.raises(DataError, match=r"a\.words: 2 bytes, expected 1"):
        merge_datasets([tmp_path / "a"], tmp_path / "merged")


def test_a_dataset_is_replaced_only_when_asked_and_with_all_its_files(tmp_path: Path) -> None:
    write_documents(tmp_path / "a", [[1]])
    write_set(tmp_path / "merged", [[9]])
    write_word_starts(tmp_path / "merged", [1])
    with pytest.raises(DataError, match=r"merged\.bin.*already there.*--overwrite"):
        merge_datasets([tmp_path / "a"], tmp_path / "merged")
    assert contents(tmp_path / "merged") == [[9]]
    merge_datasets([tmp_path / "a"], tmp_path / "merged", overwrite=True)
    assert names(tmp_path) == ["a.bin", "a.idx", "merged.bin", "merged.idx"]
    assert contents(tmp_path / "merged") == [[1]]


def test_an_input_is_not_written_over(tmp_path: Path) -> None:
    write_documents(tmp_path / "a", [[1]])
    with pytest.raises(DataError, match="is one of the inputs"):
        merge_datasets([tmp_path / "a"], tmp_path / "b" / ".." / "a", overwrite=True)


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("merged.bin", r"leave off \.bin"),
        ("", "give a name"),
        ("..", "give a name"),
        ("new/", "new/: is a folder; give a name in it, as .*new/train"),
        ("folder", "folder: is a folder; give a name in it, as .*folder/train"),
        ("a.idx/m", "cannot make .*choose"),
    ],
)
def test_an_unusable_output_prefix_is_refused(tmp_path: Path, prefix: str, message: str) -> None:
    write_documents(tmp_path / "a", [[1]])
    (tmp_path / "folder").mkdir()
    before = names(tmp_path)
    output = f"{tmp_path}/{prefix}" if prefix else ""
    with pytest.raises(DataError, match=message):
        tool.main(["--input", str(tmp_path / "a"), "--output-prefix", output])
    assert names(tmp_path) == before


def test_a_disk_without_room_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_documents(tmp_path / "a", [[1] * 100])
    size = sum((tmp_path / f"a{suffix}").stat().st_size for suffix in (".bin", ".idx"))
    usage = shutil.disk_usage(tmp_path)._replace(free=size - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DataError, match=rf"merged needs {size} bytes and its disk has {size - 1} "):
        merge_datasets([tmp_path / "a"], tmp_path / "merged")
    assert names(tmp_path) == ["a.bin", "a.idx"]


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        (".bin", "touched", r"a\.bin: was modified while in use"),
        (".words", "touched", r"a\.words: was modified while in use"),
        (".words", "cut", r"a\.words: has not a bit for each of 17 tokens: it was truncated while"),
        (".json", "edited", r"a\.json: was modified while in use"),
    ],
)
def test_an_input_that_changes_while_it_is_merged_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, change: str, message: str
) -> None:
    write_set(tmp_path / "a", [[1] * 17])
    write_word_starts(tmp_path / "a", [1] * 17)
    before = names(tmp_path)

    def write_and_change(path: Path, *arguments: Any) -> None:
        index_file.write_joined_index(path, *arguments)
        changed = tmp_path / f"a{suffix}"
        match change:
            case "touched":
                os.utime(changed, ns=(1, 1))
            case "cut":
                os.truncate(changed, 1)
            case "edited":
                changed.write_text(changed.read_text().replace("a.model", "b.model"))

    monkeypatch.setattr(merge, "write_joined_index", write_and_change)
    with pytest.raises(DataError, match=rf"cannot make .*merged: .*{message}"):
        merge_datasets([tmp_path / "a"], tmp_path / "merged")
    assert names(tmp_path) == before


@pytest.mark.faults
def test_a_disk_that_fills_up_leaves_the_old_dataset_as_it_was(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    write_documents(tmp_path / "a", [[1] * 2000])
    write_documents(tmp_path / "merged", [[9]])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    arguments = ["--input", str(tmp_path / "a"), "--output-prefix", str(tmp_path / "merged")]
    done = subprocess.run(
        [sys.executable, tool.__file__, "--overwrite", *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)),
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: cannot make dataset {tmp_path}/merged: ")
    assert done.stderr.count("\n") == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_help_names_all_files_of_a_merged_dataset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tool.main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "P.bin, P.idx and, where all of them have one, P.json and P.words." in told

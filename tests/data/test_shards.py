"""Shards of datasets are put in order by their names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_bert.data.shards import Shard, check_given_once, in_shard_order
from megatron_bert.errors import DataError


def test_shards_are_taken_by_number_where_the_first_of_them_stands() -> None:
    given = ["x", "s-2-of-3", "dir/s-1-of-2", "s-0-of-3", "y-1", "dir/s-0-of-2", "s-1-of-3"]
    ordered = ["x", "s-0-of-3", "s-1-of-3", "s-2-of-3", "dir/s-0-of-2", "dir/s-1-of-2", "y-1"]
    assert in_shard_order([Path(name) for name in given]) == [Path(name) for name in ordered]
    many = [Path(f"s-{number}-of-11") for number in range(11)]
    assert in_shard_order(sorted(many, key=str)) == many


@pytest.mark.parametrize(("files", "count"), [(3, 3), (5, 2), (7, 3), (100, 8)])
def test_the_blocks_of_a_sets_shards_are_all_files_in_order(files: int, count: int) -> None:
    blocks = [list(range(files))[Shard(number, count).block(files)] for number in range(count)]
    assert [file for block in blocks for file in block] == list(range(files))
    assert {len(block) for block in blocks} <= {files // count, files // count + 1}


def test_a_missing_shard_and_one_given_twice_are_named() -> None:
    shards = [Path(f"s-{number:05}-of-00005") for number in (0, 2, 4)]
    with pytest.raises(
        DataError, match=r"s-\*-of-00005: shards 1, 3 of its 5 shards are not given .*give them too"
    ):
        in_shard_order(shards)
    with pytest.raises(DataError, match=r"s-00002-of-00005: given twice"):
        in_shard_order([*shards, shards[1]])
    with pytest.raises(
        DataError, match=r"shard 3 of its 4 shards is not given .*shard 0\); give it"
    ):
        in_shard_order([Path(f"s-{number:05}-of-00004") for number in range(3)])


def test_an_input_is_found_twice_by_another_spelling_of_its_path(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    one = tmp_path / "a"
    check_given_once([one, tmp_path / "b"])
    for other in (tmp_path / "x" / ".." / "a", tmp_path / "link" / "a"):
        with pytest.raises(DataError, match=f"{re.escape(f'{one}, {other}')}: given twice"):
            check_given_once(sorted([one, other]))
        with pytest.raises(DataError, match="given twice"):
            in_shard_order([one, other])


def test_two_shards_of_one_number_are_refused() -> None:
    shards = [Path(f"s-{number}-of-2") for number in ("0", "00", "1")]
    with pytest.raises(DataError, match=r"s-0-of-2 and s-00-of-2 are both shard 0; leave one"):
        in_shard_order(shards)


def test_a_shard_beyond_the_count_is_refused() -> None:
    shards = [Path(f"s-{number}-of-2") for number in (0, 1, 7)]
    with pytest.raises(DataError, match=r"s-7-of-2: .* counted from 0, .* 2 has the number 7"):
        in_shard_order(shards)


def test_of_very_many_missing_shards_the_first_are_named() -> None:
    with pytest.raises(
        DataError,
        match=r"shards 0, 1, 3, 4, 5, 6, 7, 8 and 99,999,999,990 more of its .* are not",
    ):
        in_shard_order([Path("x-2-of-99999999999")])
    with pytest.raises(DataError, match=r"shards 0, 2 of its 3"):
        in_shard_order([Path("x-1-of-3")])
    # More digits count nothing: a dataset that happens to be called so.
    named = [Path(f"x-0-of-{'9' * 5000}")]
    assert in_shard_order(named) == named

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bert.data.field_counts import MAX_VALUES, FieldCounts

VALUES = st.one_of(st.none(), st.sampled_from(["ja", "en", "", "absent", "values"]))
DOCUMENTS = st.lists(st.tuples(VALUES, VALUES, st.integers(0, 1000)), max_size=20)


def counted(documents: list[tuple[str | None, str | None, int]]) -> FieldCounts:
    counts = FieldCounts(["lang", "source"])
    for lang, source, tokens in documents:
        counts.add([lang, source], tokens)
    return counts


def test_documents_and_tokens_are_added_up_by_value() -> None:
    counts = counted([("ja", "a", 10), ("en", None, 1), ("ja", "a", 5)])
    nothing = {"documents": 0, "tokens": 0}
    assert counts.to_json() == {
        "lang": {
            "values": {
                "ja": {"documents": 2, "tokens": 15},
                "en": {"documents": 1, "tokens": 1},
            },
            "absent": nothing,
            "further_values": nothing,
        },
        "source": {
            "values": {"a": {"documents": 2, "tokens": 15}},
            "absent": {"documents": 1, "tokens": 1},
            "further_values": nothing,
        },
    }


def test_values_beyond_the_first_thousand_are_counted_together() -> None:
    counts = FieldCounts(["url"])
    for number in [*range(MAX_VALUES + 5), 0, MAX_VALUES]:
        counts.add([str(number)], 2)
    url = counts.to_json()["url"]
    assert list(url["values"]) == [str(number) for number in range(MAX_VALUES)]
    assert url["values"]["0"] == {"documents": 2, "tokens": 4}
    assert url["further_values"] == {"documents": 6, "tokens": 12}


@settings(max_examples=60, derandomize=True, deadline=None)
@given(DOCUMENTS, DOCUMENTS)
def test_merged_counts_are_those_of_all_documents(
    first: list[tuple[str | None, str | None, int]],
    second: list[tuple[str | None, str | None, int]],
) -> None:
    merged = counted(first)
    merged.merge(counted(second))
    assert merged == counted(first + second)
    assert FieldCounts.from_json(json.loads(json.dumps(merged.to_json()))) == merged


def test_a_merge_keeps_the_limit_and_the_other_as_it_is() -> None:
    first, second = FieldCounts(["url"]), FieldCounts(["url", "lang"])
    for number in range(MAX_VALUES):
        first.add([f"a{number}"], 1)
        second.add([f"b{number}", "ja"], 1)
    second.add(["c", "ja"], 1)
    before = second.to_json()
    first.merge(second)
    assert second.to_json() == before
    assert len(first.to_json()["url"]["values"]) == MAX_VALUES
    assert first.to_json()["url"]["further_values"] == {"documents": 1001, "tokens": 1001}
    first.add(["a0", "ja"], 1)
    assert second.to_json() == before
    assert first.to_json()["lang"]["values"] == {"ja": {"documents": 1002, "tokens": 1002}}


@pytest.mark.parametrize(
    "content", [[], None, {"lang": {}}, {"lang": {"values": 3}}, {"lang": {"values": {"ja": 3}}}]
)
def test_what_is_no_count_is_refused(content: object) -> None:
    with pytest.raises(ValueError, match="no counts by field"):
        FieldCounts.from_json(content)


def test_a_field_that_no_document_has_is_told() -> None:
    counts = FieldCounts(["lang", "lnag"])
    assert counts.keys_without_values() == []
    counts.add(["ja", None], 3)
    assert counts.keys_without_values() == ["lnag"]

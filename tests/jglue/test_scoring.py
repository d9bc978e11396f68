"""Scores against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_bert.jglue.scoring import (
    accuracy,
    character_f1,
    correlations,
    exact_match,
    normalize_answer,
)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("東京。", "東京"),
        ("東京。。", "東京"),
        ("。東京", "。東京"),
        ("東。京", "東。京"),
        ("東京。 ", "東京。"),
        ("  285  km/h\u3000", "285 km/h"),
        ("JR East", "jr east"),
        ("「猫」", "「猫」"),
        ("。", ""),
        ("", ""),
    ],
)
def test_answers_are_compared_in_lower_case_without_a_full_stop_at_the_end(
    text: str, normal: str
) -> None:
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("predicted", "golds", "exact", "f1"),
    [
        ("東アジア", ["東アジア"], 1, 1),
        ("東アジア。", ["東アジア"], 1, 1),
        ("東アジア", ["東アジア。"], 1, 1),
        # 4 of 4 predicted characters are right, 4 of 8 gold ones found: 2*1*0.5/1.5.
        ("東アジア", ["東アジアの広範囲"], 0, 2 / 3),
        # 東, ア twice, ジ and の are common: 5 of 6 predicted, 5 of 8 gold.
        ("のア東ジアX", ["東アジアの広範囲"], 0, 2 * (5 / 6) * (5 / 8) / (5 / 6 + 5 / 8)),
        # A character counts as often as both have it: ア twice, not three times.
        ("アアア", ["東アジア"], 0, 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)),
        ("ああ", ["あ"], 0, 2 * 0.5 * 1 / 1.5),
        ("小笠原", ["北海道", "小笠原諸島", "小笠原"], 1, 1),
        # The nearest of several, not their mean.
        ("小笠原", ["北海道", "小笠原諸島"], 0, 2 * 1 * 0.6 / 1.6),
        ("西", ["東"], 0, 0),
        ("", ["東"], 0, 0),
        ("。", ["東"], 0, 0),
        # Gold answers of which nothing is left are passed over, unless there are no others.
        ("", ["。", "東"], 0, 0),
        ("", ["。"], 1, 1),
        ("東", ["。"], 0, 0),
    ],
)
def test_extracted_answers_score_as_worked_out_by_hand(
    predicted: str, golds: list[str], exact: float, f1: float
) -> None:
    assert exact_match(predicted, golds) == exact
    assert character_f1(predicted, golds) == pytest.approx(f1, abs=1e-12)


TEXTS = st.text(alphabet="東西。 aA", max_size=8)


@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=3))
def test_an_exact_match_never_exceeds_the_f1(predicted: str, golds: list[str]) -> None:
    exact, f1 = exact_match(predicted, golds), character_f1(predicted, golds)
    assert 0 <= exact <= f1 <= 1
    assert (exact == 1) == (normalize_answer(predicted) in map(normalize_answer, golds)) or (
        normalize_answer(predicted) == ""
    )


def test_accuracy_is_the_share_of_right_classes() -> None:
    assert accuracy([0, 1, 2, 2], [0, 1, 1, 2]) == 0.75


def test_correlations_are_those_worked_out_by_hand() -> None:
    # Deviations -1.5 -0.5 0.5 1.5 and -2 -1 0 3: 8 / sqrt(5 * 14). The order is the same.
    pearson, spearman = correlations([1, 2, 3, 4], [1, 2, 3, 6])
    assert pearson == pytest.approx(8 / 70**0.5)
    assert spearman == pytest.approx(1)
    # Ranks 1 2 3 and 1 3 2: 1 - 6 * 2 / (3 * 8).
    assert correlations([1, 2, 3], [1, 3, 2])[1] == pytest.approx(0.5)
    # Ties share their ranks: 1.5 1.5 3 and 1 2 3, 1.5 / sqrt(1.5 * 2).
    assert correlations([0, 0, 1], [1, 2, 3])[1] == pytest.approx(1.5 / 3**0.5)


def test_a_constant_prediction_orders_nothing() -> None:
    assert correlations(np.zeros(3), [1, 2, 3]) == (0.0, 0.0)

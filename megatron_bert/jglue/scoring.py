"""Scores of the five tasks, as JGLUE defines them.

Every score is a plain float. A correlation with a constant is undefined; it counts as 0 here,
because such predictions do not rank anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score


def accuracy(predicted: ArrayLike, right: ArrayLike) -> float:
    """Return the share of rows whose predicted class is the right one."""
    return float(accuracy_score(np.asarray(right), np.asarray(predicted)))


def correlations(predicted: ArrayLike, right: ArrayLike) -> tuple[float, float]:
    """Return Pearson's r and Spearman's rho of predicted and right similarities, each `[N]`."""
    x, y = np.asarray(predicted, dtype=np.float64), np.asarray(right, dtype=np.float64)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0, 0.0
    return float(pearsonr(x, y).statistic), float(spearmanr(x, y).statistic)


def normalize_answer(text: str) -> str:
    """Return an answer in the form in which it is compared.

    In this order: lower-case it, strip every `。` at its end, and collapse runs of white space to
    one space, with none around the answer. A `。` before a space at the end therefore stays, as in
    JGLUE's patch of SQuAD's script.
    """
    return " ".join(text.lower().rstrip("。").split())


def exact_match(predicted: str, golds: Sequence[str]) -> float:
    """Return 1 if the answer is one of the gold answers, else 0."""
    answer = normalize_answer(predicted)
    return float(any(answer == normalize_answer(gold) for gold in _with_text(golds)))


def character_f1(predicted: str, golds: Sequence[str]) -> float:
    """Return F1 over characters, counted with multiplicity, with the closest gold answer."""
    return max(
        _f1(normalize_answer(predicted), normalize_answer(gold)) for gold in _with_text(golds)
    )


def _with_text(golds: Sequence[str]) -> Sequence[str]:
    """Gold answers that are not empty when normalised; without any, the empty one is right."""
    return [gold for gold in golds if normalize_answer(gold)] or [""]


def _f1(answer: str, gold: str) -> float:
    if not answer or not gold:
        return float(answer == gold)
    common = (Counter(answer) & Counter(gold)).total()
    # 2PR / (P + R), with P = common / len(answer) and R = common / len(gold).
    return 2 * common / (len(answer) + len(gold))

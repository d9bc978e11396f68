"""Which share of the rows each corpus gets, and warnings about how often it is read."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_bert.config.schema import Corpus
from megatron_bert.data.corpora import OpenCorpus
from megatron_bert.words import times

# Muennighoff et al. 2023, "Scaling Data-Constrained Language Models".
_MOST_USEFUL_EPOCHS = 4.0
_TOLERANCE = 0.01
_MUCH_TOO_SHORT = 2.0


def blend_weights(corpora: Sequence[OpenCorpus]) -> list[float]:
    """Each corpus' share of the rows, relative to the others.

    Args:
        corpora: either all of them set epochs, or none does.

    Returns:
        The weights as given, or epochs times the rows of one epoch. The rows of an epoch are
        proportional to tokens + 2 documents, whatever the row length S: each non-empty document
        needs [CLS] and [SEP], and each of the R rows needs one more pair for the document that it
        breaks off, so that R = (tokens + 2 documents) / (S - 2). Rows that end with a document
        need no such pair: for documents of 6 tokens in rows of 64 slots R is 0.6 % smaller, for
        others the difference is less.
    """
    return [_blend_weight(opened) for opened in corpora]


def _blend_weight(opened: OpenCorpus) -> float:
    corpus = opened.part.corpus
    if corpus.epochs is None:
        return corpus.weight_or_default
    return corpus.epochs * (opened.num_tokens + 2 * opened.num_documents)


def blend_warnings(corpora: Sequence[Corpus], epochs: Sequence[float]) -> list[str]:
    """What the user should know about how often the training corpora are read.

    Args:
        corpora: as configured in `data.train`.
        epochs: how many times over the run reads each.
    """
    warnings = []
    asked = {index: corpus.epochs for index, corpus in enumerate(corpora) if corpus.epochs}
    missed = [i for i, wanted in asked.items() if abs(epochs[i] / wanted - 1.0) > _TOLERANCE]
    if missed:
        corpora_missed = ", ".join(
            f"{corpora[i].prefix} {times(epochs[i])} (data.train.{i}.epochs = {asked[i]:g})"
            for i in missed
        )
        remedy = _remedy([(wanted, epochs[i]) for i, wanted in asked.items()])
        warnings.append(f"the curriculum reads {corpora_missed}; {remedy}")
    for index, (corpus, read) in enumerate(zip(corpora, epochs, strict=True)):
        if read == 0.0 and index not in asked:
            warnings.append(
                f"{corpus.prefix} is never read: its share of the run's rows rounds to 0; raise "
                f"data.train.{index}.weight, take more steps, or leave the corpus out"
            )
        if read > _MOST_USEFUL_EPOCHS:
            key = f"data.train.{index}.{'weight' if corpus.epochs is None else 'epochs'}"
            remedy = f"lower {key}, add text to the corpus" if len(corpora) > 1 else "add text"
            warnings.append(
                f"{corpus.prefix} is read {times(read)}; beyond {_MOST_USEFUL_EPOCHS:g} times "
                f"repeated text teaches less and less (Muennighoff et al. 2023, Scaling "
                f"Data-Constrained Language Models): {remedy}, or shorten the curriculum"
            )
    return warnings


def _remedy(wanted_and_read: Sequence[tuple[float, float]]) -> str:
    """What to do about corpora that are read more or less often than asked for."""
    factors = [wanted / read for wanted, read in wanted_and_read if read]
    if not factors:
        return "the curriculum is too short for a row of any; take more steps"
    factor = sum(factors) / len(factors)
    is_read = len(factors) == len(wanted_and_read)
    if is_read and all(abs(each / factor - 1.0) <= _TOLERANCE for each in factors):
        return f"to read as often as asked, multiply the stages' steps by {factor:.3g}"
    if min(factors) > _MUCH_TOO_SHORT:
        # Shares of the rows are rounded to whole ones, which matters less in a longer run.
        return (
            "the curriculum is much shorter than that: to read about as often as asked, multiply "
            f"the stages' steps by {factor:.2g}, or take it as it is"
        )
    # More steps scale all corpora alike; they differ because each gets whole rows of every stage.
    return (
        "no number of steps mends it for all of them, as shares of few rows are rounded to whole "
        "ones: take it as it is, or join small corpora with tools/merge_datasets.py"
    )

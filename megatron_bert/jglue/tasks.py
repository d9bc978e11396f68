"""The five tasks of the model card, and JGLUE's protocol for them.

Lengths, learning rates, epochs and warm-up are those of JGLUE's fine-tuning instructions (Kurihara
et al., LREC 2022). No machine-learning library is needed to read them.
"""

from __future__ import annotations

from dataclasses import dataclass

LEARNING_RATES = (5e-5, 3e-5, 2e-5)
EPOCHS = (3, 4)
WARMUP_RATIO = 0.1

JNLI_LABELS = ("entailment", "contradiction", "neutral")
MARC_JA_LABELS = ("positive", "negative")
NUM_CHOICES = 5

# Settings that the scores of extracted answers depend on; the defaults of JGLUE's script.
MAX_ANSWER_TOKENS = 30
MAX_QUESTION_TOKENS = 64
DOC_STRIDE = 128

SWAPPED_COLUMNS = (
    "RetrievaBERT's model card prints 0.916 as JSQuAD's EM and 0.879 as its F1. An exact match has "
    "an F1 of 1, so EM cannot exceed F1: the card's two columns are most likely swapped."
)


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: on the command line.
        title: in the model card.
        metrics: in the card's order, each from 0 to 1, or from -1 to 1 for correlations.
        selected_by: the metric by which learning rate and epochs are chosen.
        max_length: of an input, in tokens, including special ones.
        batch_size: rows of a training step.
    """

    name: str
    title: str
    metrics: tuple[str, ...]
    selected_by: str
    max_length: int
    batch_size: int = 32


TASKS = {
    task.name: task
    for task in (
        Task("marc_ja", "MARC-ja", ("acc",), "acc", 512),
        Task("jsts", "JSTS", ("pearson", "spearman"), "pearson", 128),
        Task("jnli", "JNLI", ("acc",), "acc", 128),
        Task("jsquad", "JSQuAD", ("EM", "F1"), "F1", 384),
        Task("jcommonsenseqa", "JComQA", ("acc",), "acc", 64, batch_size=64),
    )
}
"""Tasks by name, in the order of the card's columns."""

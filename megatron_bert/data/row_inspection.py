"""Rows as the model sees them, token by token, and what many of them hold on average."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from megatron_bert.config.schema import Config
from megatron_bert.data.batch import Batch, Replacement
from megatron_bert.data.length_histogram import count_lengths, histogram
from megatron_bert.data.step_inspection import StepBatches, unmasked
from megatron_bert.data.tokenizer import Tokenizer
from megatron_bert.words import share


@dataclass(frozen=True)
class ShownToken:
    """A token of a row.

    Attributes:
        seen: the piece that the model sees, with non-printing characters escaped.
        label: the original piece, to be predicted; equals `seen` where nothing is predicted.
        replacement: what masking made of it.
    """

    seen: str
    label: str
    replacement: Replacement


@dataclass(frozen=True)
class ShownRow:
    """A row split into its segments: the documents, or parts of them, that attention stays inside.

    Attributes:
        row: its number within the run.
        segments: the tokens of each segment in order, including `<CLS>` and `<SEP>`; the padding is
            not among them.
        padding: number of empty slots at its end.
    """

    row: int
    segments: list[list[ShownToken]]
    padding: int

    @property
    def predicted(self) -> int:
        """Number of tokens to be predicted."""
        return sum(
            t.replacement is not Replacement.NONE for tokens in self.segments for t in tokens
        )


def show_rows(
    config: Config, first_step: int, last_step: int, rows_a_step: int
) -> Iterator[ShownRow | str]:
    """Yield each step's heading, first rows and `describe_steps` line, then shares of all rows.

    Raises:
        DataError: the steps are not in the run, or its data cannot be read.
    """
    inspected = StepBatches(config, first_step, last_step)
    shares = RowShares(inspected.tokenizer)
    for step in inspected.steps:
        if rows_a_step:
            length = config.curriculum[inspected.stage(step)].seq_length
            yield f"step {step}, of rows of {length}:"
        first = inspected.rows(step)[:rows_a_step]
        yield from inspected.described(step, partial(_counted_and_shown, shares, first))
    yield from shares.lines()


def _counted_and_shown(shares: RowShares, rows: range, batch: Batch) -> Iterator[ShownRow]:
    shares.add(batch)
    yield from _shown(batch, rows, shares.tokenizer)


class RowShares:
    """Counts of what rows hold, summed batch by batch in constant memory."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._rows = self._slots = self._padding = self._framing = 0
        self._unknown = self._bytes = 0
        self._predicted = {kind: 0 for kind in _KINDS if kind is not Replacement.NONE}
        self._segment_lengths = count_lengths(np.empty(0, dtype=np.int64))

    def add(self, batch: Batch) -> None:
        """Count the rows of a batch."""
        tokenizer = self.tokenizer
        tokens_BS = unmasked(batch)
        self._rows += len(tokens_BS)
        self._slots += tokens_BS.size
        self._padding += int((tokens_BS == tokenizer.pad_id).sum())
        self._framing += int(np.isin(tokens_BS, (tokenizer.cls_id, tokenizer.sep_id)).sum())
        self._unknown += int(np.isin(tokens_BS, tokenizer.unknown_ids).sum())
        self._bytes += int(np.isin(tokens_BS, tokenizer.byte_ids).sum())
        replacements_BS = _replacements(batch, tokenizer)
        for kind in self._predicted:
            self._predicted[kind] += int((replacements_BS == _KINDS.index(kind)).sum())
        starts = np.flatnonzero(batch.positions_BS.numpy() == 0)
        lengths = np.diff(starts, append=tokens_BS.size)
        is_text = tokens_BS.ravel()[starts] != tokenizer.pad_id
        # Without <CLS> and <SEP>.
        self._segment_lengths += count_lengths(lengths[is_text] - 2)

    def lines(self) -> Iterator[str]:
        """Yield the shares, and a histogram of the segments' lengths."""
        text = self._slots - self._padding - self._framing
        predicted = sum(self._predicted.values())
        yield f"rows          {self._rows:,} of {self._slots:,} slots"
        yield f"padding       {share(self._padding, self._slots, 'slots')}"
        yield f"<CLS>, <SEP>  {share(self._framing, self._slots, 'slots')}"
        yield f"text          {share(text, self._slots, 'slots')}"
        yield f"unknown       {share(self._unknown, text, 'text tokens')}"
        yield f"byte pieces   {share(self._bytes, text, 'text tokens')}"
        yield f"predicted     {share(predicted, text, 'text tokens')}"
        for kind, count in self._predicted.items():
            yield f"  {kind.value:<11} {share(count, predicted, 'predicted')}"
        yield "text tokens per segment:"
        yield from histogram(self._segment_lengths)


_KINDS = tuple(Replacement)


def _replacements(batch: Batch, tokenizer: Tokenizer) -> npt.NDArray[np.int8]:
    """Each slot's index in `Replacement`, [B, S]."""
    replacements_BS = np.zeros(batch.tokens_BS.shape, dtype=np.int8)
    used_BM = batch.weights_BM.numpy() > 0.0
    rows_N, slots_N = np.nonzero(used_BM)[0], batch.masked_BM.numpy()[used_BM]
    replacements_BS[rows_N, slots_N] = batch.replacements(tokenizer.mask_id).numpy()[used_BM]
    return replacements_BS


def _shown(batch: Batch, rows: range, tokenizer: Tokenizer) -> Iterator[ShownRow]:
    """The rows of a batch that are among `rows`."""
    chosen = [number for number, row in enumerate(batch.rows_B.tolist()) if row in rows]
    if not chosen:
        return
    labels_BS, replacements_BS = unmasked(batch), _replacements(batch, tokenizer)
    for number in chosen:
        seen_S = batch.tokens_BS.numpy()[number]
        tokens = [
            ShownToken(_printable(tokenizer, seen), _printable(tokenizer, label), _KINDS[kind])
            for seen, label, kind in zip(
                seen_S.tolist(),
                labels_BS[number].tolist(),
                replacements_BS[number].tolist(),
                strict=True,
            )
        ]
        starts = np.flatnonzero(batch.positions_BS.numpy()[number] == 0).tolist()
        parts = zip(starts, [*starts[1:], len(tokens)], strict=True)
        yield ShownRow(
            row=int(batch.rows_B[number]),
            segments=[tokens[a:b] for a, b in parts if seen_S[a] != tokenizer.pad_id],
            padding=int((seen_S == tokenizer.pad_id).sum()),
        )


def _printable(tokenizer: Tokenizer, token: int) -> str:
    """A token's piece, escaped if need be: a control character would reach the terminal."""
    piece = tokenizer.id_to_piece(token)
    return piece if piece.isprintable() else repr(piece)[1:-1]

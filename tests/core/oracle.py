"""The row plan and the words of a row, written naively: every token of every stream is a tuple.

Shares no code with the C++ core; what it has in common is the specification of the random
functions (SplitMix64, the Feistel network) and of the plan.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

WINDOW_ROWS = 16384
SLOTS_PER_SLACK = 64
WHOLE = 1 << 32
MASK_64 = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
DOCUMENT_ORDER, ROW_ORDER = 1, 2

Span = tuple[int, int, int]
Segment = tuple[int, int, int, int]


def mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK_64
    return value ^ (value >> 31)


def random_key(seed: int, purpose: int, *numbers: int) -> int:
    key = mix((seed + GOLDEN) & MASK_64)
    for number in (purpose - 1, *numbers):
        key = mix((key + (number + 1) * GOLDEN) & MASK_64)
    return key


def permutation(size: int, key: int) -> list[int]:
    """Where 0, 1, ... are sent: six Feistel rounds on the next power of two, walking cycles."""
    bits = max(size - 1, 0).bit_length()
    low_bits = -(-bits // 2)
    low_mask, high_mask = (1 << low_bits) - 1, (1 << (bits - low_bits)) - 1
    keys = [mix((key + (round_ + 1) * GOLDEN) & MASK_64) for round_ in range(6)]

    def encrypt(value: int) -> int:
        high, low = value >> low_bits, value & low_mask
        for round_, round_key in enumerate(keys):
            if round_ % 2 == 0:
                high ^= mix((low + round_key) & MASK_64) & high_mask
            else:
                low ^= mix((high + round_key) & MASK_64) & low_mask
        return high << low_bits | low

    images = []
    for value in range(size):
        image = encrypt(value)
        while image >= size:
            image = encrypt(image)
        images.append(image)
    return images


def document_order(num_documents: int, seed: int, corpus: int, epoch: int) -> list[int]:
    group = min(max(num_documents // 4096, 1), 32)
    documents = list(range(num_documents))
    groups = [documents[begin : begin + group] for begin in range(0, num_documents, group)]
    key = random_key(seed, DOCUMENT_ORDER, corpus, epoch)
    return [document for place in permutation(len(groups), key) for document in groups[place]]


class CorpusStream:
    """A corpus' tokens not yet read, of one epoch at a time.

    `sentence_ends` has for each document the offsets at which a sentence ends.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        seed: int,
        corpus: int,
        sentence_ends: Sequence[Collection[int]] | None = None,
    ) -> None:
        self.lengths, self.seed, self.corpus = lengths, seed, corpus
        self.sentence_ends = sentence_ends
        self.unread: list[tuple[int, int]] = []
        self.next_epoch = 0

    def read_stage(self, stage: int, seq_length: int, rows: int) -> list[list[Span]]:
        visited: list[list[Span]] = []
        window = 0
        while len(visited) < rows:
            while not self.unread:
                order = document_order(len(self.lengths), self.seed, self.corpus, self.next_epoch)
                self.unread = [(d, offset) for d in order for offset in range(self.lengths[d])]
                self.next_epoch += 1
            cut, tokens_cut = self._cut_window(seq_length)
            key = random_key(self.seed, ROW_ORDER, self.corpus, stage, window)
            read = permutation(len(cut), key)[: rows - len(visited)]
            visited += [cut[number] for number in read]
            left = [cut[number] for number in sorted(set(range(len(cut))) - set(read))]
            self.unread = [
                (document, offset + i)
                for row in left
                for document, offset, length in row
                for i in range(length)
            ] + self.unread[tokens_cut:]
            window += 1
        return visited

    def _cut_window(self, seq_length: int) -> tuple[list[list[Span]], int]:
        cut: list[list[Span]] = []
        at = 0
        while len(cut) < WINDOW_ROWS and at < len(self.unread):
            row: list[Span] = []
            free = seq_length
            while free >= 3 and at < len(self.unread):
                document, offset = self.unread[at]
                length = 0
                while length < free - 2 and self.unread[at + length : at + length + 1] == [
                    (document, offset + length)
                ]:
                    length += 1
                continues = self.unread[at + length : at + length + 1] == [
                    (document, offset + length)
                ]
                if continues:
                    length = self._cut_at_sentence_end(document, offset, length, seq_length)
                    free = 0
                row.append((document, offset, length))
                at += length
                free -= length + 2
            cut.append(row)
        return cut, at

    def _cut_at_sentence_end(self, document: int, offset: int, room: int, seq_length: int) -> int:
        if self.sentence_ends is None:
            return room
        shortest = max(1, room - seq_length // SLOTS_PER_SLACK)
        for length in range(room, shortest - 1, -1):
            if offset + length in self.sentence_ends[document]:
                return length
        return room


def held_out(document: int, fraction: float) -> bool:
    return mix((document + GOLDEN) & MASK_64) < int(fraction * 2**64)


def shares(weights: Sequence[float]) -> list[int]:
    scaled = [weight / max(weights) for weight in weights]
    total = 0.0
    for weight in scaled:
        total += weight
    whole = [max(1, int(weight / total * WHOLE)) for weight in scaled]
    whole[whole.index(max(whole))] += WHOLE - sum(whole)
    return whole


def blend(weights: Sequence[float], rows: int) -> Iterator[int]:
    counts = [0] * len(weights)
    for row in range(rows):
        deficits = [s * (row + 1) - c * WHOLE for s, c in zip(shares(weights), counts, strict=True)]
        corpus = deficits.index(max(deficits))
        counts[corpus] += 1
        yield corpus


def plan(
    lengths: Sequence[Sequence[int]],
    weights: Sequence[float],
    stages: Sequence[tuple[int, int]],
    seed: int,
    sentence_ends: Sequence[Sequence[Collection[int]]] | None = None,
) -> list[list[Segment]]:
    """Segments of all rows of a run."""
    streams = [
        CorpusStream(
            lengths[corpus], seed, corpus, None if sentence_ends is None else sentence_ends[corpus]
        )
        for corpus in range(len(lengths))
    ]
    rows: list[list[Segment]] = []
    for stage, (seq_length, stage_rows) in enumerate(stages):
        choices = list(blend(weights, stage_rows))
        readers = [
            iter(stream.read_stage(stage, seq_length, choices.count(corpus)))
            for corpus, stream in enumerate(streams)
        ]
        rows += [[(corpus, *span) for span in next(readers[corpus])] for corpus in choices]
    return rows

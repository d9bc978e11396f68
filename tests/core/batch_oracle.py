"""A batch's rows and hash, written naively: token by token, in Python's own integers.

Shares no code with the C++ core; what it has in common is the specification. Of the randomness:
SplitMix64 from a key of the seed, the purpose and the row; Lemire's multiplication for a number
below a bound; a Fisher-Yates shuffle that draws only as far as it is read. Everything a row draws
comes from one stream, in this order: the units to mask, then, position by position, what stands in
the place of each masked token.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import floor
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from tests.core.oracle import GOLDEN, MASK_64, Segment, mix, random_key

MASKING = 3
SURPLUS_ROW = -1
MAX_WORD_TOKENS = 8

Unit = Literal["token", "whole_word", "ngram"]
Drawn = TypeVar("Drawn")


@dataclass(frozen=True)
class Vocabulary:
    """Ids are in [0, size); the four that a row is laid out with are special too."""

    size: int
    cls: int
    sep: int
    mask: int
    pad: int
    further_special: frozenset[int]

    @property
    def special(self) -> frozenset[int]:
        return self.further_special | {self.cls, self.sep, self.mask, self.pad}

    @property
    def ordinary(self) -> list[int]:
        return [token for token in range(self.size) if token not in self.special]


@dataclass(frozen=True)
class WordTables:
    """For each id: the script of its first and last character, and whether it begins a word."""

    first_class: NDArray[np.uint8]
    last_class: NDArray[np.uint8]
    starts_word: NDArray[np.uint8]


@dataclass(frozen=True)
class Masking:
    probability: float
    unit: Unit
    max_ngram: int
    mask_ratio: float
    random_ratio: float
    seed: int


@dataclass(frozen=True)
class Row:
    """Tokens and positions [S], the masked slots [M], and what the row adds to its batch's hash."""

    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    masked: NDArray[np.int32]
    labels: NDArray[np.int32]
    weights: NDArray[np.float32]
    hash: int


class CounterRandom:
    """SplitMix64 (Steele, Lea, Flood 2014), started at a key."""

    def __init__(self, key: int) -> None:
        self.key = key
        self.count = 0

    def next(self) -> int:
        self.count += 1
        return mix((self.key + self.count * GOLDEN) & MASK_64)

    def below(self, bound: int) -> int:
        return self.next() * bound >> 64

    def shuffled(self, items: Sequence[Drawn]) -> Iterator[Drawn]:
        """The items in random order; each is drawn when it is asked for."""
        left = list(items)
        for place in range(len(left)):
            other = place + self.below(len(left) - place)
            left[place], left[other] = left[other], left[place]
            yield left[place]


def row_layout(
    segments: Sequence[Segment],
    corpora: Sequence[Sequence[Sequence[int]]],
    seq_length: int,
    vocabulary: Vocabulary,
) -> tuple[list[int], list[int]]:
    """Tokens [S] and positions [S]: [CLS] text [SEP] of each segment, then padding."""
    tokens: list[int] = []
    positions: list[int] = []
    for corpus, document, offset, length in segments:
        text = corpora[corpus][document][offset : offset + length]
        tokens += [vocabulary.cls, *text, vocabulary.sep]
        positions += range(length + 2)
    padding = seq_length - len(tokens)
    return tokens + [vocabulary.pad] * padding, positions + list(range(padding))


def words_of(
    tokens: Sequence[int], special: Collection[int], tables: WordTables
) -> list[list[int]]:
    """Positions of each word, in order. Special tokens are in no word and end the one before."""
    words: list[list[int]] = []
    previous_is_text = False
    for position, token in enumerate(tokens):
        is_text = token not in special
        if is_text:
            continues = (
                previous_is_text
                and not tables.starts_word[token]
                and tables.first_class[token] == tables.last_class[tokens[position - 1]]
                and len(words[-1]) < MAX_WORD_TOKENS
            )
            if continues:
                words[-1].append(position)
            else:
                words.append([position])
        previous_is_text = is_text
    return words


def ngram_length(max_ngram: int, random: CounterRandom) -> int:
    """k in 1..max_ngram in proportion to 1/k, of which 840 parts are whole for k up to 8."""
    ends = list(accumulate(840 // k for k in range(1, max_ngram + 1)))
    drawn = random.below(ends[-1])
    return next(k for k, end in enumerate(ends, start=1) if drawn < end)


def choose_tokens(text: Sequence[int], wanted: int, random: CounterRandom) -> set[int]:
    order = random.shuffled(text)
    return {next(order) for _ in range(wanted)}


def ngrams_of(text: Sequence[int], max_ngram: int, random: CounterRandom) -> list[list[int]]:
    """The positions cut into spans, whose lengths are drawn one by one; a gap ends a span."""
    spans: list[list[int]] = []
    length = 0
    for position in text:
        if spans and spans[-1][-1] == position - 1 and len(spans[-1]) < length:
            spans[-1].append(position)
        else:
            spans.append([position])
            length = ngram_length(max_ngram, random)
    return spans


def choose_units(
    units: Sequence[Sequence[int]], wanted: int, num_slots: int, random: CounterRandom
) -> set[int]:
    """Units that begin in an arc of `wanted` tokens of the circle that all of them form.

    The arc begins at a random token; the unit that holds it comes first on the circle, the others
    follow in random order.
    """
    if wanted == 0:
        return set()
    text = [position for unit in units for position in unit]
    start = text[random.below(len(text))]
    at = next(number for number, unit in enumerate(units) if start in unit)
    others = list(units)
    others[0], others[at] = others[at], others[0]
    first, others = others[0], others[1:]
    # The arc's tokens, numbered from its begin; a unit is chosen at the number of its own begin.
    place = len(first) - first.index(start)
    chosen = [first] if first[0] == start else []
    order = random.shuffled(others)
    left = len(others)
    while place < wanted and left > 0:
        chosen.append(next(order))
        place += len(chosen[-1])
        left -= 1
    if first[0] != start and place < wanted:
        chosen.append(first)
    return set([position for unit in chosen for position in unit][:num_slots])


def masked_positions(
    tokens: Sequence[int],
    num_slots: int,
    vocabulary: Vocabulary,
    tables: WordTables,
    masking: Masking,
    random: CounterRandom,
) -> list[int]:
    """Positions to mask, ascending: the row's share, by larger units up to 7 more or fewer."""
    special = vocabulary.special
    text = [position for position, token in enumerate(tokens) if token not in special]
    share = max(1, floor(masking.probability * len(text) + 0.5))
    wanted = min(share, len(text), num_slots)
    if masking.unit == "token":
        chosen = choose_tokens(text, wanted, random)
    elif masking.unit == "whole_word":
        chosen = choose_units(words_of(tokens, special, tables), wanted, num_slots, random)
    else:
        spans = ngrams_of(text, masking.max_ngram, random)
        chosen = choose_units(spans, wanted, num_slots, random)
    return sorted(chosen)


def replacement(token: int, vocabulary: Vocabulary, masking: Masking, random: CounterRandom) -> int:
    """[MASK], a random ordinary id or the token itself, by the upper 32 bits of one draw."""
    mask_below = int(masking.mask_ratio * 2**32)
    random_below = mask_below + int(masking.random_ratio * 2**32)
    drawn = random.next() >> 32
    if drawn < mask_below:
        return vocabulary.mask
    if drawn < random_below:
        return vocabulary.ordinary[random.below(len(vocabulary.ordinary))]
    return token


def hash_array(values: Sequence[int], previous: int) -> int:
    """A hash of int32 numbers that continues from that of the arrays before.

    Four lanes in the manner of XXH64 (Collet). Eight numbers at a time are four words of 64 bits,
    the first number of a word in its lower half; word i goes to lane i. The up to seven numbers
    that are left go to the lanes one by one, in turn.
    """
    odd = 0xC2B2AE3D27D4EB4F
    lanes = [mix((previous + (lane + 1) * GOLDEN) & MASK_64) for lane in range(4)]
    unsigned = [value & 0xFFFFFFFF for value in values]
    in_blocks = len(unsigned) // 8 * 8
    for place in range(0, in_blocks, 2):
        lane = place // 2 % 4
        word = unsigned[place] | unsigned[place + 1] << 32
        mixed = lanes[lane] ^ (word * odd & MASK_64)
        rotated = (mixed << 31 | mixed >> 33) & MASK_64
        lanes[lane] = rotated * GOLDEN & MASK_64
    for place, value in enumerate(unsigned[in_blocks:]):
        lanes[place % 4] = mix(lanes[place % 4] ^ (value * odd & MASK_64))
    result = previous ^ len(unsigned)
    for lane_hash in lanes:
        result = mix((result * odd + lane_hash) & MASK_64)
    return result


def padded(values: Sequence[int], size: int) -> list[int]:
    return [*values, *[0] * (size - len(values))]


def make_row(
    number: int,
    segments: Sequence[Segment],
    corpora: Sequence[Sequence[Sequence[int]]],
    shape: tuple[int, int],
    vocabulary: Vocabulary,
    tables: WordTables,
    masking: Masking,
) -> Row:
    """The row of this number within the run; `shape` is (S, M). A surplus row has no segments."""
    seq_length, num_slots = shape
    tokens, positions = row_layout(segments, corpora, seq_length, vocabulary)
    random = CounterRandom(random_key(masking.seed, MASKING, number))
    chosen = masked_positions(tokens, num_slots, vocabulary, tables, masking, random)
    labels = [tokens[position] for position in chosen]
    for position in chosen:
        tokens[position] = replacement(tokens[position], vocabulary, masking, random)
    masked, labels = padded(chosen, num_slots), padded(labels, num_slots)
    row_hash = 0
    if number != SURPLUS_ROW:
        for values in (tokens, positions, masked, labels):
            row_hash = hash_array(values, row_hash)
    return Row(
        np.array(tokens, dtype=np.int32),
        np.array(positions, dtype=np.int32),
        np.array(masked, dtype=np.int32),
        np.array(labels, dtype=np.int32),
        np.array(padded([1] * len(chosen), num_slots), dtype=np.float32),
        row_hash,
    )

"""The C++ data core of megatron_bert.

Errors: ValueError for invalid arguments, IndexError for numbers out of range, RuntimeError (naming
the file) for files that cannot be read or used. Arrays passed in must be contiguous and of exactly
the stated dtype. Every long call releases the GIL; reading methods may be called from several
threads at once.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

MAX_UNIT_TOKENS: int
"""Maximum tokens of a word or span that is masked together; longer ones are divided."""
SOURCE_HASH: str
"""SHA-256, in hexadecimal digits, of the C++ sources that this module was built from."""

class TokenIdError(RuntimeError):
    """A dataset holds a token id that is not in the vocabulary."""

class IndexedDataset:
    """A dataset in Megatron-LM's format, PREFIX.idx and PREFIX.bin, opened for reading.

    Everything that later reads rely on is checked when it is opened.

    Args:
        prefix: path of the two files, without their suffixes.
        mmap: whether to map the files; otherwise, and if the system refuses to map them, the index
            is read into memory and tokens are read (pread) on demand.
    """

    def __init__(self, prefix: str, *, mmap: bool = True) -> None: ...
    @property
    def prefix(self) -> str: ...
    @property
    def num_documents(self) -> int: ...
    @property
    def num_sequences(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def is_mapped(self) -> bool:
        """Whether tokens are read from a memory map."""

    @property
    def token_bytes(self) -> int:
        """2 (unsigned) or 4 bytes a token."""

    @property
    def dtype_code(self) -> int:
        """Token type as the .idx file codes it: 8 is uint16, 4 is int32."""

    def document(self, document: int) -> npt.NDArray[np.int32]:
        """Tokens of a document, its sequences joined."""

    def document_lengths(self) -> npt.NDArray[np.int64]:
        """Tokens in each document."""

    def max_token_id(self, sample_documents: int = 1024) -> int:
        """Largest token id in about that many evenly spaced documents (all, if fewer); -1 if none.

        A negative id counts as its unsigned value, so that it is larger than any vocabulary.
        """

    def check_unchanged(self) -> None:
        """Raise RuntimeError, saying what happened, if a file changed since it was opened.

        Changes are: truncated, grown, modified in place, replaced by another file, or removed.
        Costs two system calls.
        """

class DocumentLengths:
    """The lengths of a dataset's documents on one side of a held-out split.

    A document's side depends only on its number, not on any seed. With a fraction of 0 all
    documents are on the training side.

    Args:
        dataset: the documents.
        held_out_fraction: share of the documents, in [0, 1), that is held out.
        held_out: whether this is the held-out side or the rest.
    """

    def __init__(
        self, dataset: IndexedDataset, *, held_out_fraction: float, held_out: bool
    ) -> None: ...
    @property
    def num_tokens(self) -> int:
        """Tokens of that side."""

    @property
    def num_nonempty_documents(self) -> int:
        """Number of non-empty documents on that side; counted anew at each call."""

    def on_side(self, first: int, end: int) -> npt.NDArray[np.bool_]:
        """Whether each of the dataset's documents `first` to `end` (exclusive) is on that side.

        Returns [end - first]. IndexError for a negative number, or an end before the first.
        """

class RowPlan:
    """The content of every row of a run, as a function of the row's number.

    Args:
        lengths: for each corpus, the dataset, one side of it, or its document lengths (int64 or
            int32, [D]), which are viewed, not copied.
        weights: for each corpus, its share of every stage's rows; positive.
        stages: (seq_length, rows) of each stage.
        seed: determines the order of documents and rows.
    """

    def __init__(
        self,
        lengths: Sequence[
            IndexedDataset | DocumentLengths | npt.NDArray[np.int64] | npt.NDArray[np.int32]
        ],
        weights: Sequence[float],
        stages: Sequence[tuple[int, int]],
        seed: int,
    ) -> None: ...
    @property
    def num_rows(self) -> int: ...
    def segments(self, row: int) -> list[tuple[int, int, int, int]]:
        """Segments of a row in order: (corpus, document, token offset, tokens)."""

    def stage_of(self, row: int) -> tuple[int, int]:
        """(stage, row within the stage) of a row of the run."""

    def epochs(self) -> list[float]:
        """For each corpus, how many times over the run reads its tokens."""

def epoch_rows(
    lengths: IndexedDataset | DocumentLengths | npt.NDArray[np.int64] | npt.NDArray[np.int32],
    seq_length: int,
    seed: int = 0,
    corpus: int = 0,
    limit: int | None = None,
) -> int:
    """Number of rows of the first epoch of corpus number `corpus` in a plan with this seed.

    Other seeds and epochs visit the documents in another order, which can change the number
    slightly. Counting stops at `limit`.
    """

class WordStarts:
    """A `.words` file beside a `.bin`: for each token a bit, 1 where a word begins.

    Bit k % 8 of byte k / 8 belongs to token k. Raises RuntimeError, naming the file, if it cannot
    be read or its size does not fit `num_tokens`.
    """

    def __init__(self, path: str, num_tokens: int) -> None: ...
    def check_unchanged(self) -> None:
        """Raise RuntimeError, saying what happened, if the file changed since it was opened."""

class BatchAssembler:
    """Turns row numbers into batches: packed, padded, masked.

    Args:
        datasets: the plan's corpora.
        plan: which tokens each row holds.
        cls_id: id of [CLS], before every segment.
        sep_id: id of [SEP], after every segment.
        mask_id: id of [MASK].
        pad_id: id of [PAD], after a row's last segment.
        vocab_size: number of real ids; any other id in the data is an error.
        special_ids: [K] ids never masked nor drawn as replacements; the four above always count.
        first_class: [vocab_size] script class of each piece's first character (this and the next
            two may be empty unless `unit` is whole_word).
        last_class: [vocab_size] script class of each piece's last character.
        starts_word: [vocab_size] whether the piece begins a word.
        word_starts: for each dataset, where unit whole_word finds its words; None, or an empty
            list, to find them by the three tables above.
        probabilities: for each of the plan's stages, the share of the maskable tokens to mask.
        unit: what is masked together.
        max_ngram: longest run of tokens that unit ngram masks, at most 8.
        mask_ratio: share of the masked tokens that [MASK] replaces.
        random_ratio: share of them that a random token replaces; the rest stays as it is.
        seed: determines the masks.
    """

    def __init__(
        self,
        datasets: Sequence[IndexedDataset],
        plan: RowPlan,
        *,
        cls_id: int,
        sep_id: int,
        mask_id: int,
        pad_id: int,
        vocab_size: int,
        special_ids: npt.NDArray[np.int32],
        first_class: npt.NDArray[np.uint8],
        last_class: npt.NDArray[np.uint8],
        starts_word: npt.NDArray[np.uint8],
        word_starts: Sequence[WordStarts | None] = ...,
        probabilities: Sequence[float],
        unit: Literal["token", "whole_word", "ngram"],
        max_ngram: int,
        mask_ratio: float,
        random_ratio: float,
        seed: int,
    ) -> None: ...
    def fill(
        self,
        rows: npt.NDArray[np.int64],
        tokens: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        masked: npt.NDArray[np.int32],
        labels: npt.NDArray[np.int32],
        weights: npt.NDArray[np.float32],
    ) -> int:
        """Fill the arrays of a batch and return its hash.

        Args:
            rows: [B] row numbers, all from stages with rows of S slots; -1 is a surplus row, which
                is all padding, has no weight and adds nothing to the hash.
            tokens: [B, S].
            positions: [B, S], counted from 0 in every segment and in the padding.
            masked: [B, M] positions in the row, ascending; unused slots are 0.
            labels: [B, M] the original tokens there; unused slots are 0.
            weights: [B, M] 1; unused slots are 0.

        Returns:
            The sum modulo 2^64 of a hash of each row's tokens, positions, masked and labels.

        Raises:
            TokenIdError: a row holds an id outside the vocabulary.
            RuntimeError: a file cannot be read.
        """

class HashSet:
    """A set of 128-bit hashes in 19 to 24 bytes each (16 KiB or more if there are few).

    Each hash is a row of two uint64, whose bits must be as good as random: someone who can choose
    them can make the set slow. Calls from several threads are serialised.
    """

    def __init__(self) -> None: ...
    def insert(self, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Add hashes, [n, 2]; tell, [n], which were neither in the set nor earlier in the array.

        Raises MemoryError if memory runs out; the hashes before that one have been added.
        """

    def __len__(self) -> int: ...
    @property
    def memory_bytes(self) -> int:
        """Bytes that the set takes."""

class UnigramEncoder:
    """SentencePiece's unigram segmentation, with the same ids, several times as fast.

    Texts are taken as they are, except that spaces become `▁`. A character that no piece covers
    becomes its UTF-8 bytes.

    Args:
        pieces: the pieces that text is segmented into: at most 255 characters each, all different.
        scores: [pieces] log probabilities.
        ids: [pieces] below 2^24 - 1.
        byte_ids: [256] id of each byte.
        space_in_front: whether to put a space before every non-empty text.
    """

    def __init__(
        self,
        pieces: list[str],
        scores: npt.NDArray[np.float32],
        ids: npt.NDArray[np.int32],
        byte_ids: npt.NDArray[np.int32],
        space_in_front: bool,
    ) -> None: ...
    def encode(self, texts: list[str]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Concatenated ids of all texts, and the number of ids of each text.

        ValueError for half a surrogate pair, which no UTF-8 can hold.
        """

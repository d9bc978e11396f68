"""The options of preprocessing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from pydantic import PositiveInt

from megatron_bert.command_line.argument_checks import check_fields
from megatron_bert.command_line.arguments import argument
from megatron_bert.data.dictionary_words import Dictionary
from megatron_bert.data.parsing import Normalization, OnError
from megatron_bert.data.placing import check_name
from megatron_bert.data.shards import Shard
from megatron_bert.data.text import TextDocuments
from megatron_bert.errors import DataError
from megatron_bert.files import StrPath


@dataclass(frozen=True)
class PreprocessOptions:
    """What to turn into which dataset, and how.

    Attributes:
        inputs: text files, read in this order, or a single one.
        tokenizer: the tokenizer's file.
        output_prefix: P of `P.bin`, `P.idx` and `P.json`.
        json_key: key of the text in `.jsonl`, its column in `.parquet`.
        field_keys: keys of the fields by whose values documents and tokens are counted.
        normalize: the form that text is brought into before anything else.
        deduplicate: whether a document is left out if its text occurred before.
        txt_documents: what a document is in `.txt`.
        word_boundaries: the dictionary that finds the words of `P.words`; None: no such file.
        shard: which part of the input to take, into `P-00000-of-00008` and so on; None: all.
        workers: number of tokenizing threads.
        on_error: what happens at a line that cannot be used.
        overwrite: whether an existing dataset is replaced.
        restart: whether an earlier job's unfinished work is thrown away.
    """

    inputs: StrPath | Sequence[StrPath]
    tokenizer: StrPath
    output_prefix: StrPath
    json_key: str = "text"
    field_keys: Sequence[str] = ()
    normalize: Normalization = "none"
    deduplicate: bool = False
    txt_documents: TextDocuments = "line"
    word_boundaries: Dictionary | None = None
    shard: Shard | None = None
    workers: PositiveInt = 1
    on_error: OnError = "fail"
    overwrite: bool = False
    restart: bool = False

    @property
    def input_files(self) -> list[Path]:
        """The text files."""
        inputs = self.inputs
        return [Path(p) for p in ([inputs] if isinstance(inputs, str | PathLike) else inputs)]

    @property
    def dataset_prefix(self) -> Path:
        """P, or the shard's prefix."""
        prefix = Path(self.output_prefix)
        return prefix if self.shard is None else self.shard.prefix(prefix)

    def check(self) -> None:
        """Refuse values that cannot be used, before a file is opened.

        Raises:
            UserError: an option has the wrong type, is out of range, or does not name a dataset.
        """
        # A command line has validated its options; Python callers may pass anything.
        check_fields(self)
        check_name(self.output_prefix)
        twice = sorted(key for key, times in Counter(self.field_keys).items() if times > 1)
        if twice:
            raise DataError(
                f"{argument('field_keys')} {' '.join(twice)}: given twice; give each key once"
            )

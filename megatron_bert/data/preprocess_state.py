"""How far preprocessing has come, and what it has counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_bert.data.encoding import EncodedBatch, Encoder
from megatron_bert.data.field_counts import FieldCounts
from megatron_bert.data.indexed_dataset import DatasetInfo, SourceFile
from megatron_bert.data.input_documents import InputDocuments, Position
from megatron_bert.data.text import report_skipped


@dataclass
class PreprocessCounts:
    """What went into a dataset and what did not."""

    documents: int = 0
    tokens: int = 0
    skipped_lines: int = 0
    empty_documents: int = 0
    duplicate_documents: int = 0


@dataclass
class PreprocessState:
    """How far the work has come: what a commit records, and a later job continues from.

    Attributes:
        position: the place after the last document that was read.
        counts: counts of everything read up to there.
        fields: counts of the values of its fields.
        sha256: hashes of the first files, as far as they are computed.
    """

    position: Position
    counts: PreprocessCounts
    fields: FieldCounts
    sha256: list[str]

    @classmethod
    def of_note(
        cls, note: Mapping[str, Any] | None, field_keys: Sequence[str], inputs: InputDocuments
    ) -> PreprocessState:
        """Continue from an earlier job's note; None starts from the beginning."""
        if note is None:
            return cls(Position(), PreprocessCounts(), FieldCounts(field_keys), [])
        position = Position(**note["position"])
        inputs.check_same(position, note["stamps"])
        return cls(
            position,
            PreprocessCounts(**note["counts"]),
            FieldCounts.from_json(note["fields"]),
            # Files that were not begun may have been replaced.
            note["sha256"][: position.num_begun],
        )

    def note(self, inputs: InputDocuments) -> dict[str, Any]:
        """The note that `of_note` reads."""
        return {
            "stamps": inputs.stamps(self.position),
            "position": asdict(self.position),
            "counts": asdict(self.counts),
            "fields": self.fields.to_json(),
            "sha256": self.sha256,
        }

    def add(self, batch: EncodedBatch, end: Position) -> None:
        """Count a batch, which ends at the place `end`, and log the lines left out."""
        for error in batch.skipped:
            report_skipped(error, self.counts.skipped_lines)
            self.counts.skipped_lines += 1
        self.counts.documents += len(batch.lengths_N)
        self.counts.tokens += len(batch.tokens_T)
        self.counts.empty_documents += batch.empty
        self.counts.duplicate_documents += batch.duplicates
        if any(batch.fields_N):
            for values, length in zip(batch.fields_N, batch.lengths_N.tolist(), strict=True):
                self.fields.add(values, length)
        self.position = end

    def info(self, inputs: InputDocuments, encoder: Encoder) -> DatasetInfo:
        """The content of `P.json` for the whole dataset."""
        reader, tokenizer = inputs.reader, encoder.tokenizer
        files = zip(reader.paths, reader.sizes, self.sha256, strict=True)
        return DatasetInfo(
            tokenizer_hash=tokenizer.hash,
            tokenizer_name=tokenizer.name,
            vocab_size=tokenizer.vocab_size,
            **asdict(self.counts),
            normalization=encoder.normalize,
            fields=self.fields.to_json(),
            word_boundaries=encoder.words_name,
            shard_set=inputs.shard_set,
            sources=tuple(
                SourceFile(str(path), size, sha256, inputs.part) for path, size, sha256 in files
            ),
        )

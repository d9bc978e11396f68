"""Documents and tokens by the values of metadata fields, such as a text's language or source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_VALUES = 1000
"""Values of a field that are counted one by one: counting ids or addresses would fill memory."""


@dataclass
class Amount:
    """Some documents and their tokens."""

    documents: int = 0
    tokens: int = 0

    def add(self, other: Amount) -> None:
        """Add the other's."""
        self.documents += other.documents
        self.tokens += other.tokens

    def to_json(self) -> dict[str, int]:
        """Both numbers by name."""
        return {"documents": self.documents, "tokens": self.tokens}

    @classmethod
    def from_json(cls, content: Any) -> Amount:
        """Read what `to_json` gave."""
        return cls(int(content["documents"]), int(content["tokens"]))


@dataclass
class _Field:
    values: dict[str, Amount] = field(default_factory=dict)
    absent: Amount = field(default_factory=Amount)
    further_values: Amount = field(default_factory=Amount)

    def add(self, value: str | None, amount: Amount) -> None:
        if value is None:
            self.absent.add(amount)
        elif value in self.values or len(self.values) < MAX_VALUES:
            self.values.setdefault(value, Amount()).add(amount)
        else:
            self.further_values.add(amount)


class FieldCounts:
    """Adds up documents and tokens by the values of fields.

    The first `MAX_VALUES` values of a field are counted separately, all further ones together.
    """

    def __init__(self, keys: Sequence[str] = ()) -> None:
        """Begin with nothing, for the fields of these keys."""
        self._fields = {key: _Field() for key in keys}

    def add(self, values: Sequence[str | None], tokens: int) -> None:
        """Count a document by its values, in the order of the keys; None is an absent field.

        `ParsedText.fields` are such values.
        """
        amount = Amount(1, tokens)
        for counted, value in zip(self._fields.values(), values, strict=True):
            counted.add(value, amount)

    def merge(self, other: FieldCounts) -> None:
        """Add the counts of another set; fields that only one of them has stay as they are."""
        for key, theirs in other._fields.items():
            ours = self._fields.setdefault(key, _Field())
            for value, amount in theirs.values.items():
                ours.add(value, amount)
            ours.absent.add(theirs.absent)
            ours.further_values.add(theirs.further_values)

    def keys_without_values(self) -> list[str]:
        """Keys for which no counted document has a value."""
        return [
            key
            for key, counted in self._fields.items()
            if not counted.values and counted.absent.documents
        ]

    def to_json(self) -> dict[str, Any]:
        """Counts for `json.dumps`, in the order in which the values first occurred.

        `{KEY: {"values": {VALUE: {"documents": n, "tokens": n}}, "absent": {...},
        "further_values": {...}}}`
        """
        return {
            key: {
                "values": {value: amount.to_json() for value, amount in counted.values.items()},
                "absent": counted.absent.to_json(),
                "further_values": counted.further_values.to_json(),
            }
            for key, counted in self._fields.items()
        }

    @classmethod
    def from_json(cls, content: Any) -> FieldCounts:
        """Read what `to_json` gave.

        Raises:
            ValueError: it is something else.
        """
        counts = cls()
        try:
            for key, counted in content.items():
                counts._fields[key] = _Field(
                    {value: Amount.from_json(n) for value, n in counted["values"].items()},
                    Amount.from_json(counted["absent"]),
                    Amount.from_json(counted["further_values"]),
                )
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"no counts by field: {error!r}") from error
        return counts

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FieldCounts) and self._fields == other._fields

    __hash__ = None  # type: ignore[assignment]

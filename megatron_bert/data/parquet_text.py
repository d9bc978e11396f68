"""Rows of Parquet files: the text column and the fields asked for, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_bert.command_line.arguments import argument
from megatron_bert.errors import DataError

if TYPE_CHECKING:
    import pyarrow

# Decoded text per batch; the row group's stated size determines how many rows that is.
_BATCH_BYTES = 4 << 20
_BATCH_ROWS = 4096
# For values that share bytes in the file, so that the stated size does not tell the decoded one.
_BATCH_ROWS_OF_SHARED_BYTES = 64
# A dictionary is no larger than the row group's column, and holds each value once.
_DICTIONARY_BYTES = 16 << 20
_DICTIONARY_ENCODINGS = {"RLE_DICTIONARY", "PLAIN_DICTIONARY"}
# Encodings that cannot be read into a dictionary.
_DELTA_ENCODINGS = {"DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"}
# Without a buffer the columns of a whole row group, which may be gigabytes, are read at once.
_READ_BYTES = 1 << 20


class ParquetRow(NamedTuple):
    """One row.

    Attributes:
        number: of the row in the file, from 1.
        text: UTF-8, not checked; None for a null.
        fields: values by key: str as bytes of UTF-8, bool, int, float, or None for a null. Keys
            for which the file has no column are left out.
    """

    number: int
    text: bytes | None
    fields: Mapping[str, object]


class ParquetText:
    """A Parquet file whose rows are documents.

    Attributes:
        num_rows: of the whole file.
    """

    def __init__(self, path: Path, json_key: str, field_keys: Sequence[str] = ()) -> None:
        """Check the columns; no row is read yet, and the file is closed again.

        Args:
            path: the file.
            json_key: name of the text column. A name that no column has is taken as a dotted path
                into columns of structs.
            field_keys: names of the fields' columns, which may be missing.

        Raises:
            DataError: pyarrow is not installed, the file cannot be read, there is no such column,
                or its type is not supported.
        """
        self._path = path
        self._parquet = _import_parquet(path)
        with self._open() as file:
            metadata = file.metadata
            schema = file.schema_arrow
        self.num_rows: int = metadata.num_rows
        self._text_path = _text_path(path, schema, json_key)
        self._field_paths = _field_paths(path, schema, field_keys)
        paths = {self._text_path, *self._field_paths.values()}
        self._columns = sorted(".".join(names) for names in paths)
        self._dictionaries = [
            column for column in self._columns if _is_small_dictionary(metadata, column)
        ]

    def __iter__(self) -> Iterator[ParquetRow]:
        """Rows in order.

        Raises:
            DataError: the file cannot be read or is damaged.
        """
        first = 1
        with self._open(self._dictionaries) as file:
            for group in range(file.num_row_groups):
                batches = file.iter_batches(
                    batch_size=self._batch_rows(file.metadata.row_group(group)),
                    row_groups=[group],
                    columns=self._columns,
                    use_threads=False,
                )
                for batch in batches:
                    yield from self._rows(batch, first)
                    first += batch.num_rows
        if first - 1 != self.num_rows:
            raise DataError(
                f"{self._path} is damaged: it has {first - 1:,} rows and tells of "
                f"{self.num_rows:,}; make or copy it again"
            )

    def _rows(self, batch: pyarrow.RecordBatch, first: int) -> Iterator[ParquetRow]:
        texts = _values(batch, self._text_path)
        fields = [_values(batch, path) for path in self._field_paths.values()]
        for number, (text, *values) in enumerate(zip(texts, *fields, strict=True), first):
            yield ParquetRow(number, text, dict(zip(self._field_paths, values, strict=True)))

    def _batch_rows(self, group: pyarrow.parquet.RowGroupMetaData) -> int:
        name = ".".join(self._text_path)
        if name in self._dictionaries:
            return _BATCH_ROWS
        chunks = _chunks(group, name)
        size = sum(chunk.total_uncompressed_size for chunk in chunks)
        shares = any(
            _DICTIONARY_ENCODINGS.union({"DELTA_BYTE_ARRAY"}).intersection(chunk.encodings)
            for chunk in chunks
        )
        most = _BATCH_ROWS_OF_SHARED_BYTES if shares else _BATCH_ROWS
        return int(max(1, min(most, _BATCH_BYTES * group.num_rows // max(1, size))))

    @contextmanager
    def _open(self, dictionaries: Sequence[str] = ()) -> Iterator[pyarrow.parquet.ParquetFile]:
        import pyarrow

        try:
            with self._parquet.ParquetFile(
                self._path,
                read_dictionary=list(dictionaries),
                buffer_size=_READ_BYTES,
                pre_buffer=False,
                page_checksum_verification=True,
            ) as file:
                yield file
        except (pyarrow.ArrowException, OSError, IndexError) as error:
            # pyarrow's own read errors are OSErrors too, but have no errno. An IndexError means a
            # row whose text is not in the dictionary.
            if isinstance(error, OSError) and error.errno is not None:
                raise
            reason = str(error).partition("\n")[0]
            raise DataError(
                f"{self._path} is damaged, cut short or no Parquet file ({reason}); make or copy "
                f"it again"
            ) from error


def _import_parquet(path: Path) -> ModuleType:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"{path}: reading Parquet needs pyarrow, which cannot be imported ({error}); install "
            f"it: pip install -c constraints.txt -e '.[parquet]'"
        ) from error
    parquet: ModuleType = pyarrow.parquet
    return parquet


def _text_path(path: Path, schema: pyarrow.Schema, json_key: str) -> tuple[str, ...]:
    column = _find(schema, json_key)
    if column is None:
        there = ", ".join(repr(name) for name in schema.names) or "none"
        raise DataError(
            f"{path}: no column {json_key!r} (columns here: {there}); name the text's "
            f"with {argument('json_key')}"
        )
    names, kind = column
    if not _is_string(kind):
        raise DataError(
            f"{path}: column {json_key!r} is not of strings but of type {kind}; name the text's "
            f"column with {argument('json_key')}"
        )
    return names


def _field_paths(
    path: Path, schema: pyarrow.Schema, field_keys: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    found = {key: column for key in field_keys if (column := _find(schema, key)) is not None}
    for key, (_, kind) in found.items():
        if not (_is_string(kind) or _is_plain(kind)):
            raise DataError(
                f"{path}: field {key!r} is of type {kind}; only strings, numbers and booleans can "
                f"be counted, so name another column"
            )
    return {key: names for key, (names, _) in found.items()}


def _find(
    schema: pyarrow.Schema | pyarrow.StructType, key: str
) -> tuple[tuple[str, ...], pyarrow.DataType] | None:
    """The path to a column, and its type; resolves keys as `find_value` does in JSON objects."""
    from pyarrow import types

    # -1 also where two columns share the name.
    index = schema.get_field_index(key)
    if index >= 0:
        return (key,), schema.field(index).type
    name, _, rest = key.partition(".")
    index = schema.get_field_index(name) if rest else -1
    if index < 0 or not types.is_struct(schema.field(index).type):
        return None
    inner = _find(schema.field(index).type, rest)
    return None if inner is None else ((name, *inner[0]), inner[1])


def _is_string(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _is_plain(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    return bool(
        types.is_boolean(kind)
        or types.is_integer(kind)
        or types.is_floating(kind)
        or types.is_null(kind)
    )


def _values(batch: pyarrow.RecordBatch, path: tuple[str, ...]) -> Iterator[Any]:
    """Yield values one by one: many rows may share one long text, which the batch holds once."""
    import pyarrow
    from pyarrow import compute, types

    name, *inner = path
    array = batch.column(name)
    for name in inner:
        array = compute.struct_field(array, name)
    if not _is_string(array.type):
        yield from array.to_pylist()
        return
    # As bytes: `parse` can then name a row whose text is not UTF-8; a string's `as_py` would fail.
    if types.is_dictionary(array.type):
        texts = array.dictionary.cast(pyarrow.large_binary())
        for index in array.indices.to_pylist():
            yield None if index is None else texts[index].as_py()
    else:
        for text in array.cast(pyarrow.large_binary()):
            yield text.as_py()


def _is_small_dictionary(metadata: pyarrow.parquet.FileMetaData, column: str) -> bool:
    """Whether a column can be read as a dictionary that stays small, in each row group."""
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    return all(
        chunk.physical_type == "BYTE_ARRAY"
        and _DICTIONARY_ENCODINGS.intersection(chunk.encodings)
        and not _DELTA_ENCODINGS.intersection(chunk.encodings)
        and chunk.total_uncompressed_size <= _DICTIONARY_BYTES
        for group in groups
        for chunk in _chunks(group, column)
    )


def _chunks(
    group: pyarrow.parquet.RowGroupMetaData, column: str
) -> list[pyarrow.parquet.ColumnChunkMetaData]:
    chunks = (group.column(number) for number in range(group.num_columns))
    return [chunk for chunk in chunks if chunk.path_in_schema == column]

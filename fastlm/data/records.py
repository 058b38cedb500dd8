"""Documents out of records: JSON lines, parquet files, and the Arrow files of a saved dataset.

A record is a document. A field that is null, or an empty text, is an empty document; an empty line
is none. pyarrow is imported where it is used.
"""

import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastlm.data.chat import conversation
from fastlm.data.compression import COMPRESSED, UNREAD, inner_suffix, opened, optional
from fastlm.data.text import (
    JSON,
    JSON_LINES,
    Piece,
    TextFile,
    cut_document,
    first_record,
    read_pieces,
)
from fastlm.errors import DataError, shown

_ROWS = 1024  # of a table in memory at once
OnBytes = Callable[[int], object]


def read_documents(file: TextFile, on_bytes: OnBytes = lambda _: None) -> Iterator[Piece]:
    """The documents of a file of any format, as read_pieces has those of a text file."""
    suffix = inner_suffix(file.path)
    if suffix in UNREAD:
        raise DataError(
            f"{file.path}: {suffix} is not read, only {' and '.join(COMPRESSED)}; decompress it "
            f"first"
        )
    if suffix == JSON:
        _check_json_lines(file.path)
    if suffix in (*JSON_LINES, JSON):
        values = read_jsonl(file, on_bytes)
    elif suffix in (".parquet", ".arrow"):
        values = read_table(file, on_bytes)
    elif file.template:
        raise DataError(f"{file.path}: --chat reads JSON lines, .parquet and .arrow files")
    else:
        yield from read_pieces(file.path, on_bytes)
        return
    for index, (where, value) in enumerate(values):
        if file.template:
            yield from conversation(index, value, where, file.template)
            continue
        if value is not None and not isinstance(value, str):
            raise DataError(
                f"{where}: {file.text_key!r} is {shown(value)}, no text; --text-key names another "
                f"field"
            )
        yield from cut_document(index, value or "")


def _check_json_lines(path: Path) -> None:
    """DataError for JSON of another form."""
    if first_record(path) is None:
        lines = f"{path.name[: path.name.lower().rindex(JSON)]}.jsonl"
        raise DataError(
            f"{path}: its first line is no JSON object; of a list of records jq -c '.[]' FILE > "
            f"{lines} makes JSON lines, of one object jq -c ., and plain text is read from a file "
            f"called .txt"
        )


def read_jsonl(file: TextFile, on_bytes: OnBytes) -> Iterator[tuple[str, Any]]:
    """(file and line, for messages; the value of file.text_key) of each line."""
    with opened(file.path, on_bytes) as content:
        for number, line in enumerate(io.BufferedReader(content, 1 << 20), 1):
            if not line.strip():
                continue
            where = f"{file.path}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", error)  # without json's own line 1
                raise DataError(f"{where}: not JSON ({reason}); mend or remove it") from error
            if not isinstance(record, dict):
                raise DataError(f"{where}: holds {shown(record)}, no JSON object; mend it")
            if file.text_key not in record:
                raise _no_field(where, file.text_key, list(record))
            yield where, record[file.text_key]


def read_table(file: TextFile, on_bytes: OnBytes) -> Iterator[tuple[str, Any]]:
    """(file and row, for messages; the value of file.text_key) of each row."""
    path = file.path
    if path.suffix.lower() in COMPRESSED:
        raise DataError(f"{path}: a table is read at many places; decompress the file first")
    arrow = optional("pyarrow", path)
    try:
        size, row, counted = path.stat().st_size, 0, 0
        with _table_batches(path, file.text_key) as (rows, batches):
            for batch in batches:
                for value in batch.column(0):
                    yield f"{path}, row {row}", value.as_py()
                    row += 1
                share = row * size // max(rows, 1)
                on_bytes(share - counted)
                counted = share
    except arrow.ArrowException as error:
        raise DataError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


@contextmanager
def _table_batches(path: Path, column: str) -> Iterator[tuple[int, Iterator[Any]]]:
    """(number of rows, record batches of the one column) of a parquet or Arrow file."""
    if path.suffix.lower() == ".parquet":
        table = optional("pyarrow.parquet", path).ParquetFile(path)
        with table:
            _check_column(path, column, table.schema_arrow.names)
            yield table.metadata.num_rows, table.iter_batches(_ROWS, columns=[column])
        return
    arrow = optional("pyarrow", path)
    with arrow.memory_map(str(path)) as content:
        try:
            reader = arrow.ipc.open_stream(content)  # what datasets.save_to_disk writes
            # The batches are views of the file, not copies.
            stored = list(reader)
        except arrow.ArrowInvalid:
            content.seek(0)
            reader = arrow.ipc.open_file(content)
            stored = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        _check_column(path, column, reader.schema.names)
        batches = (
            batch.select([column]).slice(first, _ROWS)
            for batch in stored
            for first in range(0, batch.num_rows, _ROWS)
        )
        yield sum(batch.num_rows for batch in stored), batches


def _check_column(path: Path, column: str, names: list[str]) -> None:
    if column not in names:
        raise _no_field(str(path), column, names)


def _no_field(where: str, key: str, names: list[str]) -> DataError:
    return DataError(
        f"{where}: has no field {key!r}, only {shown(', '.join(map(str, names)))}; name the one "
        f"that holds the text: --text-key FIELD"
    )

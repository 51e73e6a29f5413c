"""The rows of a dataset's file: JSON Lines, plain or gzipped, or Parquet.

    {"prompt": "1+2=", "answer": "3"}       one object a line, in UTF-8

The format is detected from the first bytes, never from the name. For anything else (one JSON array, UTF-16,
a Git LFS pointer, an archive, a web page) the error says what it is and what to do. Lines are read one by
one, so a file that is not a dataset is refused before it fills the memory. Parquet needs the extra `parquet`
(pyarrow).

A row holds what JSON can hold: text, numbers, true and false, null, lists and objects. Dates and decimals of
Parquet become text. Half a surrogate pair is not text and is refused anywhere, and so is an object with a
duplicate key.
"""

import datetime
import decimal
import gzip
import io
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from rollforward.errors import DataError
from rollforward.inputs import LFS_HINT, is_lfs_pointer, open_input, parse_json

LINE_BYTES = 1 << 26
FILE_BYTES = 1 << 33
"""Of the text, unpacked: all of it is kept in memory."""
LINE_HINT = 'write one object a line, such as {"prompt": "1+2=", "answer": "3"}'

_PARQUET, _GZIP = b"PAR1", b"\x1f\x8b"
_TO_LINES = "write it as JSON Lines: one object a line, in UTF-8"
_OTHERS = {
    b"\xff\xfe\0\0": ("UTF-32 text", "iconv -f UTF-32 -t UTF-8 FILE > NEW"),
    b"\xff\xfe": ("UTF-16 text", "iconv -f UTF-16 -t UTF-8 FILE > NEW"),
    b"\xfe\xff": ("UTF-16 text", "iconv -f UTF-16 -t UTF-8 FILE > NEW"),
    b"{\0": ("UTF-16 text", "iconv -f UTF-16LE -t UTF-8 FILE > NEW"),
    b"\0{": ("UTF-16 text", "iconv -f UTF-16BE -t UTF-8 FILE > NEW"),
    b"\0\0\0\0": ("zero bytes", "the copy or download was not finished: fetch it again"),
    b"PK\x03\x04": ("a zip archive", "unpack it"),
    b"(\xb5/\xfd": ("compressed with zstd", "unpack it with zstd -d"),
    b"\xfd7zXZ": ("compressed with xz", "unpack it with xz -d"),
    b"BZh": ("compressed with bzip2", "unpack it with bzip2 -d"),
    b"ARROW1": ("an Arrow file", _TO_LINES),
    b"\xff\xff\xff\xff": ("an Arrow stream", _TO_LINES),
    b"Obj\x01": ("an Avro file", _TO_LINES),
    b"\x89HDF": ("an HDF5 file", _TO_LINES),
    b"SQLite format 3\0": ("an SQLite database", _TO_LINES),
}
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Row:
    """One row, and where it is."""

    where: str
    """For messages: `file:line`, or `file row N`."""
    values: Mapping[str, Any]


def read_rows(path: Path) -> Iterator[Row]:
    """The rows in order; DataError names the place that cannot be read."""
    try:
        file = open_input(path)
    except OSError as error:
        raise DataError(
            f"cannot read the dataset {path}: {error.strerror or error}",
            hint="set rl_config.dataset_file (--dataset_file) to a JSON Lines file, or to reasoning_gym:NAME",
        ) from error
    with file:
        head = _peek(file)
        if head.startswith(_PARQUET):
            yield from _read_parquet(path, file)
        elif head.startswith(_GZIP):
            yield from _read_gzip(path, file)
        else:
            yield from _read_lines(path, file)


def _peek(file: BinaryIO) -> bytes:
    return cast(io.BufferedReader, file).peek(64)


def _read_gzip(path: Path, file: BinaryIO) -> Iterator[Row]:
    with gzip.GzipFile(fileobj=file) as packed:
        unpacked = io.BufferedReader(cast(Any, packed))
        try:
            head = _peek(unpacked)
            if head.startswith((_PARQUET, _GZIP)):
                raise DataError(f"{path} is a gzipped Parquet or gzip file", hint="unpack it with gzip -d")
            yield from _read_lines(path, unpacked)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(
                f"{path}: the gzip file is damaged or cut short: {error}", hint="fetch it again"
            ) from error


def _read_lines(path: Path, file: BinaryIO) -> Iterator[Row]:
    _refuse_others(path, _peek(file))
    number = size = 0
    while True:
        number += 1
        where = f"{path}:{number}"
        try:
            line = file.readline(LINE_BYTES + 1)
        except OSError as error:
            if isinstance(error, gzip.BadGzipFile):
                raise
            raise DataError(
                f"{where}: cannot be read: {error.strerror or error}", hint="check the disk"
            ) from error
        size += len(line)
        if len(line) > LINE_BYTES or size > FILE_BYTES:
            raise DataError(
                f"{where}: a line of more than {LINE_BYTES >> 20} MiB, or a file of more than "
                f"{FILE_BYTES >> 30} GiB",
                hint=LINE_HINT,
            )
        if not line:
            return
        if line.strip():
            yield Row(where, _parse_line(where, line))


def _refuse_others(path: Path, head: bytes) -> None:
    for magic, (what, hint) in _OTHERS.items():
        if head.startswith(magic):
            raise DataError(f"{path} is not JSON Lines but {what}", hint=hint)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if is_lfs_pointer(text):
        raise DataError(f"{path} is a pointer of Git LFS, not the dataset itself", hint=LFS_HINT)
    if text.startswith(b"["):
        raise DataError(
            f"{path} holds one JSON array, not JSON Lines (or its first line is a list instead of an object)",
            hint="write one object a line: jq -c '.[]' FILE > NEW",
        )
    if text[:9].lower() == b"<!doctype" or text[:5].lower() == b"<html":
        raise DataError(f"{path} is a web page, not a dataset", hint="download the raw file")


def _parse_line(where: str, line: bytes) -> dict[str, Any]:
    try:
        row = parse_json(line, unique=True)
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}", hint=LINE_HINT) from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: {type(row).__name__} instead of an object", hint=LINE_HINT)
    if b"\\u" in line:
        _refuse_half_characters(where, row)
    return row


def _refuse_half_characters(where: str, row: Mapping[str, Any]) -> None:
    for name, value in row.items():
        # An explicit stack: JSON may nest about as deep as Python can recurse, so recursion could fail.
        waiting: list[Any] = [name, value]
        while waiting:
            item = waiting.pop()
            if isinstance(item, str):
                half = _SURROGATE.search(item)
                if half:
                    raise DataError(
                        f"{where}: {_printable(name)} has half a character (U+{ord(half[0]):04X}): one of a "
                        "surrogate pair without the other",
                        hint="the text was cut within a character: write all of it, or U+FFFD in its place",
                    )
            elif isinstance(item, dict):
                waiting += [*item.keys(), *item.values()]
            elif isinstance(item, list):
                waiting += item


def _printable(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode()


def _read_parquet(path: Path, file: BinaryIO) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            f"{path} is a Parquet file, which needs the package pyarrow: {error}",
            hint="pip install 'rollforward[parquet]', or write it as JSON Lines",
        ) from error
    try:
        table = parquet.ParquetFile(file)
        names = table.schema_arrow.names
        if len(set(names)) < len(names):
            raise DataError(f"{path} has two columns of one name", hint="rename one of them")
        number = 0
        for batch in table.iter_batches(batch_size=1024):
            for values in batch.to_pylist():
                number += 1
                where = f"{path} row {number}"
                yield Row(where, {name: _plain(where, name, value) for name, value in values.items()})
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: the Parquet file is damaged or not supported: {' '.join(str(error).split())[:300]}",
            hint="fetch it again, or write it as JSON Lines",
        ) from error


def _plain(where: str, column: str, value: Any) -> Any:
    """A value of Parquet as JSON would hold it."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, list | tuple):
        return [_plain(where, column, item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(where, column, item) for key, item in value.items()}
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | datetime.timedelta):
        return str(value)
    raise DataError(
        f"{where}: the column {column} holds {type(value).__name__}, which is not text, a number or a list",
        hint="leave the column out of the file",
    )

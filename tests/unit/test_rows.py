"""What a dataset's file may be, and what is said of one that is something else."""

import gzip
import importlib.util
import json
import os
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from rollforward.data import rows
from rollforward.data.rows import read_rows
from rollforward.errors import DataError

WITH_PARQUET = importlib.util.find_spec("pyarrow") is not None
LINE = b'{"prompt": "1+1=", "answer": "2"}\n'
ROW = {"prompt": "1+1=", "answer": "2"}


def read(folder: Path, content: bytes) -> list[tuple[str, dict[str, Any]]]:
    path = folder / "data"
    path.write_bytes(content)
    return [(row.where.removeprefix(str(path)), dict(row.values)) for row in read_rows(path)]


def said(folder: Path, content: bytes) -> str:
    with pytest.raises(DataError) as caught:
        read(folder, content)
    assert caught.value.hint
    return str(caught.value)


def test_a_gzipped_file_is_read_whatever_it_is_called(tmp_path: Path) -> None:
    assert read(tmp_path, gzip.compress(LINE + b"\n" + LINE)) == [(":1", ROW), (":3", ROW)]


def test_a_byte_order_mark_and_windows_line_ends_are_no_obstacle(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + LINE.replace(b"\n", b"\r\n") + LINE.rstrip()
    assert read(tmp_path, content) == [(":1", ROW), (":2", ROW)]


ARRAY = b"[" + LINE.strip() + b",\n" + LINE.strip() + b"]"
OTHERS = {
    "an array": (ARRAY, "one JSON array", "jq -c"),
    "an array after blanks": (b"\n  " + ARRAY, "one JSON array", "jq -c"),
    "UTF-16": (LINE.decode().encode("utf-16"), "UTF-16", "iconv"),
    "UTF-16 without its mark": (LINE.decode().encode("utf-16-le"), "UTF-16", "iconv -f UTF-16LE"),
    "UTF-16, the other end first": (LINE.decode().encode("utf-16-be"), "UTF-16", "iconv -f UTF-16BE"),
    "UTF-32": (LINE.decode().encode("utf-32"), "UTF-32", "iconv"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "Git LFS", "lfs pull"),
    "a zip archive": (b"PK\x03\x04" + bytes(100), "zip", "unpack"),
    "zstd": (b"(\xb5/\xfd" + bytes(100), "zstd", "unpack"),
    "xz": (b"\xfd7zXZ\x00" + bytes(100), "xz", "unpack"),
    "bzip2": (b"BZh91AY" + bytes(100), "bzip2", "unpack"),
    "Arrow": (b"ARROW1\0\0" + bytes(100), "Arrow", "JSON Lines"),
    "a web page": (b"<!DOCTYPE html><html><body>404</body></html>", "web page", "download"),
    "zeros": (bytes(5000), "zero bytes", "fetch"),
    "gzip within gzip": (gzip.compress(gzip.compress(LINE)), "gzip", "unpack"),
    "gzip cut short": (gzip.compress(LINE * 1000)[:-9], "damaged or cut short", "fetch"),
    "gzip with another checksum": (gzip.compress(LINE)[:-8] + bytes(8), "damaged or cut short", "fetch"),
    "gzipped UTF-16": (gzip.compress(LINE.decode().encode("utf-16")), "UTF-16", "iconv"),
    "an object over several lines": (
        json.dumps([ROW], indent=1).encode()[1:-1],
        ":2: not JSON",
        "object a line",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_not_json_lines_is_named_with_what_to_do(tmp_path: Path, kind: str) -> None:
    content, what, hint = OTHERS[kind]
    text = said(tmp_path, content)
    assert what in text
    assert hint in text.partition("Try:")[2]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"prompt": "1", "answer": "1", "answer": "2"}', "key 'answer' appears twice"),
        (
            b'{"prompt": [{"role": "user", "content": "a", "content": "b"}], "answer": "2"}',
            "'content' appears twice",
        ),
        (b'{"prompt": "1", "answer": "2", "more": {"a": 1, "a": 1}}', "key 'a' appears twice"),
        (b'{"prompt": "1+1\\ud83d", "answer": "2"}', r"prompt has half a character (U+D83D)"),
        (
            b'{"prompt": [{"role": "user", "content": "\\udc00x"}], "answer": "2"}',
            r"prompt has half .* (U+DC00)",
        ),
        (b'{"prompt": "1", "answer": "\\ud83d2"}', "answer has half a character"),
        (b'{"prompt": "1", "answer": "2", "more": [{"\\ud83d": 1}]}', "more has half a character"),
        (b'{"prompt": "1", "answer": "2", "\\ud83d": 1}', r"\ud83d has half a character"),
        (b'{"prompt": "1", "answer": ' + b"9" * 5000 + b"}", "too many digits"),
        (b'{"prompt": ' + b"[" * 100_000, "nests too deep"),
        (b'{"prompt": "\xff", "answer": "2"}', "not UTF-8"),
        (b'{"prompt": "1"', "not JSON"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path: Path, line: bytes, what: str) -> None:
    text = said(tmp_path, LINE + line + b"\n")
    assert f"{tmp_path / 'data'}:2: " in text
    first, _, last = what.partition(" .* ")
    assert first in text
    assert last in text


def test_a_whole_pair_of_surrogates_is_one_character(tmp_path: Path) -> None:
    [(_, row)] = read(tmp_path, b'{"prompt": "\\ud83d\\ude42", "answer": "2"}')
    assert row["prompt"] == "\U0001f642"


@pytest.mark.parametrize("kind", ["pipe", "device", "random device", "folder", "socket"])
def test_what_is_not_a_regular_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    """A pipe would wait for ever, a device fill the memory."""
    path = {"device": Path("/dev/zero"), "random device": Path("/dev/urandom")}.get(kind, tmp_path / "data")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        import socket

        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
    begun = time.process_time()
    with pytest.raises(DataError, match=r"cannot read the dataset .*(regular file|directory)"):
        list(read_rows(path))
    assert time.process_time() - begun < 30


@pytest.mark.parametrize("packed", [False, True])
def test_a_line_without_end_is_refused_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    """A sparse file of a terabyte, or a small file that unpacks to one."""
    monkeypatch.setattr(rows, "LINE_BYTES", 1 << 20)
    path = tmp_path / "data"
    if packed:
        path.write_bytes(gzip.compress(b"{" + b" " * (1 << 26)))
    else:
        path.write_bytes(b"{ ")
        os.truncate(path, 1 << 40)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="a line of more than 1 MiB"):
            list(read_rows(path))
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.skipif(WITH_PARQUET, reason="the extra `parquet` is installed")
def test_without_the_extra_a_parquet_file_says_how_to_get_it(tmp_path: Path) -> None:
    assert "rollforward[parquet]" in said(tmp_path, b"PAR1" + bytes(100))


@pytest.mark.skipif(not WITH_PARQUET, reason="the extra `parquet` is not installed")
def test_a_parquet_file_is_read_as_the_same_rows_of_json_are(tmp_path: Path) -> None:
    import datetime
    import decimal

    import pyarrow
    from pyarrow import parquet

    chat = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
    table = pyarrow.table(
        {
            "prompt": [chat, chat[:1]],
            "answer": [decimal.Decimal("2.50"), None],
            "level": [1, None],
            "when": [datetime.date(2026, 7, 4), None],
            "score": [0.5, float("nan")],
            "more": [{"a": [1, 2]}, {"a": []}],
        }
    )
    parquet.write_table(table, tmp_path / "made")
    found = read(tmp_path, (tmp_path / "made").read_bytes())
    first = {
        "prompt": chat,
        "answer": "2.50",
        "level": 1,
        "when": "2026-07-04",
        "score": 0.5,
        "more": {"a": [1, 2]},
    }
    assert found[0] == (" row 1", first)
    assert found[1][0] == " row 2"
    assert found[1][1]["answer"] is None


@pytest.mark.skipif(not WITH_PARQUET, reason="the extra `parquet` is not installed")
def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"prompt": ["1"] * 99, "answer": [b"\0"] * 99}), tmp_path / "made")
    whole = (tmp_path / "made").read_bytes()
    assert "the column answer holds bytes" in said(tmp_path, whole)
    for content in (b"PAR1", whole[:-20], whole[: len(whole) // 2] + bytes(len(whole) // 2)):
        assert "damaged or not supported" in said(tmp_path, content)

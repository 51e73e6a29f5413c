"""`meta.json`: for people, and for tools that know the folders of MindRLHF and MindFormers.

It has three keys and is replaced as a whole. MindRLHF writes it in place without truncating it, so
when an epoch rolls over from `0_100` to `1_5`, the end of the longer text stays behind; `read_meta`
understands such a file and reports it.
"""

import json
from dataclasses import dataclass
from typing import Any

from rollforward.position import Position
from rollforward.storage import Storage
from rollforward.store.layout import TensorFileName

MAX_META_BYTES = 1 << 16
_KEYS = ("last_epoch", "last_step", "last_ckpt_file")


@dataclass(frozen=True)
class Meta:
    """The content of a `meta.json`."""

    position: Position
    file: str
    """A bare file name."""
    garbage: bool = False
    """Whether anything followed the JSON object."""


def meta_content(name: TensorFileName) -> bytes:
    """The bytes that point to a tensor file."""
    return (meta_line(name.position, name.name) + "\n").encode()


def meta_line(position: Position, file: str) -> str:
    """The content of a `meta.json`, on one line."""
    values: dict[str, Any] = dict(zip(_KEYS, (position.epoch, position.step, file), strict=True))
    return json.dumps(values)


def write_meta(storage: Storage, path: str, name: TensorFileName) -> None:
    """Make `meta.json` point to a tensor file; nothing is written if it already does."""
    content = meta_content(name)
    entry = storage.stat(path)
    if entry is not None and entry.kind == "file" and entry.size == len(content):
        with storage.open(path) as handle:
            found = bytearray(len(content))
            if handle.size == len(content):
                handle.read_into(memoryview(found), 0)
        if found == content:
            return
    storage.write(path, [content])


def parse_meta(content: bytes) -> Meta:
    """Parse a `meta.json`; ValueError, in one line, when that is impossible."""
    if len(content) > MAX_META_BYTES:
        raise ValueError(f"{len(content)} bytes, which is not a meta.json")
    try:
        text = content.decode("utf-8").lstrip()
        value, end = json.JSONDecoder().raw_decode(text)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(value, dict) or any(key not in value for key in _KEYS):
        raise ValueError(f"not an object with {', '.join(_KEYS)}")
    epoch, step, file = (value[key] for key in _KEYS)
    if not all(type(number) is int and 0 <= number < 10**18 for number in (epoch, step)):
        raise ValueError("last_epoch or last_step is not a count")
    if (
        not isinstance(file, str)
        or not file
        or "/" in file
        or "\\" in file
        or "\0" in file
        or file in (".", "..")
    ):
        raise ValueError("last_ckpt_file is not a file name")
    return Meta(Position(epoch, step), file, garbage=bool(text[end:].strip()))

"""Files of JSON that end with their own digest: manifests, tables, the list of guests.

The last 46 bytes are `,"digest":"`, the digest of every byte before them, `"}` and a newline. So one that was
edited, truncated or hit by a bit flip is told from one that is whole by its bytes alone.
"""

from typing import Any

from rollforward.store import strictjson
from rollforward.store.digests import DIGEST_HEX, digest, is_digest

TAIL_BYTES = len(',"digest":""}\n') + DIGEST_HEX
NOT_WHOLE = "cut short or overwritten: it does not end with its digest"


def seal(body: bytes) -> bytes:
    """Close a JSON object that lacks its closing brace with the digest of its bytes."""
    return body + f',"digest":"{digest(body)}"}}\n'.encode()


def own_digest(content: bytes) -> str:
    """The digest that a file's last bytes claim; ValueError when they are not the end of one."""
    tail = content[-TAIL_BYTES:]
    found = tail[11 : 11 + DIGEST_HEX].decode("ascii", "replace")
    if not (tail.startswith(b',"digest":"') and tail.endswith(b'"}\n') and is_digest(found)):
        raise ValueError(NOT_WHOLE)
    return found


def check_own_digest(content: bytes) -> str:
    """The digest at the end of a file; ValueError when it does not match the bytes before it."""
    own = own_digest(content)
    if own != digest(content[:-TAIL_BYTES]):
        raise ValueError("edited or damaged: it does not have the digest that it ends with")
    return own


def dump_lines(entries: list[list[Any]]) -> str:
    """A JSON list with an entry on each line."""
    return "[\n" + ",\n".join(map(strictjson.dump, entries)) + "\n]"


def need(holds: bool, otherwise: str) -> None:
    """ValueError unless it holds."""
    if not holds:
        raise ValueError(otherwise)


def text(value: Any, what: str) -> str:
    """The value, a string; ValueError when it is not."""
    need(isinstance(value, str), f"{what} is not a text")
    return str(value)

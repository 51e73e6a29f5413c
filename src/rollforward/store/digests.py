"""XXH3-128: the digest of everything stored.

It detects damage, not forgery: anyone who can write to the folder can write a matching digest. It
runs at memory speed on one core, so every byte can be digested.
"""

from collections.abc import Iterable
from typing import Any

import xxhash

DIGEST_HEX = 32
_DIGITS = frozenset("0123456789abcdef")


def digest(data: bytes | bytearray | memoryview) -> str:
    """XXH3-128 of some bytes, as 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)


def digest_of_digests(parts: Iterable[str]) -> str:
    """XXH3-128 over the 16-byte forms of some digests, in order."""
    return xxhash.xxh3_128_hexdigest(b"".join(bytes.fromhex(part) for part in parts))


def is_digest(value: Any, digits: int = DIGEST_HEX) -> bool:
    """Whether a JSON value is one digest, or as many as have so many digits."""
    return isinstance(value, str) and len(value) == digits > 0 and _DIGITS.issuperset(value)

"""Parsing a manifest, whatever its version."""

from rollforward.errors import CheckpointInvalid
from rollforward.store import earlier, strictjson
from rollforward.store.manifest import FORMAT, VERSION, Manifest, parse_current
from rollforward.store.sealing import check_own_digest, need

VERSIONS = (1, 2, VERSION)
"""Those that are read."""
_MOST_VALUES = 4_000_000
"""Room for 300,000 tensors in the versions that list them in the manifest."""


def parse(content: bytes, name: str) -> Manifest:
    """Parse the manifest in the file `commits/<name>`; CheckpointInvalid says why it is not one."""
    try:
        own = check_own_digest(content)
        value = strictjson.parse(content, most=_MOST_VALUES)
        need(isinstance(value, dict), "not a JSON object")
        need(value.get("format") == FORMAT, f"its format is not {FORMAT!r}")
        version = value.get("version")
        readable = ", ".join(map(str, VERSIONS))
        known = type(version) is int and version in VERSIONS
        need(known, f"its version is {str(version)[:20]}; this program reads versions {readable}")
        return (parse_current if version == VERSION else earlier.parse)(value, name, own)
    except ValueError as error:
        raise CheckpointInvalid(f"manifest {name}: {error}") from None

"""Records: the contents of a journal's frames, as safetensors blobs.

The metadata of a blob are strings: `kind`, `position`, `time`, and what the kind requires. There are
four kinds. `segment` comes first in every segment and says whose it is; `rollouts` is one chunk
of experience; `outcome` is the result of one update; `event` is a line for the history of the run.
What the arrays mean is up to the caller: this module only handles names, dtypes, shapes and bytes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollforward.errors import CheckpointInvalid
from rollforward.position import Position
from rollforward.storage import ReadHandle
from rollforward.store import strictjson
from rollforward.store.journal.timeline import Lineage
from rollforward.store.layout import SegmentName
from rollforward.store.tensorfile import DTYPES, ArraySource, as_bytes, is_count, lay_out, read_header

FORMAT = 3
"""Of what is written. Version 1 has no number, and each rank numbers its own chunks; until version 2 every
frame is durable before the next is written."""
_ALIGNMENT = 8


@dataclass(frozen=True)
class Record:
    """A record as it was written."""

    kind: str
    position: Position
    time: str
    """UTC time of writing."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Everything else."""
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """Read-only."""

    def number(self, name: str) -> int:
        """A count from the metadata; ValueError when it is missing or not a count."""
        text = self.metadata.get(name, "")
        if not (text.isascii() and text.isdigit() and len(text) < 19):
            raise ValueError(f"{name} is not a count")
        return int(text)


@dataclass(frozen=True, kw_only=True)
class Identity:
    """The writer: the same for all segments of one incarnation of one rank."""

    run_id: str
    rank: int
    world_size: int
    incarnation: int
    fingerprint: str
    """The configuration's."""
    versions: Mapping[str, str]
    device: str
    chunks_per_step: int | None = None
    """Chunks of a step over all ranks: rollouts are numbered from 0 up to it, and count for every rank.

    None where each rank numbers its own: in a loop of one's own (`open_run`), and in format version 1."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Extra information for readers, such as the names of the verifiers; JSON."""
    fingerprints: frozenset[str] = field(default=frozenset(), compare=False)
    """Other fingerprints of the same configuration, from versions that covered less of it. Not written."""

    def is_configured_as(self, other: "Identity") -> bool:
        """Whether the other's records were made with this configuration, and count for ranks like these."""
        names = {self.fingerprint, *self.fingerprints}
        return other.fingerprint in names and self.ranks_that_count in (None, other.world_size)

    @property
    def ranks_that_count(self) -> int | None:
        """The only number of ranks whose records can be used; None: any, since they are about the step."""
        return self.world_size if self.chunks_per_step is None else None


@dataclass(frozen=True, kw_only=True)
class SegmentHeader:
    """The first record of a segment."""

    identity: Identity
    first: Position
    """The segment holds no record of an earlier position."""
    start: Position
    """Where this incarnation started: the checkpoint it resumed from."""
    created: str
    lineage: Lineage
    """What it inherits, not including its own incarnation."""

    @property
    def whole_lineage(self) -> dict[int, Position | None]:
        """The lineage including its own records."""
        return {**self.lineage, self.identity.incarnation: None}


def encode_record(record: Record) -> bytes:
    """The record as a safetensors blob."""
    metadata = {
        **record.metadata,
        "kind": record.kind,
        "position": str(record.position),
        "time": record.time,
    }
    sources = {name: ArraySource(array) for name, array in record.arrays.items()}
    header, planned = lay_out(sources, metadata=metadata, alignment=_ALIGNMENT)
    return b"".join([header, *(as_bytes(record.arrays[item.name]).tobytes() for item in planned)])


def decode_record(payload: bytes) -> Record:
    """The record in a blob; ValueError says in one line why there is none."""
    try:
        header = read_header(_InMemory(payload), "the record")
    except CheckpointInvalid as error:
        raise ValueError(error.message) from None
    metadata = dict(header.metadata)
    try:
        kind, position = metadata.pop("kind"), Position.parse(metadata.pop("position"))
        time = metadata.pop("time")
    except KeyError as error:
        raise ValueError(f"the record does not say its {error.args[0]}") from None
    arrays = {
        item.name: np.frombuffer(
            payload, DTYPES[item.dtype], count=math.prod(item.shape), offset=item.begin
        ).reshape(item.shape)
        for item in header.tensors
    }
    return Record(kind, position, time, metadata, arrays)


def encode_header(header: SegmentHeader) -> bytes:
    """The first record of a segment."""
    identity = header.identity
    value = {
        "run_id": identity.run_id,
        "rank": identity.rank,
        "world_size": identity.world_size,
        "incarnation": identity.incarnation,
        "fingerprint": identity.fingerprint,
        "versions": dict(identity.versions),
        "device": identity.device,
        "chunks_per_step": identity.chunks_per_step,
        "about": dict(identity.about),
        "format": FORMAT,
        "start": str(header.start),
        "inherits": [[incarnation, str(before)] for incarnation, before in sorted(header.lineage.items())],
    }
    return encode_record(Record("segment", header.first, header.created, {"segment": strictjson.dump(value)}))


def decode_header(payload: bytes, name: SegmentName) -> SegmentHeader:
    """The header of the segment with that name; ValueError says why it is not one, or is another's."""
    record = decode_record(payload)
    if record.kind != "segment":
        raise ValueError(f"its first record is of kind {record.kind[:20]!r}")
    value = strictjson.parse(record.metadata.get("segment", "").encode())
    kinds = {"run_id": str, "rank": int, "world_size": int, "incarnation": int, "fingerprint": str}
    kinds |= {"versions": dict, "device": str, "about": dict, "start": str, "inherits": list}
    if not isinstance(value, dict):
        raise ValueError("its first record is malformed")
    version = value.pop("format", 1)
    if not is_count(version) or not 1 <= version <= FORMAT:
        raise ValueError(f"its format version is {str(version)[:20]}; the newest known here is {FORMAT}")
    chunks = value.pop("chunks_per_step", None)
    counted = chunks is None or (version > 1 and is_count(chunks) and chunks > 0)
    if not counted or {key: type(item) for key, item in value.items()} != kinds:
        raise ValueError("its first record is malformed")
    lineage: dict[int, Position | None] = {}
    for entry in value.pop("inherits"):
        if not (
            isinstance(entry, list) and len(entry) == 2 and is_count(entry[0]) and isinstance(entry[1], str)
        ):
            raise ValueError("its lineage is malformed")
        lineage[entry[0]] = Position.parse(entry[1])
    start = Position.parse(value.pop("start"))
    if not all(isinstance(item, str) for item in value["versions"].values()):
        raise ValueError("its versions are malformed")
    header = SegmentHeader(
        identity=Identity(**value, chunks_per_step=chunks),
        first=record.position,
        start=start,
        created=record.time,
        lineage=lineage,
    )
    written = SegmentName(header.identity.rank, header.identity.incarnation, header.first)
    if written != name:
        raise ValueError(f"it was written as {written.path}: files were exchanged or renamed")
    if any(incarnation >= name.incarnation for incarnation in lineage):
        raise ValueError("it inherits from later starts")
    return header


class _InMemory:
    """`ReadHandle` on bytes."""

    chunk_bytes = 1 << 20

    def __init__(self, content: bytes) -> None:
        self.size = len(content)
        self._content = content

    def read_into(self, buffer: memoryview, offset: int) -> None:
        buffer[:] = self._content[offset : offset + len(buffer)]

    def close(self) -> None:
        """Nothing to close."""

    def __enter__(self) -> ReadHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

"""The files of a journal: a segment, where in it a record is, and reading records that are looked up.

Which segments there are, and what is in them, is said by `reading`.
"""

from collections import OrderedDict
from dataclasses import dataclass
from types import TracebackType

from rollforward.errors import CheckpointInvalid, StorageError
from rollforward.storage import ReadHandle, Storage
from rollforward.storage.inorder import in_order
from rollforward.store.journal.frames import read_frame
from rollforward.store.journal.records import Record, decode_record
from rollforward.store.layout import SegmentName
from rollforward.store.unreadable import rejection

_OPEN_SEGMENTS = 8
"""One for each rank whose records take turns; in a bucket, each may hold a window of the file."""


@dataclass(frozen=True)
class Segment:
    """A segment file."""

    storage: Storage
    name: SegmentName
    size: int

    def __str__(self) -> str:
        return f"journal segment {self.name.path}"

    def open(self) -> ReadHandle:
        """To be read from its beginning to its end; StorageError."""
        return in_order(self.storage.open(self.name.path))


@dataclass(frozen=True)
class Place:
    """Where a record is."""

    segment: Segment
    offset: int
    salt: bytes


class Records:
    """Reads records one after another, mostly in the order in which they were written.

    Segments stay open meanwhile, since opening one in a bucket takes several requests.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[Segment, ReadHandle] = OrderedDict()

    def read(self, place: Place) -> Record:
        """The record at a place, verified; CheckpointInvalid says in one line why it cannot be read."""
        segment = place.segment
        try:
            if segment in self._open:
                try:
                    return _record_at(self.opened(segment), place)
                except StorageError:
                    self.forget(segment)  # replaced by a longer one, or gone: a new look tells
            return _record_at(self.opened(segment), place)
        except StorageError as error:
            self.forget(segment)
            raise rejection(error, str(segment)) from error
        except ValueError as error:
            raise CheckpointInvalid(f"{segment}, byte {place.offset}: {error}") from None

    def opened(self, segment: Segment) -> ReadHandle:
        """A segment's file; it is closed when it has not been used for long. StorageError."""
        if segment not in self._open:
            while len(self._open) >= _OPEN_SEGMENTS:
                self.forget(next(iter(self._open)))
            self._open[segment] = segment.open()
        self._open.move_to_end(segment)
        return self._open[segment]

    def close(self) -> None:
        """Close the segments. Reading goes on after that, and opens them again."""
        for segment in list(self._open):
            self.forget(segment)

    def forget(self, segment: Segment) -> None:
        """Close a segment's file. It may have been replaced: whoever reads it next opens it anew."""
        handle = self._open.pop(segment, None)
        if handle is not None:
            handle.close()

    def __enter__(self) -> "Records":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _record_at(handle: ReadHandle, place: Place) -> Record:
    return decode_record(read_frame(handle, place.offset, place.salt).payload)


def read_record(place: Place) -> Record:
    """One record; as from `Records.read`."""
    with Records() as records:
        return records.read(place)

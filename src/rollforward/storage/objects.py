"""Objects in a bucket, as a `Storage`; through obstore, which speaks to S3 and what is like it.

    runs/17/commits/0_20.json                              one file is one object
    runs/17/journal/rank_0/1-0_0.journal+0001-000...000    a file that grows: one object for each append,
    runs/17/journal/rank_0/1-0_0.journal+0001-000...312    named by its generation and where it begins

An object appears whole or not at all, and is durable when the service has acknowledged it: no temporary
names, no syncs. It cannot grow. So a file that grows is a row of objects that are never changed, and seen as
one file: `stat`, `scan` and `open` put it together up to the first gap. `rewrite` begins the next generation;
the highest one that has a beginning counts, and a plain object of the name counts before any. So a file is
removed by removing its beginnings: what a removal that died leaves of it is not a file any more. It is listed
as a temporary file, like what an interrupted write leaves on a disk, and removed with those.

Each append is a conditional put, so two writers cannot both write at the same place: the second one is
refused. The client does not repeat such a put when the connection breaks, since it may have been carried out;
it is repeated here: then the second is refused, and what is there is recognised by its content.

What is uploaded is copied first, one part at a time: the client keeps parts without copying them, and
callers reuse their buffers.

Left out: removing what an upload that died left behind in the service (a lifecycle rule of the bucket does
that), and links, which buckets do not have.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, GenericError, PreconditionError

from rollforward.errors import StorageError
from rollforward.storage.answers import broke_off, service_error
from rollforward.storage.base import Appender, Buffer, Entry, ReadHandle, check_path
from rollforward.storage.failures import settled_error

if TYPE_CHECKING:
    from obstore import GetOptions, ObjectMeta, PutMode
    from obstore.store import ObjectStore, RetryConfig

PART_BYTES = 16 << 20
"""Of an upload in several parts. A service takes 10,000 of them, so a file may have 160 GB."""
UPLOADS = 4
"""Parts of one file under way at a time: with the one being filled, what an upload takes of memory."""
RANGE_BYTES = 8 << 20
"""What one request reads."""
FRONT_BYTES = 64 << 10
"""Read when a file is opened."""
READS = 8
"""Requests under way at a time, for one `read_into`."""

T = TypeVar("T")

_PART = re.compile(r"(.+)\+(\d{4,9})-(\d{16})")
_LEFT = ".{}.00000000.tmp"
"""How the remains of a growing file are listed; named as temporary files on a disk are."""
_IS_LEFT = re.compile(r"\.(.+)\.00000000\.tmp")


@dataclass(frozen=True)
class _Object:
    """A stored object that holds a file's bytes from `start` on."""

    key: str
    start: int
    size: int
    tag: str | None


class ObjectStorage:
    """`Storage` below a prefix of a bucket. `address` is how users name it, and stands in every error.

    `retries` is what the store was made with: for what the client does not repeat by itself.
    """

    def __init__(self, store: "ObjectStore", address: str, retries: "RetryConfig | None" = None) -> None:
        self.root = address
        self._store = store
        self._retries = retries

    def __repr__(self) -> str:
        return f"ObjectStorage({self.root!r})"

    def __str__(self) -> str:
        return self.root

    def write(self, path: str, buffers: Iterable[Buffer]) -> int:
        key = self._key(path)
        size = 0

        def counted() -> Iterator[bytes]:
            nonlocal size
            for part in _parts(buffers):
                size += len(part)
                yield part

        parts = counted()
        first = list(islice(parts, 2))
        with self.asking("writing", key):
            if len(first) < 2:
                obstore.put(self._store, key, b"".join(first), use_multipart=False)
            else:
                content = chain(first, parts)
                obstore.put(self._store, key, content, chunk_size=PART_BYTES, max_concurrency=UPLOADS)
        return size

    def open(self, path: str) -> ReadHandle:
        """See `Storage.open`. The first bytes come along, which are all of a small file."""
        key = self._key(path)
        address = f"{self.root}/{key}"
        with self.asking("opening", key):
            try:
                got = obstore.get(self._store, key, options={"range": (0, FRONT_BYTES)})
                whole = _Object(key, 0, got.meta["size"], got.meta["e_tag"])
                return _Handle(self, address, [whole], bytes(got.bytes()))
            except FileNotFoundError as error:
                objects = _newest_row(self._parts_of(key))
                if not objects:
                    raise service_error("opening", address, error) from error
            except GenericError:
                objects = self._objects(key)  # there is no first byte of an empty file
        return _Handle(self, address, objects, b"")

    def appender(self, path: str) -> Appender:
        key = self._key(path)
        if self.stat(path) is not None:
            raise settled_error(
                f"creating {self.root}/{key}: the name is taken",
                hint="another trainer writes to this run: stop one of them",
            )
        return _Appender(self, key, _following(self._parts_of(key)), 0)

    def rewrite(self, path: str, buffers: Iterable[Buffer]) -> Appender:
        key = self._key(path)
        before = self._parts_of(key)
        generation = _following(before)
        content = b"".join(_parts(buffers))
        self.create(_part_key(key, generation, 0), content)
        self._remove([key, *(part.key for _, part in before)])
        # An object cannot grow, an empty one neither: what is appended to it begins a generation of its own.
        return _Appender(self, key, generation if content else generation + 1, len(content))

    def stat(self, path: str) -> Entry | None:
        key = self._key(path)
        name = key.rpartition("/")[2]
        objects = self._objects(key)
        if objects:
            return Entry(name, "file", _end(objects))
        with self.asking("looking at", key):
            below = next(iter(obstore.list(self._store, key, chunk_size=1)), None)
        return Entry(name, "folder", 0) if below else None

    def scan(self, folder: str) -> list[Entry]:
        key = self._key(folder) if folder else ""
        with self.asking("listing", key):
            found = obstore.list_with_delimiter(self._store, key or None)
        folders = (prefix.rpartition("/")[2] for prefix in found["common_prefixes"])
        entries = {name: Entry(name, "folder", 0) for name in folders}
        # A marker that some services keep of a folder whose files are gone is not a file in it.
        files = _files(each for each in found["objects"] if each["path"] != key)
        entries |= {entry.name: entry for entry in files.values()}
        return sorted(entries.values(), key=lambda entry: entry.name)

    def walk(self, folder: str) -> dict[str, Entry]:
        """Path -> entry of every file below a folder, however deep: a request for each thousand of them."""
        key = self._key(folder)
        with self.asking("listing", key):
            return _files(each for page in obstore.list(self._store, key, chunk_size=1000) for each in page)

    def remove(self, path: str) -> None:
        """See `Storage.remove`. The beginnings go first, the one that counts last: it is gone at once."""
        key = self._key(path)
        folder, name = key[: key.rfind("/") + 1], key.rpartition("/")[2]
        removed_before = _IS_LEFT.fullmatch(name)
        if removed_before:
            key = folder + removed_before[1]
        parts = sorted(self._parts_of(key), key=lambda each: (each[1].start > 0, each[0], each[1].start))
        if removed_before and _newest_row(parts):
            return  # a new file of that name: its leftovers are its own
        self._remove([part.key for _, part in parts])
        if not removed_before:
            self._remove([key])

    def sync_file(self, path: str) -> None:
        """Nothing to do: what is there is durable. StorageError when it is not there."""
        self.open(path).close()

    def sync_folder(self, path: str) -> None:
        """Nothing to do: a request that was answered is durable."""

    def read_tagged(self, path: str) -> tuple[bytes, str] | None:
        return self._read_tagged(self._key(path))

    def put_if(self, path: str, content: bytes, tag: str | None) -> str | None:
        return self._put_if(self._key(path), content, tag)

    def _read_tagged(self, key: str) -> tuple[bytes, str] | None:
        with self.asking("reading", key):
            try:
                got = obstore.get(self._store, key)
                return bytes(got.bytes()), got.meta["e_tag"] or ""
            except FileNotFoundError as error:
                self._check_bucket(error)
                return None

    def _put_if(self, key: str, content: bytes, tag: str | None) -> str | None:
        mode: PutMode = "create" if tag is None else {"e_tag": tag}
        with self.asking("writing", key):
            try:
                put = partial(obstore.put, self._store, key, content, mode=mode, use_multipart=False)
                return self._repeated(put)["e_tag"] or ""
            except (AlreadyExistsError, PreconditionError, FileNotFoundError) as error:
                self._check_bucket(error)
        there = self._read_tagged(key)
        return there[1] if there is not None and there[0] == content else None

    def _check_bucket(self, error: Exception) -> None:
        """What is missing must be the object: raises the error again when it is the bucket."""
        if "NoSuchBucket" in str(error):
            raise error

    def _key(self, path: str) -> str:
        try:
            check_path(path)
        except ValueError as error:
            raise StorageError(
                f"refusing a path that leaves {self.root}: {error}",
                hint="a file of this run was edited or is damaged: names in it must stay inside the folder",
            ) from error
        if _PART.fullmatch(path):
            raise StorageError(
                f"refusing {path!r} in {self.root}: names that end like this are for pieces of growing files",
                hint="give the file another name",
            )
        return path

    def _objects(self, key: str) -> list[_Object]:
        """What holds the file's bytes, in order; empty when there is no such file."""
        with self.asking("looking at", key):
            try:
                found = obstore.head(self._store, key)
            except FileNotFoundError:
                found = None
        if found is None:
            return _newest_row(self._parts_of(key))
        return [_Object(key, 0, found["size"], found["e_tag"])]

    def _parts_of(self, key: str) -> list[tuple[int, _Object]]:
        """(generation, object) of each part of a growing file, whether they belong together or not."""
        folder, _, _ = key.rpartition("/")
        found: list[tuple[int, _Object]] = []
        with self.asking("looking at", key):
            # Names in order, beginning where the parts would: the first other name ends it.
            for page in obstore.list(self._store, folder or None, offset=f"{key}+", chunk_size=1000):
                for each in page:
                    if not each["path"].startswith(f"{key}+"):
                        return found
                    part = _as_part(each["path"], each["size"], each["e_tag"])
                    if part is not None and part[0] == key:
                        found.append(part[1:])
        return found

    def create(self, key: str, content: bytes) -> None:
        """An object that was not there before; one of the same content is taken for ours."""
        if self._put_if(key, content, None) is None:
            raise settled_error(
                f"appending to {self.root}/{key}: another writer was here first",
                hint="another trainer writes to this run: stop one of them",
            )

    def _remove(self, keys: Iterable[str]) -> None:
        for key in keys:
            with self.asking("removing", key), suppress(FileNotFoundError):
                self._repeated(partial(obstore.delete, self._store, key))

    def _repeated(self, request: Callable[[], T]) -> T:
        """Its answer. Repeated, as the client does it, when the connection breaks: twice does not differ from
        once, or is refused."""
        pauses = _pauses(self._retries)
        while True:
            try:
                return request()
            except GenericError as error:
                pause = next(pauses, None)
                if pause is None or not broke_off(error):
                    raise
                time.sleep(pause)

    def read(self, source: _Object, into: memoryview, offset: int) -> None:
        """Fill the buffer from the object's `offset`."""
        options: GetOptions = {"range": (offset, offset + len(into))}
        if source.tag is not None:
            options["if_match"] = source.tag
        with self.asking("reading", source.key):
            content = memoryview(obstore.get(self._store, source.key, options=options).bytes())
        if len(content) != len(into):
            raise StorageError(
                f"reading {self.root}/{source.key}: {len(content)} bytes came, {len(into)} were asked for",
                hint="try again; if it stays, the service has damaged the object",
            )
        into[:] = content

    @contextmanager
    def asking(self, operation: str, key: str) -> Iterator[None]:
        """Around a request: what the client raises becomes a StorageError."""
        try:
            yield
        except (FileNotFoundError, BaseError) as error:
            raise service_error(operation, f"{self.root}/{key}" if key else self.root, error) from error


class _Handle:
    """`ReadHandle` on the objects that hold a file. Fails if one of them is replaced after it was opened."""

    chunk_bytes = 4 * RANGE_BYTES
    """A request takes its time whatever it asks for: so few, and several under way."""

    def __init__(
        self, storage: ObjectStorage, address: str, objects: Sequence[_Object], front: bytes
    ) -> None:
        self.size = _end(objects)
        self._front = front
        self._storage = storage
        self._address = address
        self._objects = objects

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """See `ReadHandle.read_into`. Large ranges are read several at a time, straight into place."""
        target = buffer.cast("B")
        if offset + len(target) > self.size:
            raise StorageError(
                f"reading {self._address}: the file ends at byte {self.size}, "
                f"{offset + len(target) - self.size} bytes too early",
                hint="the file was cut short; an older checkpoint may still be whole",
            )
        if offset + len(target) <= len(self._front):
            target[:] = self._front[offset : offset + len(target)]
            return
        requests = list(self._requests(offset, offset + len(target)))

        def ask(request: tuple[_Object, int, int]) -> None:
            source, begin, end = request
            self._storage.read(source, target[begin - offset : end - offset], begin - source.start)

        if len(requests) == 1:
            ask(requests[0])
        elif requests:
            with ThreadPoolExecutor(min(READS, len(requests))) as pool:
                for done in [pool.submit(ask, each) for each in requests]:
                    done.result()

    def _requests(self, begin: int, end: int) -> Iterator[tuple[_Object, int, int]]:
        """(object, begin, end), in bytes of the file."""
        for source in self._objects:
            first, last = max(begin, source.start), min(end, source.start + source.size)
            for start in range(first, last, RANGE_BYTES):
                yield source, start, min(start + RANGE_BYTES, last)

    def close(self) -> None:
        """Nothing is held."""

    def __enter__(self) -> "_Handle":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Appender:
    """`Appender`: each sync is one new object, written only if nobody else wrote there.

    What was written and not synced is in the memory of this process, and lost with it.
    """

    def __init__(self, storage: ObjectStorage, key: str, generation: int, size: int) -> None:
        self.size = size
        self._storage = storage
        self._key = key
        self._generation = generation
        self._unsynced = bytearray()
        self._ended = False

    def append(self, buffers: Iterable[Buffer]) -> None:
        self.write(buffers)
        self.sync()

    def write(self, buffers: Iterable[Buffer]) -> None:
        self._check()
        for buffer in buffers:
            self._unsynced += buffer

    def sync(self) -> None:
        self._check()
        if not self._unsynced:
            return
        self._ended = True  # unless it goes well: after an error it is unknown what the service has
        self._storage.create(_part_key(self._key, self._generation, self.size), bytes(self._unsynced))
        self._ended = False
        self.size += len(self._unsynced)
        self._unsynced.clear()

    def close(self) -> None:
        self._ended = True

    def _check(self) -> None:
        if self._ended:
            raise StorageError(
                f"appending to {self._storage.root}/{self._key}: an earlier append failed or it was closed",
                hint="see the first error; resuming begins a new file",
            )


def _pauses(retries: "RetryConfig | None") -> Iterator[float]:
    """Seconds to wait before each further try; it ends when there has been enough of that."""
    if retries is None:
        return
    backoff, limit = retries["backoff"], time.monotonic() + retries["retry_timeout"].total_seconds()
    longest, pause = (backoff[name].total_seconds() for name in ("max_backoff", "init_backoff"))
    for _ in range(retries["max_retries"]):
        if time.monotonic() >= limit:
            return
        yield pause
        pause = min(pause * backoff["base"], longest)


def _files(objects: Iterable["ObjectMeta"]) -> dict[str, Entry]:
    """Path -> entry of the files that these objects hold; files that grow need all of theirs."""
    plain: dict[str, Entry] = {}
    growing: dict[str, list[tuple[int, _Object]]] = {}
    for each in objects:
        part = _as_part(each["path"], each["size"], each["e_tag"])
        if part is None:
            plain[each["path"]] = Entry(each["path"].rpartition("/")[2], "file", each["size"])
        else:
            growing.setdefault(part[0], []).append(part[1:])
    found: dict[str, Entry] = {}
    for path, parts in growing.items():
        folder, name = path[: path.rfind("/") + 1], path.rpartition("/")[2]
        if row := _newest_row(parts):
            found[path] = Entry(name, "file", _end(row))
        elif path not in plain:
            left = _LEFT.format(name)
            found[folder + left] = Entry(left, "file", sum(part.size for _, part in parts))
    return found | plain


def _parts(buffers: Iterable[Buffer]) -> Iterator[bytes]:
    """The bytes, in copies of `PART_BYTES`; the last is shorter, and none is empty."""
    part = bytearray()
    for buffer in buffers:
        left = memoryview(buffer).cast("B")
        while left.nbytes:
            taken = min(left.nbytes, PART_BYTES - len(part))
            part += left[:taken]
            left = left[taken:]
            if len(part) == PART_BYTES:
                yield bytes(part)
                part.clear()
    if part:
        yield bytes(part)


def _part_key(key: str, generation: int, start: int) -> str:
    return f"{key}+{generation:04d}-{start:016d}"


def _as_part(key: str, size: int, tag: str | None) -> tuple[str, int, _Object] | None:
    """(file, generation, object) when the name is that of a part of a growing file."""
    named = _PART.fullmatch(key)
    if named is None:
        return None
    return named[1], int(named[2]), _Object(key, int(named[3]), size, tag)


def _following(parts: Iterable[tuple[int, _Object]]) -> int:
    """A generation that no part has, not even one that is left of a removed file."""
    return max((number for number, _ in parts), default=0) + 1


def _newest_row(parts: Iterable[tuple[int, _Object]]) -> list[_Object]:
    """The objects of the highest generation that has a beginning, up to the first gap."""
    rows: dict[int, dict[int, _Object]] = {}
    for generation, part in parts:
        rows.setdefault(generation, {})[part.start] = part
    begun = [generation for generation, row in rows.items() if 0 in row]
    found: list[_Object] = []
    if begun:
        row = rows[max(begun)]
        while _end(found) in row:
            found.append(row.pop(_end(found)))
    return found


def _end(objects: Sequence[_Object]) -> int:
    return objects[-1].start + objects[-1].size if objects else 0

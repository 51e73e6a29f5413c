"""A bucket in memory that behaves as a service and a network may at their worst, and remembers every change.

It stands below `ObjectStorage`, in the place of obstore's functions and stores (`instead_of_obstore`), so the
production code runs on it unchanged. What becomes of a request is its fate:

    done     carried out, and answered
    fails    not carried out; the client gives up with an error
    lost     carried out, but the answer never comes: the client gives up with an error
    twice    carried out, the answer is lost, and the client's retry is carried out too: its answer counts
    late     the client gives up with an error; it is carried out some requests later, whoever lives by then

Reads can only fail. Conditional puts hold as S3 has them: of two, the second is refused, its own retry too.
Listings may lag (`lag`): they show the bucket as it was so many changes ago. Reads of one object never do.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from obstore.exceptions import AlreadyExistsError, BaseError, GenericError, PreconditionError
from simulated_disk import Killed

from rollforward.storage import objects

Fate = Literal["done", "fails", "lost", "twice", "late"]
FATES: tuple[Fate, ...] = ("fails", "lost", "twice", "late")

Objects = dict[str, bytes]


@dataclass(frozen=True)
class Change:
    """An object that was put or deleted (content None), or a note of the test's (no key)."""

    key: str = ""
    content: bytes | None = None
    note: Any = None


class SimulatedBucket:
    """Objects in memory; a store for `ObjectStorage` while `instead_of_obstore` holds."""

    def __init__(self, content: Objects | None = None) -> None:
        self.objects: Objects = dict(content or {})
        self.log: list[Change] = []
        self.asked: list[tuple[str, str]] = []
        """Every request so far: what, and which key or prefix."""
        self.fate: Callable[[str, str], Fate] = lambda _what, _key: "done"
        self.delay: Callable[[], int] = lambda: 5
        """In how many requests a late one is carried out."""
        self.switch: Callable[[], None] = lambda: None
        self.kill_after: int | None = None
        """Requests after which the process is gone."""
        self.lag = 0
        self._tags = dict.fromkeys(self.objects, 0)
        self._first = dict(self.objects)
        self._late: list[tuple[int, Callable[[], object]]] = []

    def mark(self, note: Any) -> None:
        """Put a note of the test's into the log."""
        self.log.append(Change(note=note))

    def land(self) -> None:
        """Carry out all that is late."""
        late, self._late = self._late, []
        for _, change in late:
            _try(change)

    # What obstore has, as far as ObjectStorage asks for it

    def put(
        self, key: str, content: bytes | Iterable[bytes], *, mode: Any = "overwrite", **_options: Any
    ) -> dict[str, Any]:
        whole = content if isinstance(content, bytes) else b"".join(content)

        def change() -> dict[str, Any]:
            if mode == "create" and key in self.objects:
                raise AlreadyExistsError(f"Object at location {key} already exists")
            if isinstance(mode, dict) and mode["e_tag"] != self._tag(key):
                raise PreconditionError(f"Request precondition failure for path {key}")
            self._did(Change(key, whole))
            return {"e_tag": self._tag(key), "version": None}

        return self._request("put", key, change)

    def delete(self, key: str) -> None:
        def change() -> None:
            if key in self.objects:
                self._did(Change(key))

        self._request("delete", key, change)

    def head(self, key: str) -> dict[str, Any]:
        self._look("head", key)
        return self._meta(key, self._content(key))

    def get(self, key: str, options: Any = None) -> "_Got":
        self._look("get", key)
        content = self._content(key)
        if options and "if_match" in options and options["if_match"] != self._tag(key):
            raise PreconditionError(f"Request precondition failure for path {key}")
        begin, end = (options or {}).get("range", (0, max(len(content), 1)))
        if begin >= len(content) and (options or {}).get("range"):
            raise GenericError("Generic S3 error: Range started at or after the end of the object")
        return _Got(self._meta(key, content), content[begin:end])

    def list(
        self, prefix: str | None = None, *, offset: str = "", chunk_size: int = 50
    ) -> Iterator[list[dict[str, Any]]]:
        self._look("list", prefix or "")
        shown = self._shown()
        keys = sorted(key for key in shown if key.startswith(_folder(prefix)) and key > offset)
        for begin in range(0, len(keys), chunk_size):
            yield [self._meta(key, shown[key]) for key in keys[begin : begin + chunk_size]]

    def list_with_delimiter(self, prefix: str | None = None) -> dict[str, Any]:
        self._look("list", prefix or "")
        front, folders, files = _folder(prefix), set[str](), []
        for key, content in sorted(self._shown().items()):
            if key.startswith(front):
                name, slash, _ = key.removeprefix(front).partition("/")
                if slash:
                    folders.add(front + name)
                else:
                    files.append(self._meta(key, content))
        return {"common_prefixes": sorted(folders), "objects": files}

    # Inside

    def _request(self, what: str, key: str, change: Callable[[], Any]) -> Any:
        fate = self._before(what, key)
        if fate == "fails":
            raise GenericError("Generic S3 error: error sending request")
        if fate == "late":
            self._late.append((len(self.asked) + self.delay(), change))
            raise GenericError("Generic S3 error: error sending request: operation timed out")
        answer = change()
        if fate == "twice":
            answer = change()
        self.switch()
        if fate == "lost":
            raise GenericError("Generic S3 error: error sending request: connection closed")
        return answer

    def _look(self, what: str, key: str) -> None:
        if self._before(what, key) != "done":
            raise GenericError("Generic S3 error: error sending request")

    def _before(self, what: str, key: str) -> Fate:
        if self.kill_after is not None and len(self.asked) >= self.kill_after:
            raise Killed
        self.asked.append((what, key))
        due = [change for when, change in self._late if when <= len(self.asked)]
        self._late = [late for late in self._late if late[0] > len(self.asked)]
        for change in due:
            _try(change)
        return self.fate(what, key)

    def _did(self, change: Change) -> None:
        self.log.append(change)
        apply(self.objects, change)
        self._tags[change.key] = self._tags.get(change.key, 0) + 1

    def _content(self, key: str) -> bytes:
        if key not in self.objects:
            raise FileNotFoundError(f"Object at location {key} not found")
        return self.objects[key]

    def _tag(self, key: str) -> str:
        return f"{self._tags[key]}" if key in self.objects else ""

    def _meta(self, key: str, content: bytes) -> dict[str, Any]:
        return {"path": key, "size": len(content), "e_tag": self._tag(key), "version": None}

    def _shown(self) -> Objects:
        """What a listing shows."""
        if not self.lag:
            return self.objects
        changes = [change for change in self.log if change.key]
        shown = dict(self._first)
        for change in changes[: -self.lag]:
            apply(shown, change)
        return shown


@dataclass(frozen=True)
class _Got:
    meta: dict[str, Any]
    content: bytes

    def bytes(self) -> bytes:
        return self.content


class _Functions:
    """The functions of obstore that `ObjectStorage` calls, for a `SimulatedBucket`."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda store, *arguments, **options: getattr(store, name)(*arguments, **options)


def instead_of_obstore(patch: pytest.MonkeyPatch) -> None:
    """Until the patch is undone, `ObjectStorage` asks a `SimulatedBucket`."""
    patch.setattr(objects, "obstore", _Functions())


def apply(content: Objects, change: Change) -> None:
    """Do a change again, to a copy."""
    if change.content is None:
        content.pop(change.key, None)
    else:
        content[change.key] = change.content


def _try(change: Callable[[], object]) -> None:
    """Nobody hears of the answer."""
    try:
        change()
    except BaseError:
        return


def _folder(prefix: str | None) -> str:
    return f"{prefix}/" if prefix else ""

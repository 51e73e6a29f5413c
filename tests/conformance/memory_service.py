"""A service in the memory of the test's process: `s3://` addresses lead to it, by the real client."""

import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
from obstore.store import MemoryStore

from rollforward.errors import StorageError
from rollforward.storage import address
from rollforward.storage.objects import ObjectStorage


class Service:
    """Its places, by address; it can be away."""

    def __init__(self) -> None:
        self.stores: dict[str, MemoryStore] = {}
        self.away = False
        self.asked: Counter[str] = Counter()
        """How often it was asked for what."""
        self.askers: set[str] = set()
        """The threads that asked it."""
        self.given: list[Mapping[str, str]] = []
        """The options that storages were opened with."""

    def at(self, where: str) -> ObjectStorage:
        return _Storage(self, self.stores.setdefault(where, MemoryStore()), where)

    def open(self, bucket: str, prefix: str, options: Mapping[str, str]) -> ObjectStorage:
        self.given.append(options)
        return self.at(f"s3://{bucket}/{prefix}")


class _Storage(ObjectStorage):
    def __init__(self, service: Service, store: MemoryStore, where: str) -> None:
        super().__init__(store, where)
        self._service = service

    def asking(self, operation: str, key: str) -> Any:
        self._service.asked[operation] += 1
        self._service.askers.add(threading.current_thread().name)
        if self._service.away:
            raise StorageError(f"{operation} {self.root}/{key}: the service is away")
        return super().asking(operation, key)


def serve(monkeypatch: pytest.MonkeyPatch) -> Service:
    """Every `s3://` address leads to the service that this returns, while the test runs."""
    service = Service()
    monkeypatch.setattr(address, "_bucket", service.open)
    return service

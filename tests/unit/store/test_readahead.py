"""What a start reads ahead is what it will restore; what is wrong with it is told when it is restored."""

from pathlib import Path

import pytest
from toy_session import Place

from rollforward.storage import LocalStorage, ReadHandle
from rollforward.store import find
from rollforward.store.readahead import read_ahead


class Noting(LocalStorage):
    """Notes which files are read to their end."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.read: list[str] = []

    def open(self, path: str) -> ReadHandle:
        handle = super().open(path)
        read_into = handle.read_into

        def noting(buffer: memoryview, offset: int) -> None:
            read_into(buffer, offset)
            if offset + len(buffer) == handle.size:
                self.read.append(path)

        handle.read_into = noting  # type: ignore[method-assign]
        return handle


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = Place(tmp_path_factory.mktemp("run"))
    place.train("run", rl_config__max_steps=2)
    return place.root / "run"


def test_every_tensor_file_is_read_to_its_end(run: Path) -> None:
    storage, manifest = Noting(run), find(LocalStorage(run)).manifest
    read_ahead(storage, manifest, near=0).join()
    assert sorted(storage.read) == sorted(file.path for file in manifest.files)


def test_a_file_that_is_gone_keeps_it_from_none_of_the_others(run: Path) -> None:
    storage, manifest = Noting(run), find(LocalStorage(run)).manifest
    first, *others = [file.path for file in manifest.files]
    (run / first).rename(run / "away")
    read_ahead(storage, manifest, near=0).join()
    (run / "away").rename(run / first)
    assert sorted(storage.read) == sorted(others)

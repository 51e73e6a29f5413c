"""One server of each kind for the session; each test has an address of its own in its bucket."""

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from gateway import Gateway
from servers import BUCKET, SECRET, USER, SeaweedFS, moto


def settings(url: str, **others: str) -> dict[str, str]:
    """The environment in which `open_storage` finds the server."""
    return {
        "AWS_ACCESS_KEY_ID": USER,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url,
    } | others


@pytest.fixture(scope="session")
def moto_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with moto(tmp_path_factory.mktemp("moto") / "log") as url:
        yield url


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    server = SeaweedFS(Path(tmp_path_factory.mktemp("seaweed")))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def own_server(tmp_path: Path, use) -> Iterator[SeaweedFS]:
    """One that a test may kill or change; the environment leads to it."""
    server = SeaweedFS(tmp_path / "server")
    server.start()
    use(server.url)
    yield server
    server.stop()


@pytest.fixture
def gateway(seaweed: SeaweedFS, use) -> Iterator[Gateway]:
    """A way to the server that the test may obstruct; the environment leads there."""
    with Gateway(seaweed.url).open() as opened:
        use(opened.url)
        yield opened


@pytest.fixture
def address() -> str:
    """A place in the bucket that nothing else uses."""
    return f"s3://{BUCKET}/{secrets.token_hex(4)}/run"


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch):
    """Makes this process and those that it starts talk to a server."""

    def set_environment(url: str, **others: str) -> None:
        for name, value in settings(url, **others).items():
            monkeypatch.setenv(name, value)

    return set_environment

"""The served page's data: for this machine only, nothing but two addresses, and only what is new."""

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rollforward
from rollforward.errors import ConfigError
from rollforward.inspection.report import sampling, serving
from rollforward.inspection.report.gathering import Parts, about, readers_of
from rollforward.inspection.report.serving import Following, Server


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A loop's run of three steps."""
    train(tmp_path / "run", 3)
    return tmp_path / "run"


def train(folder: Path, steps: int) -> None:
    tensors = {"policy": {"w": np.zeros(2, dtype=np.float32)}}
    with rollforward.open_run(folder, log=lambda _: None) as loop:
        start = loop.restore(tensors)
        for step in range(start.step if start else 0, steps):
            with loop.updating(step):
                tensors["policy"]["w"] += 1
            loop.outcome(step, loss=float(step))
            loop.metrics(step, reward=float(step))
            loop.checkpoint(step + 1, tensors)


@pytest.fixture
def server(run: Path) -> Iterator[Server]:
    readers = readers_of([run])
    with Server(readers, about(readers), port=0, language="en") as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def ask(
    server: Server, path: str, *, method: str = "GET", host: str | None = "127.0.0.1"
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=300)
    connection.putrequest(method, path, skip_host=True)
    if host is not None:
        connection.putheader("Host", host)
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.read()


def data(server: Server, query: str = "") -> dict[str, Any]:
    code, content = ask(server, f"/data{query}")
    assert code == 200
    found: dict[str, Any] = json.loads(content)
    return found


def test_it_listens_on_this_machine_alone(server: Server) -> None:
    assert server.server_address[0] == "127.0.0.1"
    others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)} - {
        "127.0.0.1"
    }
    for address in others:
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((address, server.server_address[1]), timeout=5)


@pytest.mark.parametrize(
    "host", [None, "", "evil.example", "evil.example:7474", "127.0.0.1.evil.example", "[::1]"]
)
def test_a_foreign_host_is_refused(server: Server, host: str | None) -> None:
    code, content = ask(server, "/data", host=host)
    assert (code, content) == (403, b"this page is for this machine only\n")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST:9999"])
def test_this_machine_is_answered_also_through_a_forwarded_port(server: Server, host: str) -> None:
    assert ask(server, "/data", host=host)[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/metrics.jsonl",
        "/run.lock",
        "/../run/metrics.jsonl",
        "/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/data/../metrics.jsonl",
        "/data/",
        "/commits/0_3.json",
        "http://127.0.0.1/run.lock",
    ],
)
def test_no_path_leads_to_a_file(server: Server, path: str) -> None:
    assert ask(server, path) == (404, b"there is / and there is /data\n")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS"])
def test_nothing_but_get_is_answered(server: Server, method: str) -> None:
    assert ask(server, "/data", method=method)[0] == 501


def test_only_what_is_new_is_sent(server: Server) -> None:
    first = data(server)
    assert set(first["names"]) == set(first["parts"])
    query = f"?session={first['session']}&after={first['after']}"
    assert data(server, query)["parts"] == {}
    assert data(server, "?session=other&after=1000")["parts"] == first["parts"], "another server's number"
    for odd in (
        "?after=x",
        "?after=-1",
        f"?session={first['session']}&after=" + "9" * 30,
        "?&&=&",
        "?after=%00",
    ):
        assert data(server, odd)["parts"] == first["parts"]


def test_a_reading_replaces_what_changed_and_drops_what_is_gone(run: Path) -> None:
    clock = 0.0
    following = Following(readers_of([run]))
    following.read_what_is_due(lambda: clock)
    before = following.after(0)
    train(run, 5)
    following.read_what_is_due(lambda: clock)
    assert following.after(before["after"])["parts"] == {}, "it is not read again before its time"
    clock += 3.0
    following.read_what_is_due(lambda: clock)
    news = following.after(before["after"])
    assert set(news["parts"]) == {"0/curves", "0/timeline", "0/rollouts"}, "health is read once a minute"
    assert news["parts"]["0/curves"]["charts"][0]["step"] == [0, 1, 2, 3, 4]
    (run / "journal").rename(run / "gone")
    clock += 3.0
    following.read_what_is_due(lambda: clock)
    assert following.after(news["after"])["parts"]["0/timeline"]["starts"]


def test_what_takes_long_to_read_is_read_seldom(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    (reader,) = readers_of([run])
    read = reader.curves

    def curves() -> Parts:
        clock[0] += 5.0
        return read()

    monkeypatch.setattr(reader, "curves", curves)
    following = Following([reader])
    assert following.read_what_is_due(lambda: clock[0]) == pytest.approx(2.0), "the journal is due first"
    assert [reading.due for reading in following._readings] == [105.0, 7.0, 65.0]


def test_a_fault_while_reading_ends_the_server(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that says that it follows a run, and does not, would be worse than none."""
    monkeypatch.setitem(serving._PAUSE, "past", 0.01)
    (reader,) = readers_of([run])
    with Server([reader], about([reader]), port=0, language="en") as server:
        monkeypatch.setattr(sampling, "as_json", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            server.serve()


def test_a_port_that_is_taken_is_reported(server: Server, run: Path) -> None:
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:\d+: Address already in use"):
        Server(readers_of([run]), {}, port=server.server_address[1], language="en")
    assert serving.PORT == 7474

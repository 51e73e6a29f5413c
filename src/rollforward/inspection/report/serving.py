"""The page on 127.0.0.1, following runs that may be under way.

Two addresses: `/`, the page; `/data?session=S&after=N`, the parts that changed after number N. Everything
else is 404, and no part of an address is ever used as a name of a file. Only requests whose Host is this
machine's own are answered: a page of another site that has its name point to 127.0.0.1 reads nothing.

The runs are read by one thread, each part at a pace of its own: at least `_PAUSE` seconds, and twenty times
as long as the last reading of it took, so that following a large run takes a twentieth of a core. Requests
are answered from memory.
"""

import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from rollforward.errors import ConfigError
from rollforward.inspection.report.gathering import Parts, RunReader, encode
from rollforward.inspection.report.page import make_page, policy
from rollforward.store.digests import digest

PORT = 7474
_HOSTS = frozenset({"127.0.0.1", "localhost"})
_PAUSE = {"curves": 2.0, "past": 2.0, "health": 60.0}
"""Seconds between two readings, at least."""
_SHARE = 20


@dataclass
class _Reading:
    """One kind of part of one run."""

    prefix: str
    """Of the names of its parts."""
    read: Callable[[], Parts]
    pause: float
    """Seconds until it is read again, at least."""
    due: float = 0.0
    names: set[str] = field(default_factory=set)
    """Of what was read last."""


class Following:
    """The parts of some runs as they were last read, each with the number of the change that made it."""

    def __init__(self, readers: Sequence[RunReader]) -> None:
        self.session = secrets.token_hex(8)
        self._parts: dict[str, tuple[int, str, Any]] = {}
        """Name -> number of the change, digest, value."""
        self._change = 0
        self._lock = threading.Lock()
        self._readings = [
            _Reading(f"{number}/", read, _PAUSE[read.__name__])
            for number, reader in enumerate(readers)
            for read in (reader.curves, reader.past, reader.health)
        ]

    def read_what_is_due(self, now: Callable[[], float] = time.monotonic) -> float:
        """Read the parts whose time has come; returns the seconds until the next one's."""
        for reading in self._readings:
            began = now()
            if reading.due <= began:
                self._take(reading, {reading.prefix + name: value for name, value in reading.read().items()})
                ended = now()
                reading.due = ended + max(reading.pause, _SHARE * (ended - began))
        return max(0.0, min(reading.due for reading in self._readings) - now())

    def after(self, change: int) -> dict[str, Any]:
        """What changed after a change: the newest number, the names of all parts, the values of new ones."""
        with self._lock:
            return {
                "session": self.session,
                "after": self._change,
                "names": list(self._parts),
                "parts": {name: value for name, (at, _, value) in self._parts.items() if at > change},
            }

    def _take(self, reading: _Reading, parts: Mapping[str, Any]) -> None:
        digests = {name: digest(encode(value)) for name, value in parts.items()}
        with self._lock:
            for name in reading.names - parts.keys():
                del self._parts[name]
            reading.names = set(parts)
            for name, value in parts.items():
                if name not in self._parts or self._parts[name][1] != digests[name]:
                    self._change += 1
                    self._parts[name] = self._change, digests[name], value


class Server(ThreadingHTTPServer):
    """Answers on 127.0.0.1 until it is closed; reads the runs meanwhile."""

    daemon_threads = True

    def __init__(
        self, readers: Sequence[RunReader], about: Mapping[str, Any], *, port: int, language: str
    ) -> None:
        """`about`: what a page says of itself and its runs. ConfigError when the port is taken."""
        self.following = Following(readers)
        self._about, self._language = dict(about), language
        self._closing = threading.Event()
        self._failure: Exception | None = None
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise ConfigError(
                f"127.0.0.1:{port}: {error.strerror or error}", hint="--port 0 takes any free port"
            ) from error
        self.following.read_what_is_due()
        threading.Thread(target=self._follow, name="report", daemon=True).start()

    @property
    def address(self) -> str:
        """What to open in a browser."""
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def page(self) -> bytes:
        """The page, with everything that is known now."""
        return make_page(self._about | self.following.after(0), language=self._language, live=True)

    def serve(self) -> None:
        """Answer until the server is closed; raises what has ended the reading of the runs."""
        self.serve_forever()
        if self._failure is not None:
            raise self._failure

    def server_close(self) -> None:
        """Stop reading and answering."""
        self._closing.set()
        super().server_close()

    def _follow(self) -> None:
        try:
            while not self._closing.wait(self.following.read_what_is_due()):
                pass
        except Exception as error:
            self._failure = error
            self.shutdown()


class _Handler(BaseHTTPRequestHandler):
    server: Server
    server_version, sys_version = "rollforward", ""

    def do_GET(self) -> None:
        if self.headers.get("Host", "").partition(":")[0].lower() not in _HOSTS:
            self._answer(403, "text/plain", b"this page is for this machine only\n")
            return
        address = urlsplit(self.path)
        if address.path == "/":
            self._answer(200, "text/html; charset=utf-8", self.server.page(), policy(live=True))
        elif address.path == "/data":
            self._answer(200, "application/json", encode(self._news(parse_qs(address.query))))
        else:
            self._answer(404, "text/plain", b"there is / and there is /data\n")

    def _news(self, query: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        following, after = self.server.following, query.get("after", ["0"])[0]
        same = query.get("session") == [following.session] and after.isascii() and after.isdigit()
        return following.after(int(after) if same and len(after) < 19 else 0)

    def _answer(self, code: int, kind: str, content: bytes, allowed: str = "default-src 'none'") -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Security-Policy", f"{allowed}; frame-ancestors 'none'")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        self.send_header("Referrer-Policy", "no-referrer")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Requests are not logged."""

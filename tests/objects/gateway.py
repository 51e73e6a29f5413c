"""A way to a server that a test can obstruct: a proxy that answers for it, or holds it up.

Requests go on as they were signed, since the host that they name stays the proxy's.
"""

import http.client
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

_OF_THE_WAY = {"connection", "keep-alive", "transfer-encoding"}


@dataclass(frozen=True)
class Answer:
    """An answer as S3 gives it when something is wrong."""

    status: int
    code: str
    message: str = "as the test has it"

    @property
    def body(self) -> bytes:
        return f"<Error><Code>{self.code}</Code><Message>{self.message}</Message></Error>".encode()


class Reset(ConnectionResetError):
    """The connection is torn down, as by a machine between that has lost it: the client does not know why."""


Obstruct = Callable[[str, str], Answer | None]
"""Of a request's method and path: an answer in place of the server's, or None. It may wait."""


def nothing(_method: str, _path: str) -> Answer | None:
    """Every request goes on."""
    return None


def away(_method: str, _path: str) -> Answer | None:
    """As if the server had just died: the connection ends without an answer."""
    raise ConnectionAbortedError


def refusing_writes(answer: Answer) -> Obstruct:
    """Nothing new is taken. What is there can be read and removed, which is a POST."""
    return lambda method, _path: answer if method == "PUT" else None


class _Server(ThreadingHTTPServer):
    def shutdown_request(self, request: Any) -> None:
        """Without a farewell, which what is torn down does not have."""
        self.close_request(request)


class Gateway:
    """The proxy. `obstruct` is asked before each request goes on, and `withhold` before its answer goes back;
    `headers` may change what a request says."""

    def __init__(self, server: str) -> None:
        self.obstruct: Obstruct = nothing
        self.withhold: Obstruct = nothing
        self.headers: Callable[[dict[str, str]], dict[str, str]] = lambda headers: headers
        self.asked: list[tuple[str, str]] = []
        """Method and path of every request so far."""
        self._http = _Server(("127.0.0.1", 0), self._handler(urlsplit(server).netloc))
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def _handler(self, server: str) -> type[BaseHTTPRequestHandler]:
        gateway = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # an answer in one piece: in two, the second waits for the first one's receipt
            disable_nagle_algorithm = True

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except OSError as error:
                    self.close_connection = True  # a killed trainer does not wait for its answer
                    if isinstance(error, Reset):
                        # Closed with this, it is torn down.
                        self.connection.setsockopt(
                            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                        )

            def forward(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
                gateway.asked.append((self.command, self.path))
                if self.instead(gateway.obstruct):
                    return
                there = http.client.HTTPConnection(server)
                try:
                    headers = gateway.headers(dict(self.headers.items()))
                    there.request(self.command, self.path, body, headers)
                    got = there.getresponse()
                    content = got.read()
                except (OSError, http.client.HTTPException):
                    self.close_connection = True  # the server is away, and so is this
                    return
                finally:
                    there.close()
                if not self.instead(gateway.withhold):
                    self.answer(got.status, got.getheaders(), content)

            def instead(self, decide: Obstruct) -> bool:
                answer = decide(self.command, self.path)
                if answer is not None:
                    self.answer(answer.status, [("Content-Type", "application/xml")], answer.body)
                return answer is not None

            def answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
                self.send_response_only(status)
                named = {name.lower() for name, _ in headers}
                for name, value in headers:
                    if name.lower() not in _OF_THE_WAY:
                        self.send_header(name, value)
                if "content-length" not in named and status not in (204, 304):
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)
                self.wfile.flush()

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward  # noqa: N815 - as the library wants it

            def log_message(self, *_: Any) -> None:
                """Told by the tests."""

        return Handler

    @contextmanager
    def open(self) -> Iterator["Gateway"]:
        self._http.daemon_threads = True
        thread = threading.Thread(
            target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )
        thread.start()
        try:
            yield self
        finally:
            self._http.shutdown()
            self._http.server_close()
            thread.join()

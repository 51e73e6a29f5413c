"""Object stores that tests start on free loopback ports: moto, quick to start, and SeaweedFS, a real one."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

BUCKET = "runs"
USER, SECRET = "rollforward-test", "a-secret-that-must-not-be-seen"


def bucket(url: str, prefix: str) -> S3Store:
    """A part of the tests' bucket. No retries: whoever waits for a server asks again."""
    return S3Store(
        BUCKET,
        prefix=prefix,
        config={"access_key_id": USER, "secret_access_key": SECRET, "region": "us-east-1", "endpoint": url},
        client_options={"allow_http": True, "timeout": timedelta(seconds=5)},
        retry_config={"max_retries": 0},
    )


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, with 10,000 more free too: SeaweedFS takes that one for gRPC.

    All below those that the system gives to whoever asks for any: these may be gone before a server listens.
    """
    found: list[int] = []
    for port in random.SystemRandom().sample(range(12_000, 22_000), 1000):
        with suppress(OSError), socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + 10_000))
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError("no ports are free")


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=60).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


@contextmanager
def running(command: list[str], log: Path, ready: Callable[[], bool]) -> Iterator[subprocess.Popen[bytes]]:
    """The server, once it answers. It ends with the test: SeaweedFS is slow to end on SIGTERM."""
    with log.open("ab") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
    try:
        limit = time.monotonic() + 300
        while not ready():
            if server.poll() is not None or time.monotonic() > limit:
                raise RuntimeError(f"{command[0]} did not start: {log.read_text()[-2000:]}")
            time.sleep(0.05)
        yield server
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@contextmanager
def moto(log: Path) -> Iterator[str]:
    """The address of a service that keeps everything in memory and believes every credential."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    program = str(Path(sys.executable).with_name("moto_server"))
    with running([program, "-H", "127.0.0.1", "-p", str(port)], log, lambda: answers(url)):
        request = urllib.request.Request(f"{url}/{BUCKET}", method="PUT")
        urllib.request.urlopen(request, timeout=60).close()
        yield url


class SeaweedFS:
    """A service with a folder of its own; it can be killed, and come back with what it acknowledged."""

    def __init__(self, folder: Path, weed: str = "") -> None:
        self.folder = folder
        self._weed = weed or str(Path(sys.executable).with_name("weed"))
        self.ports = free_ports(4)
        self.url = f"http://127.0.0.1:{self.ports[3]}"
        self._running = ExitStack()

    def start(self) -> None:
        master, volume, filer, s3 = map(str, self.ports)
        data = self.folder / "data"
        data.mkdir(parents=True, exist_ok=True)
        users = self.folder / "users.json"
        keys = f'{{"accessKey": "{USER}", "secretKey": "{SECRET}"}}'
        actions = '["Admin", "Read", "Write", "List", "Tagging"]'
        users.write_text(
            f'{{"identities": [{{"name": "test", "credentials": [{keys}], "actions": {actions}}}]}}'
        )
        command = [self._weed, "server", f"-dir={data}", "-s3"]
        command += [
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            f"-s3.config={users}",
            "-master.volumeSizeLimitMB=256",
        ]
        command += [
            f"-master.port={master}",
            f"-volume.port={volume}",
            f"-filer.port={filer}",
            f"-s3.port={s3}",
        ]
        command += ["-volume.max=32", "-master.telemetry=false"]
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]  # the same ports for every server, otherwise
        self._running.enter_context(running(command, self.folder / "log", self._serves))

    def limit(self, megabytes: int | None) -> None:
        """Set the bucket's quota, or take it away: returns once writes are refused, or taken.

        It counts what its volumes have reported, which comes some seconds late.
        """
        quota = "-op=remove" if megabytes is None else f"-op=set -sizeMB={megabytes}"
        commands = f"lock\ns3.bucket.quota -name={BUCKET} {quota}\ns3.bucket.quota.enforce -apply\nunlock\n"
        shell = [self._weed, "shell", f"-master=127.0.0.1:{self.ports[0]}"]
        limit = time.monotonic() + 300
        while self._serves() != (megabytes is None):
            assert time.monotonic() < limit
            subprocess.run(shell, input=commands, text=True, check=True, capture_output=True)

    def _serves(self) -> bool:
        """Whether an object goes in and comes out: its parts find each other only after they answer."""
        store = bucket(self.url, "ready")
        try:
            obstore.put(store, "ready", b"yes")
            return bytes(obstore.get(store, "ready").bytes()) == b"yes"
        except BaseError:
            return False

    def stop(self) -> None:
        """SIGKILL."""
        self._running.close()

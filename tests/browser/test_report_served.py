"""The served page follows a run that is training, and answers nobody else."""

import http.client
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import example_run
import pytest
from chromium import Browser


@pytest.fixture
def training(tmp_path: Path) -> Iterator[tuple[Path, "subprocess.Popen[bytes]"]]:
    """The example, training on."""
    process = example_run.start(tmp_path / "live", steps=60, resume=False)
    try:
        example_run.wait_for_step(tmp_path / "live", 1, process)
        yield tmp_path / "live" / "run", process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def served(training: tuple[Path, object]) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """`rollforward report --serve` on it; its address."""
    command = [*example_run.PROGRAM, "report", str(training[0]), "--serve", "--port", "0", "--language", "en"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield re.findall(r"http://127\.0\.0\.1:\d+/", server.stdout.readline())[0], server
        finally:
            server.kill()


def steps(browser: Browser) -> int:
    return int(
        browser.run("return document.querySelector('.plot').data.find((each) => each.walked).x.length")
    )


def starts(browser: Browser) -> str:
    """The table of starts; read in one go, since the page may draw it anew at any moment."""
    return "".join(browser.texts("#view-timeline table")[:1])


def test_it_follows_a_run_until_it_is_killed(
    running_browser: Browser,
    training: tuple[Path, "subprocess.Popen[bytes]"],
    served: tuple[str, "subprocess.Popen[str]"],
) -> None:
    browser, (run, process), (address, server) = running_browser, training, served
    browser.size(1280, 900)
    browser.console()
    browser.open(address)
    browser.wait(lambda: browser.run("return Boolean(document.querySelector('.plot')?.data)"))
    first = steps(browser)
    browser.run("window.same = true")
    browser.wait(lambda: steps(browser) >= first + 3, example_run.PATIENCE)
    browser.view("timeline")
    browser.wait(lambda: "running" in starts(browser))
    browser.view("rollouts")
    newest = "return document.querySelector('#view-rollouts select').options[0]?.textContent"
    last = browser.run(newest)
    browser.wait(lambda: browser.run(newest) != last, example_run.PATIENCE)
    assert browser.run("return window.same"), "all of that without loading the page again"
    assert browser.console() == []
    process.kill()
    process.wait()
    browser.view("timeline")
    browser.wait(lambda: "was killed" in starts(browser))
    assert browser.console() == []
    server.terminate()
    browser.wait(lambda: "the server does not answer" in browser.texts("[role=status]")[0])
    assert all("ERR_CONNECTION" in line or "Failed to load" in line for line in browser.console())
    assert run.exists()


def test_it_answers_this_machine_only_and_has_no_files(served: tuple[str, "subprocess.Popen[str]"]) -> None:
    port = urlsplit(served[0]).port
    for path, host, code in (
        ("/", f"127.0.0.1:{port}", 200),
        ("/", f"localhost:{port}", 200),
        ("/", "evil.example", 403),
        ("/metrics.jsonl", f"127.0.0.1:{port}", 404),
        ("/../../../etc/passwd", f"127.0.0.1:{port}", 404),
        ("/%2e%2e/run.lock", f"127.0.0.1:{port}", 404),
    ):
        connection = http.client.HTTPConnection("127.0.0.1", port or 0, timeout=30)
        connection.request("GET", path, headers={"Host": host})
        answer = connection.getresponse()
        content = answer.read()
        assert answer.status == code, (path, host)
        assert (b"<html" in content) == (code == 200)
        assert "frame-ancestors 'none'" in (answer.getheader("Content-Security-Policy") or "")


def test_ctrl_c_ends_it_well(training: tuple[Path, object]) -> None:
    program = (
        "import signal, subprocess, sys; "
        f"command = [*{example_run.PROGRAM!r}, 'report', {str(training[0])!r}, '--serve', '--port', '0']; "
        "server = subprocess.Popen(command, stdout=subprocess.PIPE); server.stdout.readline(); "
        "server.send_signal(signal.SIGINT); sys.exit(server.wait(300))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=600, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")

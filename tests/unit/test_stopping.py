"""A signal ends a process in good order and in time, wherever it is."""

import signal
import subprocess
import sys

import pytest

BEGIN = """
import hashlib, os, signal, sys, time
from rollforward.processes import stopping
stopping.GRACE = stopping._state.grace = float(sys.argv[1])
stopping.take_signals()

def held_up():
    # Minutes in one call, during which Python runs no handler.
    print("busy", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)

def send(number):
    os.kill(os.getpid(), number)
    # Whichever thread the kernel gives it to, the handler runs here.
    while not stopping._state.came:
        time.sleep(0.001)

"""
BOTH = [(signal.SIGTERM, 143), (signal.SIGINT, 130)]


def start(program: str, grace: float = 60.0) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", BEGIN + program, str(grace)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    said, complained = process.communicate(timeout=300)
    return process.returncode, said, complained


@pytest.mark.parametrize(("number", "code"), BOTH)
def test_a_command_is_unwound(number: int, code: int) -> None:
    process = start(
        f"try:\n  send({int(number)})\nexcept stopping.Stopped as stop:\n  print(stop.exit_code, stop)\n"
    )
    assert ended(process)[:2] == (0, f"{code} stopped by {told(code)}; resume with --resume_training\n")


@pytest.mark.parametrize(("number", "code"), BOTH)
def test_a_trainer_lets_go_where_it_is_and_unwinds_nothing(number: int, code: int) -> None:
    process = start(
        f"with stopping.ending(lambda: print('let go', flush=True)):\n"
        f"  try:\n    send({int(number)})\n  finally:\n    print('unwound', flush=True)\n"
    )
    assert ended(process) == (code, "let go\n", f"stopped by {told(code)}; resume with --resume_training\n")


def test_what_was_begun_is_finished_first() -> None:
    process = start(
        "with stopping.ending(lambda: print('let go')), stopping.finishing():\n"
        "  send(signal.SIGTERM)\n  print('finished')\nprint('went on')\n"
    )
    assert ended(process)[:2] == (143, "finished\nlet go\n")


@pytest.mark.parametrize(("number", "code"), BOTH)
def test_a_process_held_up_in_a_long_call_is_cut_off(number: int, code: int) -> None:
    process = start("with stopping.finishing():\n  held_up()\n", grace=0.2)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(number)
    assert ended(process) == (code, "", f"stopped by {told(code)}; resume with --resume_training\n")


def test_a_second_signal_ends_it_at_once() -> None:
    process = start(
        "def slow():\n  print('slow', flush=True)\n  time.sleep(600)\n"
        "with stopping.ending(slow):\n  send(signal.SIGTERM)\n",
        grace=600.0,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "slow\n"
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 143


def test_an_end_that_fails_is_an_end() -> None:
    process = start("with stopping.ending(lambda: 1 / 0):\n  send(signal.SIGTERM)\n")
    assert ended(process)[0] == 143


def test_a_signal_that_the_process_sent_itself_is_told_as_what_is_behind_it() -> None:
    process = start(
        "from rollforward.errors import CollectiveTimeout\n"
        "late = CollectiveTimeout('worker 1 is late')\n"
        "with stopping.ending(lambda: print('let go'), cause=lambda: late):\n  send(signal.SIGTERM)\n"
    )
    assert ended(process) == (1, "let go\n", "worker 1 is late\n")


def told(code: int) -> str:
    return "Ctrl-C" if code == 130 else "SIGTERM"

"""A command and all that it starts end together, however they are ended."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rollforward.errors import InputError
from rollforward.processes.environment import is_alive
from rollforward.processes.family import Family

# A child in the group, one in a session of its own, and a grandchild that double-forks its way out of both.
_STARTS_MANY = """\
import os, subprocess, sys, time
sleeping = [sys.executable, "-c", "import time; time.sleep(300)"]
pids = [os.getpid(), subprocess.Popen(sleeping).pid, subprocess.Popen(sleeping, start_new_session=True).pid]
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        with open(sys.argv[1] + ".daemon", "w") as file:
            file.write(str(os.getpid()))
        os.execv(sys.executable, sleeping)
    os._exit(0)
while not os.path.exists(sys.argv[1] + ".daemon") or not open(sys.argv[1] + ".daemon").read():
    time.sleep(0.01)
pids.append(int(open(sys.argv[1] + ".daemon").read()))
print("pids", *pids, flush=True)
time.sleep(float(sys.argv[2]))
"""


def python(program: str, *arguments: str) -> Family:
    return Family([sys.executable, "-c", program, *arguments], os.environ)


def read_all(family: Family) -> bytes:
    output = b""
    while (chunk := family.read()) is not None:
        output += chunk
    return output


def read_pids(family: Family) -> list[int]:
    output = b""
    while b"\n" not in output:
        chunk = family.read()
        assert chunk is not None, output
        output += chunk
    return [int(word) for word in output.split()[1:]]


def test_output_and_errors_come_in_their_order_and_the_exit_code_is_its_own() -> None:
    program = (
        "import sys; print('a', flush=True); print('b', file=sys.stderr, flush=True); print('c'); sys.exit(3)"
    )
    with python(program) as family:
        assert read_all(family) == b"a\nb\nc\n"
    assert family.ending is not None
    assert (family.ending.code, family.ending.left) == (3, ())


def test_output_larger_than_a_pipe_holds_is_read_to_its_end() -> None:
    with python("import sys; sys.stdout.write('x' * 3_000_000)") as family:
        assert len(read_all(family)) == 3_000_000


def test_a_signal_from_elsewhere_is_reported_as_one() -> None:
    with python("import os; os.kill(os.getpid(), 9)") as family:
        read_all(family)
    assert family.ending is not None
    assert family.ending.code == -9


def test_a_kill_reaches_children_in_sessions_of_their_own_and_daemons(tmp_path: Path) -> None:
    with python(_STARTS_MANY, str(tmp_path / "mark"), "300") as family:
        pids = read_pids(family)
        assert len(pids) == 4
        assert all(map(is_alive, pids))
        family.kill()
        read_all(family)
        assert family.ending is not None
        assert (family.ending.code, family.ending.left) == (None, ())
        assert not any(map(is_alive, pids))


def test_what_the_command_leaves_behind_is_ended_and_named(tmp_path: Path) -> None:
    with python(_STARTS_MANY, str(tmp_path / "mark"), "0") as family:
        pids = read_pids(family)
        read_all(family)
    assert family.ending is not None
    assert family.ending.code == 0
    assert len(family.ending.left) == 3
    assert "time.sleep(300)" in family.ending.left[0]
    assert not any(map(is_alive, pids))


def test_leaving_early_ends_everything(tmp_path: Path) -> None:
    with python(_STARTS_MANY, str(tmp_path / "mark"), "300") as family:
        pids = read_pids(family)
    assert not any(map(is_alive, pids))


def test_when_this_process_is_killed_nothing_is_left(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _STARTS_MANY, str(tmp_path / "mark"), "300"]
    holder = f"""\
import os
from rollforward.processes.family import Family
with Family({command!r}, os.environ) as family:
    while (chunk := family.read()) is not None:
        os.write(1, chunk)
"""
    process = subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE)
    assert process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().split()[1:]]
    assert len(pids) == 4
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 300
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(is_alive, pids))


def test_the_command_hears_ctrl_c_even_where_its_starter_does_not() -> None:
    """The command line blocks SIGINT in all threads but one, and a blocked signal would be inherited."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with python("import os, signal; os.kill(os.getpid(), signal.SIGINT)") as family:
            read_all(family)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    assert family.ending is not None
    assert family.ending.code == -signal.SIGINT


def test_a_command_that_does_not_exist_is_named() -> None:
    with (
        Family(["no-such-trainer", "--fast"], os.environ) as family,
        pytest.raises(InputError, match="no-such-trainer: No such file or directory"),
    ):
        read_all(family)

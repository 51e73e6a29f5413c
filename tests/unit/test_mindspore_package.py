"""What MindSpore's package tells a run before MindSpore is loaded."""

import socket
import subprocess
import sys

from rollforward.engines.base import Finding
from rollforward.engines.mindspore.package import MindSpore, free_port


def test_a_process_knows_what_msrun_made_it() -> None:
    this_process = MindSpore().this_process
    assert this_process({}).role == "alone"
    assert this_process({"MS_ROLE": "MS_SCHED", "MS_WORKER_NUM": "2"}).role == "scheduler"
    worker = this_process({"MS_ROLE": "MS_WORKER", "MS_WORKER_NUM": "4", "RANK_ID": "3"})
    assert (worker.role, worker.rank, worker.world_size) == ("worker", 3, 4)


def test_mindspores_own_compile_cache_is_never_on() -> None:
    """It takes graphs for one another when they are compiled in another order."""
    environment = {"MS_COMPILER_CACHE_ENABLE": "1", "GLOG_v": "1"}
    MindSpore().prepare(environment, patience=1800)
    assert environment.keys() == {"GLOG_v", "MS_CPU_COMM_OP_TIMEOUT"}
    assert environment["GLOG_v"] == "1"


def test_the_framework_waits_in_a_collective_for_longer_than_we_do_unless_it_is_told_otherwise() -> None:
    for seconds in (1800, 0):
        environment: dict[str, str] = {}
        MindSpore().prepare(environment, patience=seconds)
        assert int(environment["MS_CPU_COMM_OP_TIMEOUT"]) > 1800 + 60
    environment["MS_CPU_COMM_OP_TIMEOUT"] = "7"
    MindSpore().prepare(environment, patience=1800)
    assert environment["MS_CPU_COMM_OP_TIMEOUT"] == "7"


def test_a_free_port_is_one_that_msrun_takes() -> None:
    assert 1024 <= free_port() <= 65535


def findings(**environment: str) -> dict[str, Finding]:
    return {finding.text.split()[0]: finding for finding in MindSpore().examine(environment)}


def test_a_port_that_is_taken_or_no_port_is_a_problem() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        found = findings(MS_SCHED_PORT=str(taken.getsockname()[1]))["port"]
        assert (found.level, "cannot be used" in found.text) == ("problem", True)
    for text in ("abc", "0", "-1", "99999", "\N{ARABIC-INDIC DIGIT THREE}"):
        assert findings(MS_SCHED_PORT=text)["MS_SCHED_PORT"].level == "problem", text


def test_timeouts_are_compared_with_what_is_recommended() -> None:
    for value, level in (("7200", "ok"), ("60", "problem"), ("soon", "problem"), ("", "problem")):
        assert findings(HCCL_EXEC_TIMEOUT=value)["HCCL_EXEC_TIMEOUT"].level == level, value
    assert findings()["HCCL_EXEC_TIMEOUT"].level == "note"


def test_asking_the_package_loads_no_framework() -> None:
    program = (
        "import sys\n"
        "from rollforward.engines.base import find_engine\n"
        "package = find_engine('mindspore')\n"
        "package.missing(), package.versions(), package.sources()\n"
        "package.examine({}), package.lost_contact()\n"
        "print('mindspore' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

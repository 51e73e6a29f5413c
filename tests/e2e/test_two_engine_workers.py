"""Two data-parallel workers under `msrun` learn what one worker with the whole batch does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command import torn_down

pytestmark = pytest.mark.engine

WORKER = Path(__file__).with_name("engine_worker.py")
SOURCE = Path(__file__).parents[2] / "src"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, np.ndarray]]:
    """What each worker found: "1_0" alone, "2_0" and "2_1" of two."""
    out = tmp_path_factory.mktemp("workers")
    scripts = Path(sys.executable).parent
    # msrun starts whatever `python` is on the path.
    environment = {
        **os.environ,
        "GLOG_v": "3",
        "PYTHONPATH": str(SOURCE),
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
    }
    msrun = [str(scripts / "msrun"), "--worker_num=2", "--local_worker_num=2", "--join=True"]
    addressed = [*msrun, f"--master_port={free_port()}", f"--log_dir={out / 'log'}"]
    for command in ([sys.executable], addressed):
        done = subprocess.run(
            [*command, str(WORKER), str(out)],
            env=environment,
            cwd=out,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        logs = "\n".join(path.read_text()[-2000:] for path in (out / "log").glob("worker_*.log"))
        said = done.stdout + done.stderr
        assert done.returncode == 0 or torn_down(said), said[-4000:] + logs
    return {path.stem: dict(np.load(path)) for path in out.glob("*.npz")}


def test_values_are_gathered_in_the_order_of_ranks(results: dict[str, dict[str, np.ndarray]]) -> None:
    assert all(result["gathered"] for result in results.values())


def test_two_workers_hold_the_same_bits(results: dict[str, dict[str, np.ndarray]]) -> None:
    assert set(results) == {"1_0", "2_0", "2_1"}
    for name, array in results["2_0"].items():
        assert array.tobytes() == results["2_1"][name].tobytes(), name


def test_two_workers_learn_what_one_does(results: dict[str, dict[str, np.ndarray]]) -> None:
    alone, both = results["1_0"], results["2_0"]
    for step in ("step 0", "step 1"):
        np.testing.assert_allclose(both[step], alone[step], rtol=1e-5)
    assert alone["optimizer/global_step"] == both["optimizer/global_step"] == 2
    for name, array in alone.items():
        # Where a gradient is rounding noise, as of a key's bias, AdamW makes a whole step of its sign.
        if "/" in name and "k_proj.bias" not in name:
            np.testing.assert_allclose(both[name], array, atol=1e-5, err_msg=name)


def test_a_bad_sample_of_one_worker_stops_all_and_is_named(results: dict[str, dict[str, np.ndarray]]) -> None:
    for name in ("2_0", "2_1"):
        assert "samples [1] of worker 1" in str(results[name]["message"])

"""The real engine killed again and again: at exact places, and at random instants.

By name: pytest -m slow tests/e2e/test_engine_kills.py. ROLLFORWARD_ENGINE_KILLS (20), of two workers
ROLLFORWARD_ENGINE_WORKER_KILLS (5), and of four, two and one in turn ROLLFORWARD_ENGINE_CHANGES (10) set
the numbers of random ones, ROLLFORWARD_ENGINE_SEED (1) the instants.
"""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from command import (
    ARITHMETIC,
    SETTINGS,
    SPREAD,
    Command,
    assert_nothing_finished_was_lost,
    begun,
    figures_of,
)

from rollforward.processes import heartbeat
from rollforward.processes.environment import is_alive
from rollforward.replay import report as recovery_report
from rollforward.storage import LocalStorage
from rollforward.store import find

pytestmark = pytest.mark.engine

DIES_IN_PHASE = Path(__file__).with_name("dies_in_phase.py")

PLACES = {
    "generating the run's second step": ("generate", "0_1", 1),
    "generating, the step's first chunk in the journal": ("generate", "0_1", 2),
    "verifying": ("verify", "0_2", 1),
    "under the reference": ("reference", "0_2", 1),
    "a chunk not in the journal yet": ("log", "0_2", 1),
    "in the first update of the epoch's last step": ("update", "0_3", 1),
    "after that, before its outcome is recorded": ("log", "0_3", 1),
    "in the second update": ("update", "0_3", 2),
    "before the reference is synchronised": ("update", "0_3", 3),
    "generating the next epoch's first step": ("generate", "1_0", 1),
    "replaying an update": ("update", "0_3", 1),
    "at the boundary behind the last step": ("checkpoint", "1_3", 1),
    "in the last checkpoint": ("checkpoint", "2_0", 1),
}
"""Phase, position, and how often that start enters it: one kill after the other, of one run.

Chunks that an earlier start has finished are not generated, so their phases are not entered again.
"""


@pytest.mark.slow
def test_killed_at_each_place_in_turn_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    """Two updates to a step, the reference synchronised every second step, two epochs of four steps."""
    dataset = tmp_path / "sixteen.jsonl"
    lines = (ARITHMETIC / "train.jsonl").read_text().splitlines(keepends=True)
    dataset.write_text("".join(lines[:16]))
    settings = SETTINGS | {
        "rl_config.dataset_file": dataset,
        "rl_config.chunk_size": 2,
        "rl_config.batch_size": 8,
        "rl_config.epochs": 2,
        "rl_config.max_steps": 0,
        "rl_config.num_iterations": 2,
        "rl_config.save_ckpt_interval": 3,
        "rl_config.weights_digest_interval": 1,
        "ref_config.sync_ref_model": "true",
        "ref_config.ref_model_sync_steps": 2,
    }
    whole = Command(tmp_path / "whole", settings=settings)
    whole.finish()
    killed = Command(tmp_path / "killed", settings=settings)
    killed.take_graphs(whole)
    plain = killed.program
    for number, place in enumerate(PLACES.values()):
        killed.program = [sys.executable, str(DIES_IN_PHASE), *map(str, place)]
        killed.ended(killed.start(resume=number > 0), code=-signal.SIGKILL)
    killed.program = plain
    killed.finish(resume=True)
    assert figures_of(killed) == figures_of(whole)
    assert_nothing_finished_was_lost(killed)


def workers_of(command: Command) -> list[int]:
    """The processes of this run that live; a number that was given to another process since is none."""
    pulses = [heartbeat.read(command.run, rank) for rank in range(command.workers)]
    found = []
    for pulse in pulses:
        if pulse is not None and is_alive(pulse.pid):
            said = Path(f"/proc/{pulse.pid}/cmdline").read_bytes()
            found += [pulse.pid] if str(command.run).encode() in said else []
    return found


def kill_one_of(command: Command, process: "subprocess.Popen[bytes]", drawn: random.Random) -> None:
    """SIGKILL to a worker, or to the process that watches the workers; then wait until all are gone."""
    os.kill(drawn.choice([process.pid, *workers_of(command)]), signal.SIGKILL)
    process.wait(timeout=600)
    deadline = time.monotonic() + 600
    while workers_of(command):
        assert time.monotonic() < deadline, "a worker outlives the others"
        time.sleep(0.05)


def kill_at_random_instants(
    tmp_path: Path,
    kills: int,
    workers: Sequence[int],
    seconds: tuple[float, float],
    chunks: int,
    **changes: object,
) -> None:
    """A run that is killed so many times, on these numbers of workers in turn; its twin, on one, is not."""
    endless = SETTINGS | {
        "rl_config.num_rollouts": chunks // workers[0],
        "rl_config.epochs": 1000,
        "rl_config.max_steps": 0,
        "rl_config.save_ckpt_interval": 7,
        "rl_config.weights_digest_interval": 5,
        "actor_config.lr_schedule.decay_steps": 1000,
        "actor_config.lr_schedule.min_lr": 0.0005,
    }
    drawn = random.Random(int(os.environ.get("ROLLFORWARD_ENGINE_SEED", "1")))
    turns = itertools.cycle(workers)
    killed = Command(tmp_path / "killed", workers=next(turns), settings=endless | changes)
    process = killed.start()
    # Once: with nothing compiled, a start takes longer than any of those to come.
    killed.wait_until_inside(process, "generate", 1)
    kill_one_of(killed, process, drawn)
    for _ in range(kills - 1):
        killed.workers = next(turns)
        process = killed.start(resume=begun(killed))
        time.sleep(drawn.uniform(*seconds))
        assert process.poll() is None, (killed.folder / "train.txt").read_text()
        kill_one_of(killed, process, drawn)
    steps = find(LocalStorage(killed.run)).manifest.global_step
    ended = endless | {"rl_config.max_steps": steps + 10}
    killed.settings, killed.workers = ended | changes, next(turns)
    killed.finish(resume=True)
    whole = Command(tmp_path / "whole", settings=ended | {"rl_config.num_rollouts": chunks})
    whole.take_graphs(killed)
    whole.finish()
    assert figures_of(killed) == figures_of(whole)
    assert_nothing_finished_was_lost(killed)
    reports = recovery_report.read(LocalStorage(killed.run))
    print(
        json.dumps(
            {
                "kills": kills,
                "workers": list(workers),
                "steps": steps + 10,
                "starts that got to resume": len(reports),
                "replayed": sum(report.steps_replayed for report in reports),
                "updates equal to the last bit": sum(report.updates_repeated for report in reports),
                "chunks from the journal": sum(report.chunks_reused for report in reports),
            }
        )
    )


@pytest.mark.slow
def test_killed_at_random_instants(tmp_path: Path) -> None:
    kills = int(os.environ.get("ROLLFORWARD_ENGINE_KILLS", "20"))
    kill_at_random_instants(tmp_path, kills, [1], (1.0, 15.0), chunks=2)


@pytest.mark.slow
def test_two_workers_killed_at_random_instants(tmp_path: Path) -> None:
    kills = int(os.environ.get("ROLLFORWARD_ENGINE_WORKER_KILLS", "5"))
    kill_at_random_instants(tmp_path, kills, [2], (5.0, 40.0), chunks=4)


@pytest.mark.slow
@pytest.mark.parametrize("spread", ["false", "true"], ids=["whole optimizer", "spread optimizer"])
def test_four_two_one_two_and_four_workers_killed_at_random_instants(tmp_path: Path, spread: str) -> None:
    kills = int(os.environ.get("ROLLFORWARD_ENGINE_CHANGES", "10"))
    changes = {SPREAD: spread}
    kill_at_random_instants(tmp_path, kills, [4, 2, 1, 2], (5.0, 60.0), chunks=4, **changes)

"""Runs that train straight to an object store: trainers killed, the server killed, machines lost, a zombie.

ROLLFORWARD_KILLS and ROLLFORWARD_SERVER_KILLS set the numbers of the long ones (`-m slow`).
"""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import toy_trainer
from servers import SeaweedFS
from toy_session import Place
from training import LEASE_SECONDS, Training

from rollforward.replay import report
from rollforward.storage.address import open_storage
from rollforward.store.catalog import named_positions
from rollforward.store.lock import read_owner

EPOCHS = 8
STEPS = 5 * EPOCHS


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path)


@pytest.fixture
def digests(place: Place) -> dict[str, str]:
    """Of the undisturbed run, in a folder."""
    place.train("whole", rl_config__epochs=EPOCHS)
    return place.digests("whole")


@pytest.fixture
def training(place: Place, address: str) -> Training:
    return Training(place, address, {"rl_config__epochs": EPOCHS})


def kill_often(training: Training, kills: int, seed: int, *, loses_machines: bool = False) -> int:
    """Start the trainer, and kill it after a random while, so many times; how many were training by then."""
    moments, hit = random.Random(seed), 0
    for number in range(kills):
        trainer = training.start()
        training.until(trainer, moments.choice(["data:", "run: in", "training:", "training:", "training:"]))
        time.sleep(moments.uniform(0, 0.8))
        hit += training.kill(trainer)
        if loses_machines and number % 2:
            shutil.rmtree(training.home())
    return hit


def test_on_moto_it_ends_with_the_bytes_of_a_run_in_a_folder(
    training: Training, digests: dict[str, str], moto_url: str, use
) -> None:
    use(moto_url)
    training.finish()
    training.check(digests, STEPS)
    assert "does not honour conditional writes" not in training.log


def test_killed_again_and_again_it_ends_with_the_same_bytes_and_makes_nothing_twice(
    training: Training, digests: dict[str, str], seaweed: SeaweedFS, use
) -> None:
    use(seaweed.url)
    assert kill_often(training, 6, seed=1)
    training.finish()
    training.check(digests, STEPS)
    assert training.generated_again() == 0


@pytest.mark.parametrize("durability", ["local", "remote"])
def test_when_the_machine_is_lost_it_goes_on_elsewhere_with_the_same_bytes(
    training: Training, digests: dict[str, str], seaweed: SeaweedFS, use, durability: str
) -> None:
    use(seaweed.url)
    training.changes["rl_config__journal_durability"] = durability
    assert kill_often(training, 4, seed=2, loses_machines=True)
    training.finish()
    training.check(digests, STEPS)
    if durability == "remote":
        assert training.generated_again() == 0


def test_a_frozen_trainer_that_was_replaced_can_do_no_more(
    training: Training, digests: dict[str, str], seaweed: SeaweedFS, use
) -> None:
    use(seaweed.url)
    zombie = training.start()
    training.until(zombie, "checkpoint: 0_3 saved")
    zombie.send_signal(signal.SIGSTOP)
    time.sleep(LEASE_SECONDS)
    training.finish(training.start("other"))
    training.check(digests, STEPS)
    there = named_positions(open_storage(training.address))
    zombie.send_signal(signal.SIGCONT)
    output, _ = zombie.communicate(timeout=600)
    assert zombie.returncode == 1, output
    assert "taken over by" in output
    assert named_positions(open_storage(training.address)) == there
    training.check(digests, STEPS)


def test_a_second_trainer_elsewhere_is_refused_while_the_first_lives(
    training: Training, digests: dict[str, str], seaweed: SeaweedFS, use
) -> None:
    use(seaweed.url)
    first = training.start()
    training.until(first, "checkpoint: 0_0 saved")
    second = training.start("other")
    output, _ = second.communicate(timeout=600)
    if first.poll() is None:
        assert (second.returncode, "is held by process" in output) == (1, True), output
    training.finish(first)
    training.check(digests, STEPS)


def test_told_to_end_it_leaves_nothing_behind_and_gives_the_run_back(
    training: Training, digests: dict[str, str], seaweed: SeaweedFS, use
) -> None:
    use(seaweed.url)
    trainer = training.start()
    training.until(trainer, "step 1_")
    trainer.send_signal(signal.SIGTERM)
    training.logs.append(trainer.communicate(timeout=600)[0])
    assert trainer.returncode == 143, training.log
    owner = read_owner(open_storage(training.address))
    assert owner is not None
    assert not owner.held
    shutil.rmtree(training.home())
    training.finish(training.start("other"))
    training.check(digests, STEPS)
    assert "whether it is alive" not in training.log
    assert training.generated_again() == 0


def test_a_supervised_run_that_is_killed_goes_on_from_the_bucket(
    training: Training, digests: dict[str, str], seaweed: SeaweedFS, use, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(seaweed.url)
    fates = training.place.root / "fates"
    fates.write_text("5 killed\n9 killed\n")
    monkeypatch.setenv(toy_trainer.FATES, str(fates))
    training.changes["context__engine"] = "fated"
    training.finish(training.start(more=["--max_restarts", "2"]))
    training.check(digests, STEPS)
    assert "restart 2 of 2, from checkpoint" in training.log
    assert training.generated_again() == 0


def test_a_standby_takes_over_a_run_in_the_bucket(
    training: Training, digests: dict[str, str], seaweed: SeaweedFS, use, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(seaweed.url)
    fates = training.place.root / "fates"
    fates.write_text("5 hangs\n")
    monkeypatch.setenv(toy_trainer.FATES, str(fates))
    training.changes["context__engine"] = "fated"
    supervised = training.start(more=["--max_restarts", "2", "--standby"])
    training.until(supervised, "standby: ready")
    first = int(fates.with_suffix(".met").read_text().split()[0])
    os.kill(first, signal.SIGKILL)
    training.finish(supervised)
    training.check(digests, STEPS)
    assert "standby: takes over" in training.log
    assert [recovery.standby for recovery in report.read(open_storage(training.address))] == [True]
    assert training.generated_again() == 0


def with_server_kills(training: Training, server: SeaweedFS, kills: int) -> int:
    """Kill the server in mid-run, so many times at most; the trainer lives through it. How many it were."""
    moments, done = random.Random(3), 0
    trainer = training.start()
    while done < kills:
        training.until(trainer, "checkpoint:")
        time.sleep(moments.uniform(0, 0.5))
        if trainer.poll() is not None:
            break
        server.stop()
        time.sleep(moments.uniform(0, 2))
        server.start()
        done += 1
    training.finish(trainer)
    return done


def test_a_server_that_is_killed_and_comes_back_costs_only_time(
    training: Training, digests: dict[str, str], own_server: SeaweedFS
) -> None:
    assert with_server_kills(training, own_server, 1) == 1
    training.check(digests, STEPS)


def another(training: Training, place: Place, number: int) -> Training:
    """A run of its own. The odd ones wait for the server with each chunk; the others go on meanwhile."""
    changes = dict(training.changes)
    if number % 2:
        changes["rl_config__journal_durability"] = "remote"
    return Training(place, f"{training.address}-{number}", changes)


@pytest.mark.slow
def test_killed_many_times(
    training: Training, digests: dict[str, str], seaweed: SeaweedFS, use, place: Place
) -> None:
    use(seaweed.url)
    kills, done, number = int(os.environ.get("ROLLFORWARD_KILLS", "200")), 0, 0
    while done < kills:
        number += 1
        run = another(training, place, number)
        # Every other run loses its machine to every other kill.
        done += kill_often(run, 10, seed=number, loses_machines=bool(number % 2))
        run.finish()
        run.check(digests, STEPS)
        assert run.generated_again() == 0


@pytest.mark.slow
def test_the_server_killed_many_times(
    training: Training, digests: dict[str, str], own_server: SeaweedFS, place: Place
) -> None:
    kills, done, number = int(os.environ.get("ROLLFORWARD_SERVER_KILLS", "20")), 0, 0
    while done < kills:
        number += 1
        run = another(training, place, number)
        done += with_server_kills(run, own_server, kills - done)
        run.check(digests, STEPS)

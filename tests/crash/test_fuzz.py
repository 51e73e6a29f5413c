"""Folders that somebody hands over, damaged or made up: refused quickly, in bounded memory, by every verb.

Each case takes a run that was killed, changes it in one to three ways (`hostile_folders`) by its seed, looks
at it with some of the verbs, and at times resumes it. Whatever was done: no error but ours, nothing that a
terminal acts upon, no verb that hangs or takes memory beyond the data's, nothing touched outside the
folder. A run that is resumed and comes to its end has the bytes of one that was never touched, unless digests
were made anew. `python tests/crash/test_fuzz.py SEED` runs one case and says what was done.
ROLLFORWARD_FUZZ sets the number for the soak, which is run by name.
"""

import contextlib
import io
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "conformance"))

from ckpt_writer import ckpt_bytes
from hostile_folders import Attack
from toy_session import Killed, Place, ToyPackage, commit_at_once

from rollforward.cli.main import main
from rollforward.errors import RollforwardError
from rollforward.storage import LocalStorage
from rollforward.store import load_manifest, read_tensors
from rollforward.store.catalog import positions

SOAK = int(os.environ.get("ROLLFORWARD_FUZZ", "10000"))
CASES, GROUPS = 250, 10
SECONDS = 10
"""Of processor time that a verb may take. The time that passes has a limit only to bound a hang."""
MEGABYTES = 500


class Hangs(BaseException):
    """A verb took too long; nothing may catch this."""


@dataclass
class World:
    """Whole folders to damage."""

    place: Place
    digests: dict[str, str]
    """What the run ends with."""

    @property
    def run(self) -> Path:
        return self.place.root / "run"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patched:
        yield build(tmp_path_factory.mktemp("fuzz"), patched)


def build(root: Path, patched: pytest.MonkeyPatch) -> World:
    """A run of three checkpoints that was killed twice, another run, one of two workers, one of MindRLHF."""
    patched.chdir(root)
    patched.setenv("COLUMNS", "100")
    commit_at_once(patched)
    place = Place(root)
    place.train("whole")
    for run, changes in (("run", {}), ("other", {"rl_config__seed": 9})):
        with contextlib.suppress(Killed):
            place.train(run, ToyPackage(dies_at_update=4), **changes)
        with contextlib.suppress(Killed):
            place.train(run, ToyPackage(dies_at_update=5), resume=True, **changes)
    place.train_by_two("two", rl_config__max_steps=2)
    write_theirs(root / "run", root / "theirs")
    return World(place, place.digests("whole"))


def write_theirs(run: Path, theirs: Path) -> None:
    """The newest checkpoint as MindRLHF would have written it."""
    storage = LocalStorage(run)
    position = positions(storage)[0]
    for role, folder in (("policy_model", "train"), ("optimizer", "optimizer"), ("ref", "ref")):
        arrays = {
            name: array for _, name, array in read_tensors(storage, load_manifest(storage, position), [role])
        }
        (theirs / folder / "rank_0").mkdir(parents=True)
        name = f"{role}_rank_0-{position}.ckpt"
        (theirs / folder / "rank_0" / name).write_bytes(ckpt_bytes(arrays))
        meta = f'{{"last_epoch": {position.epoch}, "last_step": {position.step}, "last_ckpt_file": "{name}"}}'
        (theirs / folder / "rank_0" / "meta.json").write_text(meta)


class Shown(io.StringIO):
    """Standard output, which may be a terminal."""

    terminal = False

    def isatty(self) -> bool:
        return self.terminal


class Case:
    """One damaged folder."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.rng = random.Random(seed)
        self.root = world.place.root / "case"
        shutil.rmtree(self.root, ignore_errors=True)
        self.precious = self.root / "outside" / "precious"
        self.precious.parent.mkdir(parents=True)
        self.precious.write_bytes(b"precious\n" * 400)
        self.kind = self.rng.choice(("run", "run", "run", "run", "two", "theirs"))
        self.folder = self.root / "damaged"
        shutil.copytree(world.place.root / self.kind, self.folder)
        others = [world.place.root / name for name in ("other", "two", "run")]
        self.attack = Attack(self.folder, self.rng, others, self.precious)
        self.told = f"seed {seed}, {self.kind}"

    def play(self) -> None:
        """Damage, look, resume."""
        self.attack.run(self.rng.choice((1, 1, 2, 3)))
        self.told += f": {', '.join(self.attack.done)}"
        for verb in self.rng.sample(self.verbs(), 4):
            with self.bounded(verb[0]):
                self.look(verb)
        if self.kind != "two" and self.rng.random() < 0.4:
            with self.bounded("resume"):
                self.resume()
        outside = sorted(path.name for path in self.precious.parent.iterdir())
        assert outside == ["precious"], self.told
        assert self.precious.read_bytes() == b"precious\n" * 400, self.told

    def verbs(self) -> list[list[str]]:
        run, whole = str(self.folder), str(self.world.place.root / "whole")
        json = self.rng.choice(([], ["--json"]))
        return [
            ["inspect", run, *self.rng.choice(([], ["--deep"])), *json],
            ["verify", run, *json],
            ["verify", "--deep", run, *json],
            ["doctor", "--actor_checkpoint_path", f"{run}/train", *json],
            ["history", run, *json],
            ["rollouts", run, "--step", self.rng.choice(("0_1", "1_2", "1_3")), *json],
            ["diff", run, whole, *json],
            ["prune", run, "--dry_run", "--save_max_ckpt_num", "1", *json],
            ["export", run, "--to", str(self.root / f"export{self.rng.random()}"), *json],
        ]

    def look(self, arguments: list[str]) -> None:
        """One verb."""
        out, error = Shown(), io.StringIO()
        out.terminal = self.rng.random() < 0.4
        about = f"{self.told}\nrollforward {' '.join(arguments)}"
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            try:
                code = main(arguments)
            except SystemExit as exit:
                raise AssertionError(f"{about}: exit {exit.code}\n{error.getvalue()}") from exit
        told = out.getvalue() + error.getvalue()
        assert code in (0, 1, 2), f"{about}: code {code}"
        for unwanted in ("Try: --debug", "Traceback", "\x07", "\x1b]"):
            assert unwanted not in told, f"{about}\n{told!r}"
        told.encode()

    def resume(self) -> None:
        """Go on from it, in its folder; the end is that of the run, or it is refused."""
        place, run = self.world.place, "case/damaged"
        out = io.StringIO()
        try:
            # What a forged record makes overflow is reported as not finite: no warning is needed as well.
            quiet = np.errstate(over="ignore", invalid="ignore")
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), quiet:
                place.train(run, resume=True)
        except RollforwardError as error:
            str(error)
            return
        except Exception as error:
            raise AssertionError(f"{self.told}\n{out.getvalue()}") from error
        assert "\x07" not in out.getvalue(), self.told
        # Files of others have no digests: what is read is what they say.
        if not self.attack.sealed and self.kind == "run":
            assert place.digests(run) == self.world.digests, f"{self.told}\n{out.getvalue()}"

    @contextlib.contextmanager
    def bounded(self, what: str) -> Iterator[None]:
        """In time and in memory."""

        def late(*_: Any) -> None:
            raise Hangs(f"{self.told}: {what} takes more than {SECONDS} s")

        before = peak()
        for number, timer, seconds in (
            (signal.SIGPROF, signal.ITIMER_PROF, SECONDS),
            (signal.SIGALRM, signal.ITIMER_REAL, 30 * SECONDS),
        ):
            signal.signal(number, late)
            signal.setitimer(timer, seconds)
        try:
            yield
        finally:
            for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
                signal.setitimer(timer, 0)
        grown = peak() - before
        assert grown < MEGABYTES, f"{self.told}: {what} took {grown:.0f} MB"


def peak() -> float:
    """The most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


@pytest.mark.parametrize("group", range(GROUPS))
def test_a_folder_of_somebody_is_read_or_refused(world: World, group: int) -> None:
    for seed in range(group, CASES, GROUPS):
        Case(world, seed).play()


@pytest.mark.slow
def test_a_folder_of_somebody_is_read_or_refused_ten_thousand_times(world: World) -> None:
    for seed in range(SOAK):
        Case(world, seed).play()


if __name__ == "__main__":
    import tempfile
    import traceback

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as made:
        here = build(Path(made), patch)
        first, *last = map(int, sys.argv[1:])
        began, failed = time.perf_counter(), []
        for number in range(first, last[0] if last else first + 1):
            case = Case(here, number)
            try:
                case.play()
            except (Exception, Hangs) as error:
                failed.append(number)
                sys.stdout.write(f"{case.told}\n{''.join(traceback.format_exception(error))}\n")
            else:
                if not last:
                    sys.stdout.write(f"{case.told}\n")
        sys.stdout.write(f"failed: {failed}, {time.perf_counter() - began:.1f} s\n")

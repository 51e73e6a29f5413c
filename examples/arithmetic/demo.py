"""Train, be killed twice, go on, and hold the result against a run that was never killed.

Runs `rollforward train` on the arithmetic task of this folder two times with the same
configuration. The second time the process is ended by SIGKILL at two moments drawn at random,
one inside generation and one inside an update, and started again with `--resume_training`.
Prints a table and draws both reward curves. Exits with 1 unless the final policy, optimizer
and reference of the two runs have the same digests.

The moments come from the operating system's randomness; `--seed` repeats those of an earlier
demo. To be sure where a kill lands, the process is stopped first (SIGSTOP), its heartbeat
read, and only then killed, if it still is where it should be.

With `--storage s3` the run that is killed trains straight to a bucket of SeaweedFS, which the demo starts
on this machine, and after each kill its working folder is deleted: as if the machine had been lost.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rollforward.replay import metrics
from rollforward.storage.address import open_storage

HERE = Path(__file__).resolve().parent
ROLLFORWARD = Path(sys.executable).with_name("rollforward")
MARKER = "made-by-rollforward-demo"
ROLES = ("policy_model", "optimizer", "ref")
console = Console()


@dataclass(frozen=True)
class Kill:
    """One SIGKILL, and what it cost."""

    phase: str
    position: str
    global_step: int
    """Steps that were done when it came."""
    seconds_to_new_step: float
    """From the restart of the process until a step that had not been done before was done."""


@dataclass
class Run:
    """A run's folder, and the process that works in it."""

    name: str
    folder: Path
    config: Path
    address: str = ""
    """Of a run in a bucket."""
    kills: list[Kill] = field(default_factory=list)

    @property
    def checkpoints(self) -> str:
        """`--save_checkpoint_dir`."""
        return self.address or str(self.folder / "save_ckpt")

    @property
    def here(self) -> Path:
        """Where the files are that are only of this machine."""
        return self.folder / ("work" if self.address else "save_ckpt")

    def lose_the_machine(self) -> None:
        """Delete what is not in the bucket."""
        shutil.rmtree(self.here)

    def start(self, *, resume: bool) -> "subprocess.Popen[bytes]":
        """Start `rollforward train`; its output goes to a log file in the run's folder."""
        command = [str(ROLLFORWARD), "train", "--config", str(self.config)]
        command += ["--save_checkpoint_dir", self.checkpoints]
        command += ["--save_strategy_dir", str(self.folder / "strategy")]
        if self.address:
            command += ["--work_dir", str(self.here), "--journal_durability", "remote"]
            command += ["--set", "rl_config.lease_seconds=5"]
        if resume:
            command += ["--resume_training"]
            command += ["--actor_checkpoint_path", f"{self.checkpoints}/train"]
            command += ["--ref_checkpoint_path", f"{self.checkpoints}/ref"]
        else:
            command += ["--actor_checkpoint_path", str(HERE / "model")]
        with (self.folder / "train.log").open("ab") as log:
            return subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | {"LOCAL_DEFAULT_PATH": str(self.folder)},
                # The configuration names its data from here.
                cwd=HERE.parent.parent,
            )

    def steps(self) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl`; a last line that is still being written is left out."""
        # A run in a bucket has them on this machine while it trains.
        path = self.here / "spool" / "rank_0" / metrics.FILE if self.address else self.here / metrics.FILE
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return metrics.read_from(open_storage(self.address)) if self.address else []
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def doing(self) -> tuple[str, str]:
        """(phase, position) of the training process, from its heartbeat; empty words when unknown."""
        try:
            pulse = json.loads((self.here / "heartbeat" / "rank_0.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return "", ""
        return pulse["phase"], pulse["position"]

    def fail(self, code: int) -> None:
        """Show the end of the log and stop the demo."""
        tail = (self.folder / "train.log").read_text(encoding="utf-8", errors="replace").splitlines()[-25:]
        console.print("\n".join(tail), markup=False, highlight=False)
        sys.exit(f"{self.name}: rollforward train ended with exit code {code}; log: {self.folder}/train.log")


def watch(run: Run, process: "subprocess.Popen[bytes]", pause: float = 0.02) -> Iterator[None]:
    """Come back every `pause` seconds while the process lives; a failed process ends the demo."""
    shown = len(run.steps())
    while process.poll() is None:
        yield
        steps = run.steps()
        if len(steps) >= shown + 5:
            shown = len(steps)
            reward = statistics.fmean(row["reward"] for row in steps[-5:])
            console.print(f"  {run.name}: {shown} steps, reward {reward:.2f}", highlight=False)
        time.sleep(pause)
    if process.returncode not in (0, -signal.SIGKILL):
        run.fail(process.returncode)


def kill_inside(
    run: Run, process: "subprocess.Popen[bytes]", phase: str, step: int, delay: float
) -> tuple[str, str]:
    """SIGKILL the process `delay` seconds into a phase, at or after a step; where it landed."""
    for _ in watch(run, process, pause=0.002):
        doing, position = run.doing()
        if doing != phase or int(position.split("_")[1]) < step:
            continue
        time.sleep(delay)
        process.send_signal(signal.SIGSTOP)
        if run.doing() == (phase, position):
            process.kill()
            process.wait()
            return phase, position
        process.send_signal(signal.SIGCONT)
        delay /= 2
    sys.exit(f"{run.name}: the run was over before it could be killed inside {phase} at step {step}")


def train_in_peace(run: Run) -> None:
    """Train from start to end."""
    process = run.start(resume=False)
    for _ in watch(run, process):
        pass


def train_through_kills(run: Run, plan: Sequence[tuple[int, str, float]]) -> None:
    """Train, and at each (step, phase, delay) of the plan be killed and resume."""
    process = run.start(resume=False)
    for step, phase, delay in plan:
        phase, position = kill_inside(run, process, phase, step, delay)
        done = len(run.steps())
        console.print(f"  {run.name}: [red]SIGKILL[/red] inside {phase} of step {position}", highlight=False)
        if run.address:
            run.lose_the_machine()
        restarted = time.monotonic()
        process = run.start(resume=True)
        for _ in watch(run, process):
            rows = run.steps()
            if rows and rows[-1]["global_step"] >= done:
                break
        spent = time.monotonic() - restarted
        run.kills.append(Kill(phase, position, done, spent))
    for _ in watch(run, process):
        pass


def plan_kills(chance: random.Random, steps: Sequence[dict[str, Any]]) -> list[tuple[int, str, float]]:
    """Two moments: one inside generation, one inside an update, in either order, at steps far apart."""
    count = len(steps)
    early = chance.randrange(count // 8, count // 2 - 1)
    late = chance.randrange(count // 2 + 1, count - 2)
    phases = chance.sample(["generate", "update"], 2)
    typical = {
        phase: statistics.median(row[f"seconds/{phase}"] for row in steps) for phase in ("generate", "update")
    }
    return [
        (step, phase, chance.uniform(0.0, 0.9) * typical[phase])
        for step, phase in zip((early, late), phases, strict=True)
    ]


def final_digests(run: Run) -> dict[str, str]:
    """Role -> digest of the run's newest checkpoint, every byte verified by `rollforward inspect`."""
    command = [str(ROLLFORWARD), "inspect", run.checkpoints, "--deep", "--json"]
    listed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    newest = listed["checkpoints"][-1]
    if not newest["valid"]:
        sys.exit(f"{run.name}: the last checkpoint is not valid: {newest['reason']}")
    return {role: newest["digests"][role] for role in ROLES}


def reward_at_ends(steps: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Mean reward of the first and of the last five steps."""
    return (
        statistics.fmean(row["reward"] for row in steps[:5]),
        statistics.fmean(row["reward"] for row in steps[-5:]),
    )


def show(runs: Sequence[Run], digests: Sequence[dict[str, str]]) -> None:
    """Print the table."""
    table = Table("", *[run.name for run in runs])
    ends = [reward_at_ends(run.steps()) for run in runs]
    table.add_row("reward, first five steps", *[f"{first:.3f}" for first, _ in ends])
    table.add_row("reward, last five steps", *[f"{last:.3f}" for _, last in ends])
    table.add_row("steps", *[str(len(run.steps())) for run in runs])
    table.add_row(
        "killed inside", *["\n".join(f"{k.phase} of {k.position}" for k in run.kills) or "-" for run in runs]
    )
    table.add_row(
        "seconds from restart to the first new step",
        *["\n".join(f"{k.seconds_to_new_step:.1f}" for k in run.kills) or "-" for run in runs],
    )
    for role in ROLES:
        # In two halves: a whole digest would not fit a terminal of 80 columns twice.
        table.add_row(f"digest of {role}", *[f"{found[role][:16]}\n{found[role][16:]}" for found in digests])
    console.print(table)


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draw both reward curves, the kills marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    for run, width, colour in zip(runs, (6.0, 1.8), ("#9ecae1", "#08306b"), strict=True):
        steps = run.steps()
        x, y = [row["global_step"] for row in steps], [row["reward"] for row in steps]
        axes.plot(x, y, color=colour, linewidth=width, label=run.name, solid_capstyle="round")
        for kill in run.kills:
            axes.axvline(kill.global_step, color="#cb181d", linestyle="--", linewidth=1.2)
            axes.annotate(
                f"SIGKILL in {kill.phase}",
                (kill.global_step, axes.get_ylim()[0]),
                xytext=(4, 6),
                textcoords="offset points",
                color="#cb181d",
                fontsize=9,
            )
    axes.set(xlabel="step", ylabel="mean reward", title="The same run, killed twice and never killed")
    axes.legend(loc="upper left")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def write_page(runs: Sequence[Run], path: Path) -> Path:
    """One page of both runs, by `rollforward report`."""
    command = [
        str(ROLLFORWARD),
        "report",
        *(run.checkpoints for run in reversed(runs)),
        "--out",
        str(path),
    ]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return path


@contextlib.contextmanager
def bucket(folder: Path) -> Iterator[str]:
    """The address of a bucket of SeaweedFS, which runs as long as the block; $WEED is its program."""
    sys.path.insert(0, str(HERE.parent.parent / "tests" / "objects"))
    from servers import BUCKET, SECRET, USER, SeaweedFS

    server = SeaweedFS(folder, weed=os.environ["WEED"])
    server.start()
    os.environ |= {"AWS_ACCESS_KEY_ID": USER, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1"}
    os.environ["AWS_ENDPOINT_URL"] = server.url
    try:
        yield f"s3://{BUCKET}"
    finally:
        server.stop()


def fresh_folder(path: Path) -> Path:
    """An empty folder; what an earlier demo left in it is removed, anything else is left alone."""
    if path.exists() and any(path.iterdir()):
        if not (path / MARKER).exists():
            sys.exit(f"{path} is not empty and not from an earlier demo; name another with --out")
        shutil.rmtree(path)
    path.mkdir(parents=True, exist_ok=True)
    (path / MARKER).touch()
    return path


def main() -> int:
    """Run both, compare, report; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("demo_output"), help="where the runs go (default: %(default)s)"
    )
    parser.add_argument(
        "--storage",
        choices=("folder", "s3"),
        default="folder",
        help="where the killed run is (default: folder)",
    )
    parser.add_argument("--seed", type=int, default=None, help="repeat the moments of an earlier demo")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(2**32)
    out = fresh_folder(options.out.resolve())
    # A copy: whatever happens to the original meanwhile, both runs are of the same configuration.
    config = Path(shutil.copy(HERE / "grpo.yaml", out / "grpo.yaml"))
    runs = [
        Run("never killed", out / "never_killed", config),
        Run("killed twice", out / "killed_twice", config),
    ]
    for run in runs:
        run.folder.mkdir()
    with contextlib.ExitStack() as stack:
        if options.storage == "s3":
            runs[1].address = stack.enter_context(bucket(out / "seaweedfs")) + "/killed_twice"
        return compare(runs, seed, out)


def compare(runs: Sequence[Run], seed: int, out: Path) -> int:
    """Train both, and say whether they are equal; the exit code."""
    began = time.monotonic()

    console.print(f"Training without interruption (log: {runs[0].folder}/train.log)", highlight=False)
    train_in_peace(runs[0])
    console.print(
        f"Training again, killed at two random moments (--seed {seed} repeats them)", highlight=False
    )
    train_through_kills(runs[1], plan_kills(random.Random(seed), runs[0].steps()))

    digests = [final_digests(run) for run in runs]
    show(runs, digests)
    picture = out / "rewards.png"
    draw(runs, picture)
    page = write_page(runs, out / "report.html")
    console.print(f"Open in a browser, with every curve, start and completion: {page}", highlight=False)
    console.print(
        f"Both reward curves: {picture}. The demo took {time.monotonic() - began:.0f} s.", highlight=False
    )
    if digests[0] != digests[1]:
        console.print("[bold red]The digests differ: the resumed run is not the run that was never killed.")
        return 1
    console.print(
        "[bold green]Equal, bit for bit: the kills left no trace in policy, optimizer or reference."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Recovery side by side: python benchmarks/recovery.py [--model demo|large] [--rounds 2] [--picture FILE]

A run with a checkpoint every `--interval` steps is killed in mid-interval, halfway through a chunk.
Copies of it go on in four ways (`recovery_runs` says what each is), and the seconds are taken until the first
*new* step is done: the one that was under way. They begin with the death of the trainer where a standby
takes over, and with the start of the process elsewhere. Two of the ways are taken once more with a run that
chose its interval itself, which is what the targets are about: MindRLHF's way has no such choice.

    notice     from the death until the standby is called: by the supervisor, which ends what is left
    start      interpreter, imports, configuration and data, and the framework: the same for all
    compile    model and graphs, from graphs that an earlier start kept: the same for all
    load       finding the checkpoint, reading it, verifying it (where that is done)
    journal    reading it
    redo       the steps since the checkpoint: replayed, or generated and trained again
    new step   the first new one; all before it is the time to its start, for which there are targets
    other      what is left: the lock, folders, observers

Of each part the best of the rounds is shown, since other work on a machine only adds; of start, compile
and other, which are the same code, the best of all ways that have them. Totals are sums of these. Then
goodput (`recovery_goodput`), and real runs of the demo's model that are killed again and again, to hold that
against.

Files are read from the page cache, where the run that was killed had left them. A restart without a standby
takes as long to notice as with one. Left out: several workers, and a machine that has to be replaced.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import recovery_goodput
from recovery_goodput import Costs
from recovery_runs import (
    AUTO,
    BY_STANDBY,
    HERE,
    WAYS,
    WITHOUT_JOURNAL,
    Run,
    Shape,
    Task,
    demo_task,
    random_task,
)

from rollforward.replay.saving import INTERVAL
from rollforward.wording import counted

LEAST_STEPS = 4
"""Before a kill: the first steps of a run are slower."""
LEAST_AUTO_STEPS = 12
"""Until a run that measures what saving costs has settled."""
TARGETS = {
    "demo": {"standby, auto": 1.5, "replay, auto": 3.0},
    "large": {"standby, auto": 0.2, "replay, auto": 0.35},
}
"""Seconds from the death to the first new step's start; for the large model, of what `reload` takes."""
GOODPUT_TARGET = 0.95
"""Of the large model with a standby, killed once in `recovery_goodput.KILL_EVERY` steps."""
PARTS = ("notice", "start", "compile", "load", "journal", "redo", "new step", "other")
SAME = ("start", "compile", "other")
"""What has nothing to do with how a run goes on."""


def main() -> None:
    """Measure, print tables, draw."""
    options, began = parse(), time.monotonic()
    if find_spec("matplotlib") is None:
        raise SystemExit("the picture needs matplotlib: pip install 'rollforward[plot]'")
    busy = os.getloadavg()[0]
    if busy > 0.5:
        print(f"warning: the load of this machine is {busy:.1f}; what else runs on it is measured too")
    results = {}
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="recovery-bench-") as name:
        for model in options.model or ["demo", "large"]:
            folder = Path(name) / model
            folder.mkdir()
            if model == "demo":
                task = demo_task()
            else:
                task = random_task(folder, Shape(**{field: getattr(options, field) for field in SHAPE}))
            print(f"{task.name}: {task.parameters / 1e6:.1f} M parameters", flush=True)
            result = results[task.name] = measure(task, folder, options.rounds, options.interval)
            print(told(result), flush=True)
            print(held_against_targets(model, result), flush=True)
            if model == "demo" and options.real_steps:
                result["real"] = real_runs(task, folder, result, options.real_steps)
    recovery_goodput.draw(results, options.picture)
    print(f"drawn: {options.picture}; all of it took {time.monotonic() - began:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2, default=asdict))


SHAPE = {
    "hidden": (512, "width of the large model"),
    "layers": (8, "its depth"),
    "vocabulary": (8192, "its words"),
    "tokens": (40, "of each of its completions"),
    "generations": (4, "its completions for each prompt"),
    "chunks": (2, "its prompts a step, one a chunk"),
}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("demo", "large"), action="append", help="default: both")
    parser.add_argument("--rounds", type=int, default=2, help="default: %(default)s")
    parser.add_argument(
        "--interval", type=int, default=10, help="steps between checkpoints (default: %(default)s)"
    )
    parser.add_argument(
        "--real_steps", type=int, default=40, help="of the real runs; 0: none (default: %(default)s)"
    )
    for name, (default, text) in SHAPE.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    parser.add_argument("--picture", type=Path, default=Path("output/recovery.png"), help="PNG to draw")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    return parser.parse_args()


def measure(task: Task, folder: Path, rounds: int, interval: int) -> dict[str, Any]:
    """Kill two runs, go on with copies in each way in turn, and what the model of goodput needs."""
    killed = Run(task, folder / "killed", interval=interval, steps=100)
    middle = interval // 2 + interval * -(-max(LEAST_STEPS - interval // 2, 0) // interval)
    killed.kill_inside_generation(killed.start(), middle)
    chose = Run(task, folder / "chose", interval="auto", steps=100)
    chose.take_graphs(killed)
    chose.kill_inside_generation(chose.start(), LEAST_AUTO_STEPS)
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    steps: list[dict[str, Any]] = killed.records()[2:]
    # It may have been hit a step later than it was aimed at.
    again = {way: (chose if way.endswith(AUTO) else killed).again() for way in WAYS}
    outcomes = set()
    for number in range(rounds):
        for way in WAYS:
            run = (chose if way.endswith(AUTO) else killed).copy(folder / f"{way}_{number}")
            steps_done = run.done() + 1
            if way in BY_STANDBY:
                run.until_done_by_standby(steps_done)
            else:
                run.until_done(run.start(way), steps_done)
            found[way].append(parts(run))
            *redone, new = run.records()
            if way in WITHOUT_JOURNAL:
                # Whole steps too; the first one of a process is slower.
                steps += redone[-again[way] + 1 :]
            outcomes.add((new["global_step"], new["tokens"], new["loss"], new["grad_norm"]))
            print(f"  round {number + 1} of {rounds}: {way} {found[way][-1]['total']:.1f} s", flush=True)
    if len(outcomes) != len({step for step, *_ in outcomes}):
        raise SystemExit(f"the new step is not the same in all ways: {outcomes}")
    best = best_of(found)
    return {
        "steps_again": again,
        "auto": chose.saved().state[INTERVAL]["steps"],
        "recoveries": best,
        "rounds": found,
        "costs": costs(killed, best, steps, again),
    }


def best_of(found: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Each way's best part by part, and their sum."""
    everyone = [one for way, each in found.items() if way not in BY_STANDBY for one in each]
    best = {
        way: {
            part: min(one[part] for one in (everyone if part in SAME and way not in BY_STANDBY else each))
            for part in PARTS
        }
        for way, each in found.items()
    }
    return {way: {**one, "total": sum(one.values())} for way, one in best.items()}


def parts(run: Run) -> dict[str, float]:
    """Where the seconds went between the newest start and its first new step."""
    report, record, started = run.report(), run.records()[-1], run.started[-1]
    seconds = report.seconds
    total = record["time"] - started
    # When its replay began, and how long before that its process was started, or a standby was called.
    replayed = datetime.fromisoformat(report.time).timestamp()
    called = replayed - (seconds["total"] - seconds["replay"])
    found = {
        "notice": called - started if report.standby else 0.0,
        "start": seconds["prepare"] + seconds["framework"],
        "compile": seconds["engine"],
        "load": seconds["find"] + seconds["load"],
        "journal": seconds["journal"],
        "redo": seconds["replay"],
        "new step": total - (replayed - started) - seconds["replay"],
    }
    return {**found, "other": total - sum(found.values()), "total": total}


def costs(
    killed: Run,
    best: Mapping[str, Mapping[str, float]],
    steps: Sequence[Mapping[str, Any]],
    again: Mapping[str, int],
) -> dict[str, Costs]:
    """What the model needs; besides what is known, from a run that saves at each step, and a save."""
    step = statistics.median(duration(record) for record in steps)
    update = statistics.median(record["seconds/update"] for record in steps)
    saving = Run(killed.task, killed.folder.with_name("saving"), interval=1, steps=8)
    saving.take_graphs(killed)
    saving.until_done(saving.start(), 8)
    ours = statistics.median(duration(record) for record in saving.records()[2:]) - step
    script = [sys.executable, str(HERE / "recovery_runs.py"), "--save_cost", str(saving.saves)]
    done = subprocess.run(script, stdout=subprocess.PIPE, text=True, check=True)
    theirs = float(done.stdout.splitlines()[-1])
    return {
        way: Costs(
            step=step,
            update=update,
            restart=max(one["total"] - one["redo"] - step, 0.0),
            redo=one["redo"] / max(again[way], 1),
            save=theirs if way == "reload" else max(ours, 0.0),
            chunks=killed.task.chunks,
            journal=way not in WITHOUT_JOURNAL,
            shadow=way != "reload",
        )
        for way, one in best.items()
        if not way.endswith(AUTO)
    }


def duration(record: Mapping[str, Any]) -> float:
    """Seconds of a step, all phases."""
    return sum(value for name, value in record.items() if name.startswith("seconds/"))


def told(result: Mapping[str, Any]) -> str:
    """The tables of a model."""
    recoveries, of = result["recoveries"], result["costs"]["replay"]
    generation = 1 - of.update / of.step
    lines = [
        f"a step takes {of.step:.2f} s, {generation:.0%} of it before its update; auto saves every "
        f"{counted(result['auto'], 'step')}; seconds, and steps to do again:",
        f"{'':<18}" + "".join(f"{part:>10}" for part in (*PARTS, "total", "steps")),
    ]
    for way, one in recoveries.items():
        figures = "".join(f"{one[part]:>10.2f}" for part in (*PARTS, "total"))
        lines.append(f"{way:<18}{figures}{result['steps_again'][way]:>10}")
    ours, theirs = recoveries["replay"], recoveries["reload"]
    share = sum(theirs[part] for part in SAME) / theirs["total"]
    apart = [one["total"] - sum(one[part] for part in SAME) for one in (ours, theirs)]
    lines += [
        f"replay / reload: {ours['total'] / theirs['total']:.2f} of the time from the start of the process; "
        f"{apart[0] / apart[1]:.2f} of what is left",
        f"without start, compile and other, which have nothing to do with it and are {share:.0%} of reload; "
        f"redo alone {ours['redo'] / theirs['redo']:.2f}",
        f"a checkpoint holds up training for {of.save:.3f} s, one of MindRLHF's for "
        f"{result['costs']['reload'].save:.3f} s",
        recovery_goodput.table(result["costs"]),
    ]
    return "\n".join(lines)


def held_against_targets(model: str, result: Mapping[str, Any]) -> str:
    """From the death to the first new step's start, and goodput, beside what they are to be."""
    recoveries = result["recoveries"]
    until = {way: one["total"] - one["new step"] for way, one in recoveries.items()}
    # A supervisor notices as soon whether a standby waits or not.
    until["replay, auto"] += recoveries["standby"]["notice"]
    lines = []
    for way, target in TARGETS[model].items():
        figure, unit = until[way], "s"
        if model == "large":
            figure, unit = until[way] / until["reload"], f"of {until['reload']:.2f} s by MindRLHF's way"
        said = "reached" if figure <= target else "missed"
        lines.append(
            f"death to the first new step's start, {way}: {figure:.2f} {unit}; target {target:.2f}: {said}"
        )
    if model == "large":
        goodput = result["costs"]["standby"].goodput(result["auto"])
        said = "reached" if goodput >= GOODPUT_TARGET else "missed"
        lines.append(
            f"goodput with a standby, auto, a checkpoint every {counted(result['auto'], 'step')}, killed "
            f"once in {recovery_goodput.KILL_EVERY}: {goodput:.1%}; target {GOODPUT_TARGET:.0%}: {said}"
        )
    return "\n".join(lines)


def real_runs(task: Task, folder: Path, result: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """A whole run in two ways, killed in mid-interval each time, beside what the model says of it."""
    interval = recovery_goodput.KILL_EVERY
    kills = range(interval // 2, steps, interval)
    found = {}
    for way in ("replay", "reload"):
        run = Run(task, folder / f"real {way}", interval=interval, steps=steps)
        run.take_graphs(Run(task, folder / "killed", interval=interval, steps=100))
        process, again, began = run.start(), [], 0.0
        for kill in kills:
            run.kill_inside_generation(process, kill)
            first = run.records()[0]
            began = began or first["time"] - duration(first)
            again.append(run.done() % interval)
            process = run.start(way)
        run.until_done(process, steps)
        # The saves of `reload` are ours here.
        of = replace(result["costs"][way], save=result["costs"]["replay"].save)
        seconds = run.records()[-1]["time"] - began
        modelled = of.seconds(steps=steps, interval=interval, again=again)
        found[way] = {"seconds": seconds, "model": modelled, "goodput": steps * of.step / seconds}
        print(
            f"real run, {way}: {steps} steps, checkpoints every {interval}, killed {len(again)} times with "
            f"{again} steps to do again: {seconds:.1f} s, the model says {modelled:.1f} s; goodput "
            f"{found[way]['goodput']:.1%}, the model says {steps * of.step / modelled:.1%}",
            flush=True,
        )
    return found


if __name__ == "__main__":
    main()

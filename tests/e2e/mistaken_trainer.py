"""A small real trainer, in NumPy, with checkpoints and a log, that can make the classic mistakes.

    python mistaken_trainer.py OUT [--mistake NAME] [--waits_at STEP ...] [--resume]

Regression with noise on the inputs, momentum, a decaying learning rate, and a reference that the weights are
drawn to and that follows them now and then. Three epochs of six steps, a checkpoint after every fourth step.
In the run that is to be killed it waits at some steps, each once, so that a kill hits exactly there however
slow the machine is.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

EPOCHS, STEPS, BATCH, SIZE = 3, 6, 8, 5
WAITS_AT = (7, 10)
WAITING = [f"^waiting after step {step}$" for step in WAITS_AT]
MISTAKES = ["none", "schedule_twice", "schedule_restarts", "optimizer", "data_restarts", "first_epochs_order"]
MISTAKES += ["random", "weights", "reference", "epoch_skipped", "logged_twice", "not_logged", "begins_anew"]
MISTAKES += ["fails", "hangs", "drifts", "leaves_child"]


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--mistake", choices=MISTAKES, default="none")
    parser.add_argument("--waits_at", type=int, nargs="+", default=WAITS_AT)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    Trainer(out, options.mistake, options.waits_at).train(
        resume=options.resume and options.mistake != "begins_anew"
    )


class Trainer:
    """The state, and the loop over it."""

    def __init__(self, out: Path, mistake: str, waits_at: Sequence[int]) -> None:
        self.out, self.mistake, self.waits_at = out, mistake, waits_at
        self.weights, self.momentum, self.reference = np.zeros((3, SIZE))
        self.step = self.scheduled = self.offset = 0
        self.noise = np.random.default_rng(1)
        source = np.random.default_rng(0)
        self.inputs = source.normal(size=(STEPS * BATCH, SIZE))
        self.targets = self.inputs @ source.normal(size=SIZE)

    def train(self, *, resume: bool) -> None:
        """To the end, from the newest checkpoint."""
        if resume:
            self.restore()
        if self.mistake == "leaves_child":
            self.start_child()
        while self.step < EPOCHS * STEPS:
            self.one_step()
            if self.step % 4 == 0 or self.step == EPOCHS * STEPS:
                self.save()

    def one_step(self) -> None:
        """Choose data and learning rate, compute, update, log."""
        epoch = self.step // STEPS
        data_epoch, data_within = divmod(self.step - self.offset, STEPS)
        order = np.random.default_rng([2, data_epoch]).permutation(STEPS * BATCH)
        ids = order[data_within * BATCH : (data_within + 1) * BATCH]
        rate = 0.1 * 0.9**self.scheduled
        noisy = self.inputs[ids] + 0.1 * self.noise.normal(size=(BATCH, SIZE))
        errors = noisy @ self.weights - self.targets[ids]
        apart = self.weights - self.reference
        loss, kl = float(np.mean(errors**2)), float(apart @ apart)
        self.step += 1
        self.momentum = 0.8 * self.momentum + 2 * errors @ noisy / BATCH + 0.1 * apart
        self.weights = self.weights - rate * self.momentum
        self.scheduled += 1
        if self.step % 5 == 0:
            self.reference = self.weights.copy()
        if self.mistake == "drifts":
            # By an amount that a test can rely on: less after a kill than between two runs in peace.
            loss += {"undisturbed": 0.0, "again": 2e-3, "killed": 1e-3}[self.out.parent.name]
        row = {"step": self.step, "epoch": epoch, "lr": rate, "ids": ids.tolist(), "loss": loss, "kl": kl}
        self.log(row | {"seconds": time.perf_counter()})
        self.wait()

    def log(self, row: dict[str, object]) -> None:
        """A line in the file and one on standard output."""
        if self.mistake == "not_logged" and self.out.parent.name == "killed" and row["step"] == 4:
            return  # a log that is not flushed before the checkpoint is written loses its end in a kill
        with (self.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"step {row['step']}: loss {row['loss']:.4f}")

    def wait(self) -> None:
        """Until the kill comes, if one is to come here."""
        mark = self.out / f"waited_{self.step}"
        if self.out.parent.name == "killed" and self.step in self.waits_at and not mark.exists():
            mark.touch()
            print(f"waiting after step {self.step}")
            time.sleep(600)

    def save(self) -> None:
        """A folder that has its name when it is complete."""
        folder = self.out / f"writing-{self.step}"
        folder.mkdir(exist_ok=True)
        save_file({"weights": self.weights}, folder / "model.safetensors")
        save_file({"momentum": self.momentum}, folder / "optimizer.safetensors")
        save_file({"weights": self.reference}, folder / "reference.safetensors")
        state = self.noise.bit_generator.state["state"]
        halves = [half for value in (state["state"], state["inc"]) for half in divmod(value, 1 << 64)]
        save_file({"generator": np.array(halves, np.uint64)}, folder / "random.safetensors")
        finished = self.out / f"checkpoint-{self.step}"
        if finished.exists():
            shutil.rmtree(finished)
        folder.rename(finished)

    def restore(self) -> None:
        """Everything from the newest checkpoint, but for the mistake."""
        newest = max(self.out.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
        self.step = self.scheduled = int(newest.name.partition("-")[2])
        wrong = self.mistake
        if wrong == "fails":
            raise RuntimeError("size mismatch for weights")
        if wrong == "hangs":
            time.sleep(600)
        if wrong != "weights":
            self.weights = load_file(newest / "model.safetensors")["weights"]
        if wrong != "optimizer":
            self.momentum = load_file(newest / "optimizer.safetensors")["momentum"]
        if wrong != "reference":
            self.reference = load_file(newest / "reference.safetensors")["weights"]
        if wrong != "random":
            values = [int(value) for value in load_file(newest / "random.safetensors")["generator"]]
            state = self.noise.bit_generator.state
            state["state"] = {"state": (values[0] << 64) + values[1], "inc": (values[2] << 64) + values[3]}
            self.noise.bit_generator.state = state
        if wrong == "schedule_twice":
            self.scheduled = 2 * self.step
        if wrong == "schedule_restarts":
            self.scheduled = 0
        if wrong == "data_restarts":
            self.offset = self.step
        if wrong == "first_epochs_order":
            self.offset = self.step // STEPS * STEPS
        if wrong == "epoch_skipped":
            self.step = self.scheduled = -(-self.step // STEPS) * STEPS
        if wrong == "logged_twice":
            rows = map(json.loads, (self.out / "metrics.jsonl").read_text().splitlines())
            self.log(next(row for row in rows if row["step"] == self.step))

    def start_child(self) -> None:
        """A helper in a session of its own, which outlives a kill of the trainer's group."""
        program = "import time; time.sleep(600)"
        child = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
        with (self.out / "children").open("a") as file:
            file.write(f"{child.pid}\n")


if __name__ == "__main__":
    main()

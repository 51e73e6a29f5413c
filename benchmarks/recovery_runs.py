"""Runs for `benchmarks/recovery.py`: what is trained, how it is killed, and the ways to go on.

    standby             with `--max_restarts --standby`: the trainer is killed when the standby is ready
    replay              `rollforward train --resume_training`, as it is
    without journal     the same after the journal was removed: what was done is generated and trained again
    ..., auto           the same of a run with `save_ckpt_interval: auto`
    reload              stands in for MindRLHF (`mindrlhf/worker/train_worker.py` and `ref_worker.py`, read
                        in August 2025): the files of the newest checkpoint by `ms.load_checkpoint`, nothing
                        verified, no journal; then steps are generated and trained again

What `reload` does not do as MindRLHF: it reads safetensors, where MindRLHF's default is the slower
`ckpt`, and it goes on to save as Rollforward does. All else, process start, compiled graphs (kept
by earlier starts), data and model, is the same code for all, so what differs is what is compared.

As a script, this is `rollforward`, with the restoring that the way asks for. With `--save_cost RUN` it prints
the seconds for which MindRLHF's blocking saves would hold up training.
"""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from rollforward.position import Position
from rollforward.processes import heartbeat
from rollforward.replay import metrics
from rollforward.replay import report as recovery_report
from rollforward.replay.report import RecoveryReport
from rollforward.storage import LocalStorage
from rollforward.store import Manifest, find

REPOSITORY = Path(__file__).resolve().parents[1]
HERE = Path(__file__).resolve().parent
AUTO = ", auto"
"""Behind a way: the run that goes on in it had chosen its interval itself."""
WAYS = ("standby, auto", "replay, auto", "standby", "replay", "without journal", "reload")
BY_STANDBY = ("standby, auto", "standby")
WITHOUT_JOURNAL = WAYS[4:]
WAY = "RECOVERY_BENCHMARK_WAY"
"""Tells a process which of them it goes on in."""
PATIENCE = 300.0
"""Seconds without a new step after which a run is given up."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained: options of `rollforward train`."""

    name: str
    model: Path
    options: tuple[str, ...]
    chunks: int
    """Of a step."""
    parameters: int


def demo_task() -> Task:
    """The demo's model and configuration (`examples/arithmetic`)."""
    config = REPOSITORY / "examples" / "arithmetic" / "grpo.yaml"
    model = REPOSITORY / "examples" / "arithmetic" / "model"
    return Task(name="demo", model=model, options=("--config", str(config)), chunks=1, parameters=298_112)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model with random weights, and the work of a step; generation should be most of it."""

    hidden: int
    layers: int
    vocabulary: int
    tokens: int
    """Of each completion: no stop token is ever drawn."""
    generations: int
    chunks: int


def random_task(folder: Path, shape: Shape) -> Task:
    """A Qwen2 model with random weights and prompts of eight random words; written to `folder`."""
    from safetensors.numpy import save_file

    from rollforward.engines.mindspore.package import MindSpore

    config = {
        "model_type": "qwen2",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.hidden * 11 // 4,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.hidden // 64,
        "num_key_value_heads": max(shape.hidden // 256, 1),
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    }
    model = folder / "model"
    write_tokenizer(model, shape.vocabulary)
    (model / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(0)
    weights = {
        name: random.standard_normal(array.shape, dtype=np.float32) * np.float32(0.02)
        for name, array in MindSpore().tensor_layout(config)["policy_model"].items()
    }
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    problems = [
        {"prompt": " ".join(f"w{word}" for word in words), "answer": ""}
        for words in random.integers(3, shape.vocabulary, (256, 8)).tolist()
    ]
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    settings = {
        "rl_config.dataset_file": data,
        "rl_config.chunk_size": 1,
        "rl_config.num_rollouts": shape.chunks,
        "rl_config.num_generations": shape.generations,
        "rl_config.batch_size": shape.generations,
        "rl_config.beta": 0.01,
        "rl_config.loss_aggregation": "token_mean",
        "actor_config.lr_schedule.lr": 1e-5,
        "reward_config.verifier_function": "[recovery_runs:even_share]",
        "generate_config.max_prompt_length": 8,
        "generate_config.sampling_config.max_tokens": shape.tokens,
    }
    options = [f"--set={key}={value}" for key, value in settings.items()]
    parameters = sum(array.size for array in weights.values())
    return Task(
        name=f"{parameters / 1e6:.1f}M",
        model=model,
        options=tuple(options),
        chunks=shape.chunks,
        parameters=parameters,
    )


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Words `w3`, `w4`, ... with blanks between; the stop token is one that is hardly ever drawn."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = ["<pad>", "<eos>", "<unk>", *(f"w{index}" for index in range(3, vocabulary))]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(words[:3])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))


def even_share(completions: Sequence[str], **_: Any) -> list[float]:
    """A reward that differs between any two completions: the share of words with an even number."""
    rows = [[int(word[1:]) % 2 == 0 for word in text.split() if word[1:].isdigit()] for text in completions]
    return [sum(row) / max(len(row), 1) for row in rows]


@dataclass
class Run:
    """A run's folder, and the processes that work in it, one after the other."""

    task: Task
    folder: Path
    interval: int | str
    """Steps between checkpoints, or `auto`."""
    steps: int
    """Of the whole run."""
    started: list[float] = field(default_factory=list)
    """When each way to go on began, seconds since 1970: a process was started, or killed with a standby."""

    @property
    def saves(self) -> Path:
        """`--save_checkpoint_dir`."""
        return self.folder / "save_ckpt"

    def start(self, way: str = "") -> "subprocess.Popen[bytes]":
        """Start it, or go on in one of `WAYS`; the journal is removed for those that have none."""
        way = way.removesuffix(AUTO)
        self.folder.mkdir(exist_ok=True)
        command = [sys.executable, str(HERE / "recovery_runs.py"), "train", *self.task.options]
        command += [f"--set=rl_config.save_ckpt_interval={self.interval}"]
        command += [f"--set=rl_config.max_steps={self.steps}", "--set=rl_config.save_max_ckpt_num=2"]
        # What a step does must not depend on how long the run is.
        command += ["--set=actor_config.lr_schedule.decay_steps=1000"]
        command += ["--save_checkpoint_dir", str(self.saves), "--save_strategy_dir", str(self.folder / "s")]
        if way:
            command += ["--resume_training", "--actor_checkpoint_path", str(self.saves / "train")]
        else:
            command += ["--actor_checkpoint_path", str(self.task.model)]
        if way in WITHOUT_JOURNAL:
            shutil.rmtree(self.saves / "journal")
        command += ["--max_restarts", "9", "--standby"] if way == "standby" else []
        path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"LOCAL_DEFAULT_PATH": str(self.folder), "PYTHONPATH": path, WAY: way}
        with (self.folder / "train.log").open("ab") as log:
            self.started.append(time.time())
            return subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                cwd=REPOSITORY,
            )

    def take_graphs(self, other: "Run") -> None:
        """Begin with the graphs that another run of the task compiled."""
        shutil.copytree(other.saves / "compile_cache", self.saves / "compile_cache")

    def records(self) -> list[metrics.Record]:
        """A record for each step that is done."""
        return metrics.read(self.saves / metrics.FILE)

    def done(self) -> int:
        """Steps that are done."""
        records = self.records()
        return records[-1]["global_step"] + 1 if records else 0

    def saved(self) -> Manifest:
        """The newest checkpoint."""
        return find(LocalStorage(self.saves)).manifest

    def again(self) -> int:
        """Steps that are done and not in it: to do again."""
        return self.done() - self.saved().global_step

    def report(self) -> RecoveryReport:
        """Of the newest recovery."""
        return recovery_report.read(LocalStorage(self.saves))[-1]

    def watch(self, process: "subprocess.Popen[bytes]") -> Iterator[None]:
        """Come back often while the process lives and steps go on; afterwards it is gone in any case."""
        known, since = -1, time.monotonic()
        try:
            while process.poll() is None:
                yield
                time.sleep(0.01)
                if (size := self.metrics_size()) != known:
                    known, since = size, time.monotonic()
                if time.monotonic() - since > PATIENCE:
                    self.fail(f"no new step in {PATIENCE:.0f} s")
            if process.returncode:
                self.fail(f"ended with {process.returncode}")
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()

    def metrics_size(self) -> int:
        """Bytes; it changes with each step, and costs less to ask than to read."""
        try:
            return (self.saves / metrics.FILE).stat().st_size
        except FileNotFoundError:
            return 0

    def until_done(self, process: "subprocess.Popen[bytes]", steps: int) -> None:
        """Come back when so many steps are done; the process is killed then, unless it has ended."""
        size = -1
        for _ in self.watch(process):
            if size != (size := self.metrics_size()) and self.done() >= steps < self.steps:
                return
        if self.done() < steps:
            self.fail(f"ended after {self.done()} of {steps} steps")

    def kill_inside_generation(self, process: "subprocess.Popen[bytes]", step: int) -> None:
        """SIGKILL halfway through the generation of the first chunk of a step, or of the next that is hit.

        It is stopped first, and killed if it still is where it should be.
        """
        missed = None
        for _ in self.watch(process):
            pulse = heartbeat.read(self.saves, 0)
            if pulse is None or pulse == missed or pulse.pid != process.pid or pulse.phase != "generate":
                continue
            if Position.parse(pulse.position).step < step:
                continue
            time.sleep(max(0.0, pulse.time + 0.5 * self.typical_chunk() - time.time()))
            process.send_signal(signal.SIGSTOP)
            if heartbeat.read(self.saves, 0) == pulse:
                return
            process.send_signal(signal.SIGCONT)
            missed = pulse
        self.fail("was over before it could be killed")

    def until_done_by_standby(self, steps: int) -> None:
        """Go on with a supervisor, be killed halfway through the first new chunk, and go on by the standby.

        It is stopped there until its standby is ready, so that it comes no further than any other way.
        """
        # While a run resumes, its figures are not whole.
        halfway, trainer = 0.5 * self.typical_chunk(), 0
        process = self.start("standby")
        for _ in self.watch(process):
            if len(self.started) > 1:
                if self.done() >= steps:
                    return
            elif trainer and "standby: ready" in (self.folder / "train.log").read_text(errors="replace"):
                self.started.append(time.time())
                os.kill(trainer, signal.SIGKILL)
            elif not trainer:
                pulse = heartbeat.read(self.saves, 0)
                new = pulse is not None and Position.parse(pulse.position).step == steps - 1
                if pulse and new and pulse.time > self.started[0] and pulse.phase == "generate":
                    time.sleep(max(0.0, pulse.time + halfway - time.time()))
                    os.kill(pulse.pid, signal.SIGSTOP)
                    trainer = pulse.pid
        self.fail("was over before it could be killed")

    def typical_chunk(self) -> float:
        """Seconds to generate a chunk."""
        found = [row["seconds/generate"] for row in self.records() if "seconds/generate" in row]
        return statistics.median(found) / self.task.chunks

    def copy(self, folder: Path) -> "Run":
        """The same, elsewhere; tensor files, which are never changed, are linked."""

        def link(source: str, target: str) -> str:
            return (
                os.link(source, target) or target
                if source.endswith(".safetensors")
                else shutil.copy2(source, target)
            )

        shutil.copytree(self.folder, folder, copy_function=link)
        return replace(self, folder=folder, started=[])

    def fail(self, what: str) -> None:
        """Show the end of the log and stop."""
        log = self.folder / "train.log"
        tail = log.read_text(errors="replace").splitlines()[-20:]
        raise SystemExit("\n".join([*tail, f"{self.folder.name}: {what}; log: {log}"]))


def rollforward() -> None:
    """This process as `rollforward`, which restores as the way to go on says."""
    from rollforward.cli.main import run_process
    from rollforward.run import sources

    if os.environ[WAY] == "reload":
        sources.restore = restore_unverified
    run_process()


def restore_unverified(storage: LocalStorage, engine: Any, *, until: Any = None) -> Any:
    """In the place of `recovery.restore`: all bytes by MindSpore, as they are."""
    import mindspore as ms

    from rollforward.replay.recovery import Restored

    began = time.perf_counter()
    manifest = find(storage, until=until).manifest
    looked = time.perf_counter()
    sizes = {}
    for role, path in files_of(manifest):
        loaded = ms.load_checkpoint(str(Path(str(storage)) / path), format="safetensors")
        for name, parameter in loaded.items():
            engine.load(role, name, parameter.asnumpy())
        sizes[role] = sum(parameter.asnumpy().nbytes for parameter in loaded.values())
    return Restored(
        manifest=manifest,
        rejected=(),
        role_bytes=sizes,
        find_seconds=looked - began,
        seconds=time.perf_counter() - looked,
    )


def files_of(manifest: Any) -> list[tuple[str, str]]:
    """(role, path) of each tensor file of a checkpoint."""
    return [
        (role, manifest.tensor_file(role, rank).path)
        for role in manifest.roles
        for rank in range(manifest.world_size)
    ]


def save_cost(run: Path) -> float:
    """Seconds of MindRLHF's save: policy, optimizer and reference by `ms.save_checkpoint`; the best of three.

    As safetensors, MindSpore's faster form. Nothing is synced, as MindRLHF does not.
    """
    import mindspore as ms

    manifest = find(LocalStorage(run)).manifest
    loaded = {
        path: ms.load_checkpoint(str(run / path), format="safetensors") for _, path in files_of(manifest)
    }
    taken = []
    for _ in range(3):
        began = time.perf_counter()
        for number, parameters in enumerate(loaded.values()):
            listed = [{"name": name, "data": parameter} for name, parameter in parameters.items()]
            ms.save_checkpoint(listed, str(run.parent / f"saved_{number}.safetensors"), format="safetensors")
        taken.append(time.perf_counter() - began)
    return min(taken)


if __name__ == "__main__":
    if sys.argv[1] == "--save_cost":
        print(save_cost(Path(sys.argv[2])))
    else:
        rollforward()

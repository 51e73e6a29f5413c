"""One start of a run of TRL's trainer: what is recorded, saved and restored, and when.

    open_session        lock the folder, restore the newest checkpoint into model and reference
    begins              new run: its first checkpoint. Resumed: what transformers sets to its beginnings
    step_begins         the step before is over: its outcome is recorded, or compared with the record
    generated           rollouts from the journal, or made now and durable before they are used
    update_begins       weights change only from here ...
    update_ends         ... to here, where finished checkpoints are committed
    measured            what was logged goes to metrics.jsonl
    save                a checkpoint begins, written while the next step generates
    ends                the last checkpoint is committed

`trainer` says which method of transformers leads to each. A step of the run is an optimizer step, numbered as
`TrainerState.global_step` is. All of it is collective over the processes of the trainer.
"""

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from rollforward.errors import InputError
from rollforward.library import Run, Start, open_run
from rollforward.position import Position
from rollforward.replay.metrics import PLACE
from rollforward.replay.once import EVALUATION
from rollforward.storage import LocalStorage
from rollforward.storage.address import is_remote
from rollforward.store import Retention, load_manifest, restore_into
from rollforward.torch import HostCopies, load_optimizer, optimizer_tensors, process_group, put_back
from rollforward.torch.arrays import Arrays
from rollforward.torch.randomness import set_random_state
from rollforward.trl.attachments import attachments_of, tokenizer_files
from rollforward.trl.facts import facts_of, versions_of
from rollforward.trl.generation import add, collecting, pack, texts, unpack
from rollforward.trl.progress import CLOCK, TRAINER, Progress, gathered, optimizer_name

POLICY, REFERENCE, OPTIMIZER = "policy_model", "ref", "optimizer"
STATE_FILE = "trainer_state.json"
_BEST = "best"


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """How a run is recovered; `GRPOTrainer(..., recovery=Recovery(...))`."""

    on_divergence: Literal["stop", "accept"] = "stop"
    """When a replayed update gives other numbers than were recorded: stop, or accept the new ones."""
    prove_unchanged: bool = False
    """Digest all weights around each update, to find what changes them elsewhere."""
    log: Callable[[str], None] = print
    """Called with each line of the log, on the first process."""


class Roles:
    """The trainer's tensors that have a fixed layout: what is trained, and a reference that follows it."""

    def __init__(self, trainer: Any) -> None:
        model = trainer.model
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        kept = model.state_dict().keys()
        buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
        trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self.tensors: dict[str, dict[str, torch.Tensor]] = {POLICY: {**trained, **buffers}}
        self.frozen = [(name, each) for name, each in model.named_parameters() if not each.requires_grad]
        if trainer.ref_model is not None:
            reference = dict(trainer.accelerator.unwrap_model(trainer.ref_model).named_parameters())
            if trainer.args.sync_ref_model:
                self.tensors[REFERENCE] = reference
            else:
                self.frozen += [(f"reference {name}", each) for name, each in reference.items()]
        self._copies = HostCopies()

    def arrays(self) -> dict[str, Arrays]:
        """Role -> name -> array, as they are now."""
        return {role: self._copies.arrays(named, role) for role, named in self.tensors.items()}

    def versions(self) -> dict[str, int]:
        """How often each weight was changed in place. What is done to `.data` is not counted."""
        return {
            f"{role} {name}": each._version
            for role, named in self.tensors.items()
            for name, each in named.items()
            # A forward pass may change buffers, and DDP sends them around.
            if isinstance(each, torch.nn.Parameter)
        }

    def optimizer_arrays(self, optimizer: Any) -> Arrays:
        """The optimizer's state, empty before its first step."""
        return self._copies.arrays(optimizer_tensors(optimizer, self.names), OPTIMIZER)

    def put_back(self, arrays: Mapping[str, Arrays]) -> None:
        """Copy what was read into `arrays` into the tensors."""
        for role, named in arrays.items():
            put_back(self.tensors[role], named)


@contextmanager
def open_session(trainer: Any, stock: str | None, recovery: Recovery) -> Iterator["Session"]:
    """Open the run in the trainer's output folder, new or not. Collective.

    `stock`: a checkpoint in TRL's own form that a new run starts from.
    """
    args, processes, roles = trainer.args, process_group(), Roles(trainer)
    if is_remote(args.output_dir):
        raise InputError(
            f"output_dir is {args.output_dir}, and transformers writes files of its own there, so it must be "
            "a folder",
            hint="name a folder; rollforward copy brings it to the bucket, while it trains too",
        )
    best, attachments = 1 if args.load_best_model_at_end else 0, attachments_of(trainer)
    with (
        tempfile.TemporaryDirectory(prefix="rollforward-") as folder,
        open_run(
            args.output_dir,
            **processes,
            facts=facts_of(trainer, roles.frozen, tokenizer_files(attachments)),
            versions=versions_of(),
            keep=Retention(newest=args.save_total_limit or 0, best=best, metric=_BEST),
            attachments=attachments,
            prove_unchanged=recovery.prove_unchanged,
            on_divergence=recovery.on_divergence,
            log=recovery.log,
        ) as run,
    ):
        arrays = roles.arrays()
        start = run.restore(arrays, free=(OPTIMIZER, TRAINER, CLOCK))
        if start is None:
            yield Session(trainer, run, roles, folder=stock)
            return
        if not {TRAINER, CLOCK} <= start.free.keys():
            raise InputError(
                f"{args.output_dir} holds a run of another training loop, not one of rollforward.trl",
                hint="name another output_dir",
            )
        roles.put_back(arrays)
        session = Session(trainer, run, roles, folder=folder, start=start)
        if stock is not None and trainer.accelerator.process_index == 0:
            recovery.log(f"run: {args.output_dir} is resumed; {stock} is only where it once started from")
        Path(folder, STATE_FILE).write_bytes(session.restored.trainer_state(args))
        yield session


class Session:
    """What `open_session` returns; `trainer` calls it."""

    def __init__(
        self, trainer: Any, run: Run, roles: Roles, *, folder: str | None, start: Start | None = None
    ) -> None:
        self.folder = folder
        """What transformers resumes from: a folder with a trainer_state.json. None for a new run."""
        self.resumed = start is not None
        self.recording = False
        """Whether steps are recorded: from the first one to the end of training."""
        self._trainer = trainer
        self._run = run
        self._roles = roles
        self._optimizer_state = dict(start.free.get(OPTIMIZER, {})) if start else {}
        self._progress = Progress(start.free, process_group()["rank"]) if start else None
        self._step = start.step if start else 0
        """The step under way, or the newest one."""
        self._under_way = False
        self._losses: list[torch.Tensor] = []
        self._figures: dict[str, float] = {}
        """Logged, and not in `metrics.jsonl` yet."""
        self._grad_norm: float | None = None
        self._updating: AbstractContextManager[None] | None = None
        self._began = time.perf_counter()
        self._versions: dict[str, int] | None = None
        """How often PyTorch has changed each weight in place; None until the first update, or the restore."""
        self._saved_at: int | None = start.step if start else None
        self.best_step: int | None = self._progress.best_step if self._progress else None
        """The step of the checkpoint with the best policy, if that is looked for."""

    @property
    def restored(self) -> Progress:
        """What the checkpoint says about the trainer, in a resumed run."""
        assert self._progress is not None
        return self._progress

    @property
    def seconds(self) -> float:
        """Spent on training, over all starts that led here."""
        before = self.restored.seconds if self.resumed else 0.0
        return before + time.perf_counter() - self._began

    def _say(self, line: str) -> None:
        if self._trainer.accelerator.is_main_process:
            self._trainer.recovery.log(line)

    # The beginning

    def load_optimizer(self) -> None:
        """Moments, groups and learning rate, once transformers has made them.

        InputError for another optimizer. Numbers that were given otherwise now are the checkpoint's.
        """
        optimizer, groups = self._trainer.optimizer, self.restored.groups
        if optimizer_name(self._trainer) != self.restored.optimizer:
            raise InputError(
                f"the run was trained with {self.restored.optimizer}, and this trainer has "
                f"{optimizer_name(self._trainer)}",
                hint="go back to it; or export a checkpoint and start a new run from the model",
            )
        for line in _changed_numbers(optimizer.param_groups, groups):
            self._say(f"warning: {line}; as with TRL, a resumed run continues with the checkpoint's")
        load_optimizer(optimizer, self._roles.names, self._optimizer_state, groups)
        self._optimizer_state = {}
        self._trainer.lr_scheduler.load_state_dict(self.restored.scheduler)
        # By now the processes have been given the same weights; nobody else may change them.
        self._versions = self._roles.versions()

    def load_scaler(self) -> None:
        """The loss scale of FP16."""
        scaler = self._trainer.accelerator.scaler
        if scaler is not None and self.restored.scaler is not None:
            scaler.load_state_dict(self.restored.scaler)

    def load_random(self) -> None:
        """The random state of the checkpoint."""
        set_random_state(self.restored.random)

    def training_begins(self) -> None:
        """Transformers has set its counters to their beginnings."""
        if not self.resumed:
            return
        self.restored.load_rest(self._trainer)
        self.recording = True
        state = self._trainer.state
        if self.restored.was_stopped(state.max_steps):
            self._say(
                f"run: a callback ended it at step {state.global_step} of {state.max_steps}, so it is over; "
                "with another max_steps it continues"
            )
            self._trainer.control.should_training_stop = True

    def begins(self) -> None:
        """The state that a new run starts from is saved before anything else."""
        if not self.recording:
            self.recording = True
            self.save()

    # A step

    def step_begins(self) -> None:
        """The next optimizer step."""
        self.finish_step()
        self._step = self._trainer.state.global_step
        if self._run.until == Position(0, self._step):
            self.save()
        self._under_way = True
        self._losses, self._grad_norm = [], None

    def generated(self, generate: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The rollouts that `generate` makes, or made in an earlier start; with all that it does besides."""
        if self._updating is not None:
            # A callback evaluates within the update: a replay does so too.
            return generate()
        trainer = self._trainer
        mode = "train" if trainer.model.training else "eval"
        rank, count = trainer.accelerator.process_index, trainer.accelerator.num_processes
        fresh = None

        def record() -> tuple[Arrays, Any]:
            nonlocal fresh
            with collecting(trainer, mode) as logged:
                output = generate()
            fresh = output, logged
            return (
                pack(output, logged, main=rank == 0),
                texts(output, logged, rank, count, trainer.eos_token_ids),
            )

        name = "rollouts" if mode == "train" else EVALUATION
        arrays, _ = self._run.once(self._step, name, record, together=True)
        output, logged = fresh or unpack(arrays, trainer.accelerator.device)
        add(trainer, mode, logged)
        return output

    def update_begins(self) -> None:
        """Until `update_ends`, weights may change. InputError if they have changed since the last time."""
        self._check_untouched()
        self._updating = self._run.updating(self._step)
        self._updating.__enter__()

    def update_ends(self, grad_norm: Any) -> None:
        """After the optimizer and all callbacks; `grad_norm` is None where it was not computed."""
        if self._updating is not None:
            self._updating.__exit__(None, None, None)
            self._updating = None
            self._grad_norm = None if grad_norm is None else float(grad_norm)
            self._versions = self._roles.versions()
            self.measured({})

    def _check_untouched(self) -> None:
        """A checkpoint is written from the live weights, and a replay repeats updates alone."""
        if self._versions is None or self._trainer.use_vllm:
            return
        now = self._roles.versions()
        changed = [name for name, version in self._versions.items() if now[name] != version]
        if changed:
            told = f"{changed[0]} and {len(changed) - 1} others"
            raise InputError(
                f"step {self._step}: {told} changed before the optimizer's step",
                hint="a callback may change weights in on_optimizer_step and on_step_end, and nowhere else",
            )

    def add_loss(self, loss: torch.Tensor) -> None:
        """The loss of one forward pass of this process."""
        self._losses.append(loss.detach())

    def measured(self, logs: Mapping[str, Any]) -> None:
        """Figures that were logged at the end of the step."""
        numbers = {
            name: float(value)
            for name, value in logs.items()
            if isinstance(value, int | float) and math.isfinite(value) and name not in PLACE
        }
        self._figures |= numbers
        if self.recording and self._figures and self._updating is None:
            self._run.metrics(self._step, **self._figures)
            self._figures = {}

    def finish_step(self) -> None:
        """The step under way is over, with everything that belongs to it."""
        if not self._under_way:
            return
        self._under_way = False
        numbers = {"loss": float(torch.stack(self._losses).sum())}
        if self._grad_norm is not None:
            numbers["grad_norm"] = self._grad_norm
        self._run.outcome(self._step, **numbers)

    # Checkpoints

    def save(self) -> None:
        """Begin a checkpoint of the current state. Collective."""
        trainer, step = self._trainer, self._trainer.state.global_step
        self.finish_step()
        metrics = {}
        if trainer.state.best_global_step == step:
            # Only those that were the best so far take part: the best of them is then the newest, too.
            self.best_step = step
            best = trainer.state.best_metric
            metrics[_BEST] = best if trainer.args.greater_is_better else -best
        self._check_untouched()
        tensors = {
            **self._roles.arrays(),
            **gathered(trainer, self._roles.names, seconds=self.seconds, best_step=self.best_step),
        }
        if moments := self._roles.optimizer_arrays(trainer.optimizer):
            tensors[OPTIMIZER] = moments
        self._run.checkpoint(step, tensors, state={"metrics": metrics})
        self._saved_at = step

    def ends(self) -> None:
        """The end of training: the last state is saved, and everything is committed."""
        self.finish_step()
        if self._saved_at != self._trainer.state.global_step:
            self.save()
        self.recording = False
        self._run.close()

    def load_policy(self, step: int) -> None:
        """Read the policy of a checkpoint that was committed. CheckpointInvalid."""
        storage = LocalStorage(Path(self._trainer.args.output_dir).expanduser())
        arrays = {POLICY: self._roles.arrays()[POLICY]}
        restore_into(storage, load_manifest(storage, Position(0, step)), arrays)
        self._roles.put_back(arrays)


def _changed_numbers(now: list[dict[str, Any]], saved: list[dict[str, Any]]) -> list[str]:
    """Numbers of optimizer groups that were given otherwise, one line each."""
    changed = {}
    for mine, theirs in zip(now, saved, strict=False):
        for name in sorted(mine.keys() & theirs.keys() - {"params", "lr"}):
            given, kept = mine[name], theirs[name]
            if isinstance(given, int | float | tuple) and given != kept:
                what = "learning rate" if name == "initial_lr" else name
                changed[what] = f"the optimizer's {what} is {given} here and {kept} in the checkpoint"
    return list(changed.values())

"""One run from its plan to its last checkpoint: the wiring of everything to everything.

The order is the contract's, and each of its stations is one line of the log:

    strategy files cleared, log folder made
    newest valid checkpoint found and checked         (resumed runs)
    policy, optimizer, reference and progress restored
    training goes on at the next step, new checkpoints are saved

Nothing is written before everything that can be wrong with the user's input has been looked at:
`plan.prepare` first, then the engine, which reads weights and finds out whether they fit.
"""

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rollforward import verifiers
from rollforward.errors import NonFinite, NothingToResume, RollforwardError, RunLocked
from rollforward.grpo.ports import Engine, Group, Observer
from rollforward.grpo.trainer import Trainer
from rollforward.grpo.types import Floats, Prompt
from rollforward.interop.restoring import Taken, take
from rollforward.interop.resuming import FromForeign, next_position
from rollforward.interop.role_folders import CheckpointFolders
from rollforward.position import Position
from rollforward.processes import environment, stopping
from rollforward.processes.heartbeat import Heartbeat
from rollforward.processes.stalls import CollectiveWatch
from rollforward.replay import report as recovery_report
from rollforward.replay.recovery import Restored, restore
from rollforward.replay.report import Recovering, make_report
from rollforward.replay.rollout_log import JournaledRollouts, JournalReport, LogSettings, open_rollout_log
from rollforward.run import evidence, metrics
from rollforward.run import strategy_folder as strategy
from rollforward.run.branching import changes
from rollforward.run.building import engine_settings, learning_rate, retention, trainer_settings
from rollforward.run.engine import EnginePackage
from rollforward.run.metrics import Metrics, SaveTrouble, TensorBoard
from rollforward.run.plan import Plan, schedule_of, versions
from rollforward.run.progress import Display, LogFile, Several, open_display
from rollforward.run.saving import RunCheckpoints
from rollforward.run.sources import FromModel
from rollforward.storage import LocalStorage
from rollforward.store import CheckpointStore, RunLock, newest_incarnation
from rollforward.store.cleaning import remove_strays
from rollforward.store.guests import adopt
from rollforward.store.journal.records import Identity
from rollforward.store.manifest import digest_of_arrays
from rollforward.wording import in_bytes

Say = Callable[[str], None]

ROLE_WORDS = {"policy_model": "policy", "optimizer": "optimizer", "ref": "reference"}


def train(plan: Plan, engines: EnginePackage) -> None:
    """Run the plan to its end as this worker. Collective when there are several."""
    seconds = {"prepare": environment.age()}
    environment.prepare()
    environment.wait_for_others(plan.config.rl_config.collective_timeout)
    watch = CollectiveWatch(plan.config.rl_config.collective_timeout, end=stopping.end_at_once)
    with ExitStack() as stack, stopping.ending(stack.close, cause=partial(_lost_contact, engines, watch)):
        stack.callback(watch.close)
        group = engines.connect(plan.config.context.device_target, watch.meeting)
        seconds["framework"] = environment.age() - seconds["prepare"]
        display, log_file = _open_display(plan, group, stack)
        _introduce(plan, log_file.line)
        creating = environment.age()
        engine = engines.create(engine_settings(plan), group)
        seconds["engine"] = environment.age() - creating
        taken = None
        if isinstance(plan.source, FromForeign):
            taken = take(plan.source, engine)
            start = next_position(taken.position, plan.source.first_epoch, plan.steps_per_epoch)
            plan = replace(plan, start=start)
        after = newest_incarnation(plan.source.run) if isinstance(plan.source, CheckpointFolders) else 0
        incarnation, fence = _own_the_folder(plan.outputs.run, after, group, stack, log_file.line)
        heart = stack.enter_context(_heartbeat(plan, group, incarnation, watch))
        _make_ready(plan, engines, engine, log_file)
        restored = _restore(plan, engine, taken, log_file.line)
        if group.rank == 0 and not _same_folder(plan):
            adopt(LocalStorage(plan.outputs.run))
        start = restored.manifest.position if restored else plan.start
        trouble, told = SaveTrouble(), _told_before(plan, group)
        observer = stack.enter_context(
            _observers(plan, start, group, incarnation, [heart, display], trouble, told)
        )
        store = _open_store(plan, group, restored, fence, log_file.line)
        about = _about(plan, incarnation, restored, group)
        opening = environment.age()
        log, report = _open_log(plan, engine, about["run_id"], incarnation, restored, told, log_file.line)
        stack.callback(log.journal.close)
        if restored is not None:
            seconds["journal"] = environment.age() - opening
            recovering = _recovering(plan, group, log, report, restored, seconds, log_file.line)
            observer = Several([observer, recovering])
        checkpoints = RunCheckpoints(
            store,
            engine,
            log.journal,
            about,
            run=plan.outputs.run,
            say=log_file.line,
            committed=display.saved,
            trouble=trouble,
            prove_unchanged=plan.config.rl_config.save_ckpt_prove_unchanged,
        )
        try:
            _run_steps(plan, engine, checkpoints, log, restored, display, log_file.line, observer)
        except Exception as error:
            log.failed(error)
            raise


def _lost_contact(engines: EnginePackage, watch: CollectiveWatch) -> RollforwardError | None:
    """What is behind a signal that the framework has sent, if it has."""
    return watch.lost() if engines.lost_contact() else None


def _run_steps(
    plan: Plan,
    engine: Engine,
    checkpoints: RunCheckpoints,
    log: JournaledRollouts,
    restored: Restored | None,
    display: Display,
    say: Say,
    observer: Observer,
) -> None:
    """Train from the restored position to the end; or replay up to the one that is rebuilt."""
    start = restored.manifest.position if restored else plan.start
    if restored is not None:
        display.saved(start)
    if not _same_folder(plan) and (not plan.rebuild or start == plan.until):
        # From here on the folder can be resumed by itself, whenever it is killed.
        checkpoints.save_now(start, start.global_step(plan.steps_per_epoch))
    if start >= plan.until:
        say(
            f"rebuilding: checkpoint {plan.until} is there, nothing to replay"
            if plan.rebuild
            else f"training: nothing to do, the run ends at {plan.until}"
        )
        log.journal.note(start, "finished", {"steps": plan.total_steps})
        return
    say(
        f"{'rebuilding' if plan.rebuild else 'training'}: "
        f"{'starts' if isinstance(plan.source, FromModel) else 'goes on'} at step {start} "
        f"({start.global_step(plan.steps_per_epoch) + 1} of {plan.total_steps})"
    )
    group, settings = engine.group, trainer_settings(plan)
    trainer = Trainer(
        engine=engine,
        schedule=schedule_of(plan.config, plan.prompts, rank=group.rank, world_size=group.world_size),
        learning_rate=learning_rate(plan),
        score=_scorer(plan),
        decode=plan.tokenizer.decode,
        log=log,
        checkpoints=checkpoints,
        observer=Several([checkpoints, observer]),
        settings=settings,
    )
    try:
        trainer.run(start, plan.until)
    except NonFinite as error:
        about = evidence.Circumstances(
            run=plan.outputs.run,
            incarnation=log.journal.identity.incarnation,
            verifiers=settings.verifier_names,
            samples_per_chunk=plan.config.samples_per_chunk,
            tensors=engine.tensors(),
        )
        raise evidence.keep(error, group, about) from error
    log.journal.note(plan.until, "finished", {"steps": plan.total_steps})
    done = plan.until.global_step(plan.steps_per_epoch)
    say(f"done: {done} steps, the last checkpoint is {plan.until} in {plan.outputs.run}")


def _open_store(
    plan: Plan, group: Group, restored: Restored | None, fence: Callable[[], None], say: Say
) -> CheckpointStore:
    """Where checkpoints go; `meta.json` agrees with the one that was restored, if it is of this folder."""
    store = CheckpointStore(
        plan.outputs.run,
        rank=group.rank,
        world_size=group.world_size,
        exchange=group.all_gather,
        retention=retention(plan),
        previous=restored.manifest if restored and _same_folder(plan) else None,
        fence=fence,
    )
    for warning in store.derive_meta():
        say(f"warning: {warning}")
    return store


def _open_log(
    plan: Plan,
    engine: Engine,
    run_id: str,
    incarnation: int,
    restored: Restored | None,
    told: Sequence[metrics.Record],
    say: Say,
) -> tuple[JournaledRollouts, JournalReport]:
    """The journal: what it has beyond the checkpoint is replayed by the trainer, which asks it first."""
    output = LocalStorage(plan.outputs.run)
    sources = []
    if isinstance(plan.source, CheckpointFolders):
        sources = [output] if _same_folder(plan) else [LocalStorage(plan.source.run), output]
    manifest = restored.manifest if restored else None
    rl = plan.config.rl_config
    log, report = open_rollout_log(
        sources=sources,
        storage=output,
        identity=Identity(
            run_id=run_id,
            rank=engine.group.rank,
            world_size=engine.group.world_size,
            incarnation=incarnation,
            fingerprint=plan.fingerprint,
            versions=versions(),
            device=plan.config.context.device_target,
            about={"verifiers": list(plan.config.reward_config.verifier_function)},
        ),
        start=manifest.position if manifest else plan.start,
        checkpoint=(manifest.incarnation, manifest.position) if manifest else None,
        inherit_before=plan.branch,
        finished=metrics.place_of(told[-1]).following(plan.steps_per_epoch) if told else None,
        settings=LogSettings(
            chunks_per_step=rl.num_rollouts,
            steps_per_epoch=plan.steps_per_epoch,
            on_divergence="accept" if rl.on_divergence == "accept" else "stop",
            weights_digest_every=rl.weights_digest_interval,
        ),
        all_gather=engine.group.all_gather,
        notice=lambda text: say(f"journal: {text}"),
        uninterrupted=stopping.finishing,
        weights_digest=lambda: digest_of_arrays(engine.tensors()["policy_model"]),
    )
    for line in (*report.repaired, *report.problems):
        say(f"journal: {line}")
    if plan.branch is not None and report.until != plan.branch:
        log.journal.close()
        raise NothingToResume(
            f"step {plan.branch} cannot be reached: from checkpoint {report.start} the journal leads up to "
            f"{report.until} only",
            hint="the lines above say what was damaged; an earlier step may be reached",
        )
    return log, report


def _recovering(
    plan: Plan,
    group: Group,
    log: JournaledRollouts,
    journal: JournalReport,
    restored: Restored,
    seconds: Mapping[str, float],
    say: Say,
) -> Recovering:
    """Tells, on the first rank, what the run goes on from, and when the replay is over."""
    storage = LocalStorage(plan.outputs.run)
    report = make_report(
        restored,
        journal,
        incarnation=log.journal.identity.incarnation,
        end=plan.until,
        bytes_restored=sum(group.all_gather(sum(restored.role_bytes.values()))),
        seconds={**seconds, "find": restored.find_seconds, "load": restored.seconds},
    )
    return Recovering(
        report,
        log,
        group,
        steps_per_epoch=plan.steps_per_epoch,
        say=say,
        keep=partial(recovery_report.keep, storage) if group.rank == 0 else lambda _: None,
        age=environment.age,
    )


def _told_before(plan: Plan, group: Group) -> list[metrics.Record]:
    """The figures of the steps that the resumed run had done; empty for a new run, and on other ranks."""
    if group.rank != 0 or not isinstance(plan.source, CheckpointFolders):
        return []
    return metrics.read(plan.source.run / metrics.FILE)


def _open_display(plan: Plan, group: Group, stack: ExitStack) -> tuple[Display, LogFile]:
    """What is shown, and the file that keeps it once there is a folder for it."""
    display = open_display(
        rank=group.rank, steps_per_epoch=plan.steps_per_epoch, total_steps=plan.total_steps
    )
    stack.callback(display.close)
    log_file = LogFile(display.line)
    stack.callback(log_file.close)
    return display, log_file


def _introduce(plan: Plan, say: Say) -> None:
    say(
        f"data: {len(plan.prompts)} prompts from {plan.config.rl_config.dataset_file}, "
        f"{plan.steps_per_epoch} steps an epoch, {plan.total_steps} steps in all"
    )
    if plan.ignored:
        say(f"configuration: ignored, since they mean nothing here: {', '.join(plan.ignored)}")


def _own_the_folder(
    run: Path, after: int, group: Group, stack: ExitStack, say: Say
) -> tuple[int, Callable[[], None]]:
    """Lock the run's folder, on the first rank, for all; the incarnation, above `after`, and the fence."""
    answer: dict[str, Any] = {}
    fence: Callable[[], None] = _no_fence
    if group.rank == 0:
        try:
            lock = stack.enter_context(RunLock.acquire(run, after=after))
            if lock.taken_over is not None:
                say(f"lock: taken over, its owner ended without letting go: {lock.taken_over}")
            fence = lock.check
            remove_strays(LocalStorage(run))
            answer = {"incarnation": lock.incarnation}
        except RunLocked as error:
            answer = {"message": error.message, "hint": error.hint}
    answer = group.all_gather(answer)[0]
    if "message" in answer:
        raise RunLocked(answer["message"], hint=answer["hint"])
    return answer["incarnation"], fence


def _no_fence() -> None:
    """The first rank alone publishes, and it alone is fenced."""


def _make_ready(plan: Plan, engines: EnginePackage, engine: Engine, log_file: LogFile) -> None:
    """Clear old strategy files, write this rank's, make the log folder."""
    folder, group = plan.outputs.strategy, engine.group
    cleared = strategy.clear(folder) if group.rank == 0 else []
    # No rank may write its file before the first has cleared the folder.
    group.all_gather(len(cleared))
    shapes = {
        name: tuple(array.shape)
        for role in ("policy_model", "optimizer")
        for name, array in engine.tensors()[role].items()
    }
    content = engines.strategy_file(shapes, group.world_size)
    if content is not None:
        strategy.write(folder, group.rank, content)
    log_file.line(f"strategy: {len(cleared)} old files cleared from {folder}, strategy_<rank>.ckpt written")
    plan.outputs.log.mkdir(parents=True, exist_ok=True)
    if group.rank == 0:
        log_file.keep(plan.outputs.log / "train.log")
    log_file.line(f"logs: {plan.outputs.log}")


def _restore(plan: Plan, engine: Engine, taken: Taken | None, say: Say) -> Restored | None:
    """Put the newest valid checkpoint into the engine; None where weights came from elsewhere before."""
    if isinstance(plan.source, FromForeign):
        for line in _what_was_taken(plan.source, taken) if taken is not None else ():
            say(line)
        return None
    if isinstance(plan.source, FromModel):
        say(f"model: policy from {plan.source.policy}, reference from {plan.source.reference}")
        return None
    restored = restore(LocalStorage(plan.source.run), engine, until=plan.branch)
    for position, reason in restored.rejected:
        say(f"checkpoint: {position} rejected: {reason}")
    manifest = restored.manifest
    say(
        f"checkpoint: {manifest.position} in {plan.source.run} is the newest valid one, "
        f"saved {manifest.created}, every byte verified"
    )
    parts = ", ".join(f"{ROLE_WORDS[role]} {in_bytes(size)}" for role, size in restored.role_bytes.items())
    say(f"restored: {parts}, progress {manifest.global_step} steps, in {restored.seconds:.2f} s")
    for line in changes(manifest.state.get("facts", {}), plan.facts):
        say(f"warning: since the checkpoint was saved {line}")
    for line in changes(manifest.versions, versions()):
        say(f"warning: the version of {line}; results may differ in their last bits")
    return restored


def _what_was_taken(source: FromForeign, taken: Taken) -> Iterator[str]:
    for position, reason in taken.rejected:
        yield f"checkpoint: {position} rejected: {reason}"
    yield f"checkpoint: {taken.position} in {source.run} is the newest complete one; it has no manifest"
    for warning in taken.warnings:
        yield f"warning: {warning}"
    if taken.left_out:
        yield f"left out, since it is computed anew: {', '.join(taken.left_out)}"
    parts = ", ".join(f"{ROLE_WORDS[role]} {in_bytes(size)}" for role, size in taken.role_bytes.items())
    yield f"restored: {parts}, in {taken.seconds:.2f} s"


@contextmanager
def _heartbeat(plan: Plan, group: Group, incarnation: int, watch: CollectiveWatch) -> Iterator[Heartbeat]:
    """This rank's, by which the others can tell what it is at."""
    run, rank = plan.outputs.run, group.rank
    heart = Heartbeat(run, rank=rank, incarnation=incarnation, start=plan.start)
    with closing(heart):
        watch.follow(heart, run, rank=rank, world_size=group.world_size, incarnation=incarnation)
        yield heart


@contextmanager
def _observers(
    plan: Plan,
    start: Position,
    group: Group,
    incarnation: int,
    first: Sequence[Observer],
    trouble: SaveTrouble,
    told: Sequence[metrics.Record],
) -> Iterator[Observer]:
    """Everyone who watches this rank, `first` and more; `told` are the figures of earlier starts."""
    watching = list(first)
    with ExitStack() as stack:
        if group.rank == 0:
            kept = metrics.before(told, start)
            board = TensorBoard(plan.outputs.tensorboard, kept=kept) if plan.outputs.tensorboard else None
            recorder = Metrics(
                plan.outputs.run,
                kept=kept,
                incarnation=incarnation,
                steps_per_epoch=plan.steps_per_epoch,
                tensorboard=board,
                trouble=trouble,
            )
            stack.callback(recorder.close)
            watching.append(recorder)
        yield Several(watching)


def _about(plan: Plan, incarnation: int, restored: Restored | None, group: Group) -> dict[str, Any]:
    """What every checkpoint of this run says besides its tensors."""
    own = restored.manifest.run_id if restored else uuid.uuid4().hex
    return {
        # The first rank's, on all.
        "run_id": group.all_gather(own)[0],
        "incarnation": incarnation,
        "state": {
            "steps_per_epoch": plan.steps_per_epoch,
            "facts": dict(plan.facts),
            # Of the one that is gone on from, for its copy in a new folder; later ones have their own.
            "metrics": restored.manifest.metrics if restored else {},
        },
        "fingerprint": plan.fingerprint,
        "versions": versions(),
        "attachments": plan.attachments,
    }


def _scorer(plan: Plan) -> Callable[[Sequence[Prompt], Sequence[str]], Floats]:
    def score(prompts: Sequence[Prompt], completions: Sequence[str]) -> Floats:
        return verifiers.score(plan.verifiers, prompts, completions)

    return score


def _same_folder(plan: Plan) -> bool:
    """Whether the run goes on in its own folder; one of MindRLHF's is not our own yet."""
    return (
        isinstance(plan.source, CheckpointFolders) and plan.source.run.resolve() == plan.outputs.run.resolve()
    )

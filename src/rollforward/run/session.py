"""One run from its plan to its last checkpoint.

The order is that of the contract, and each stage is a line of the log:

    strategy files cleared, log folder made                         `make_ready`
    newest valid checkpoint found and checked                       `restore`
    policy, optimizer, reference and progress restored              `restore`
    journal read: what is replayed and what is reused               `open_journal`
    training continues at the next step, new checkpoints are saved  `run_steps`

A standby has done what comes before the folder is locked, and waits there (`run/standby.py`).

Nothing is written until everything that can be wrong with the user's input has been checked: first by
`plan.prepare`, then by the engine, which reads the weights and checks that they fit. Whether the folder
may be written to is decided under its lock.
"""

import os
import uuid
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

from rollforward import verifiers
from rollforward.agreement import together
from rollforward.channel import all_sum_of
from rollforward.engines.base import EnginePackage
from rollforward.errors import NonFinite, NothingToResume
from rollforward.grpo.ports import Engine, Group, Observer
from rollforward.grpo.trainer import Score, Trainer
from rollforward.interop.adapters import BASE
from rollforward.position import Position
from rollforward.processes import stopping
from rollforward.replay import metrics
from rollforward.replay import report as recovery_report
from rollforward.replay.codec import ChunkShape
from rollforward.replay.facts import changes
from rollforward.replay.inheriting import FINISHED, JournalReport
from rollforward.replay.report import Recovering, make_report
from rollforward.replay.rollout_log import (
    COMPARED,
    WITHOUT_KL,
    JournaledRollouts,
    LogSettings,
    TeamRollouts,
    open_rollout_log,
)
from rollforward.run import configuration, evidence, facts, output_folders, strategy_folder
from rollforward.run.branching import facts_of
from rollforward.run.building import cadence, engine_settings, learning_rate, retention, trainer_settings
from rollforward.run.claiming import Claim, claim_folder
from rollforward.run.metrics import Metrics, SaveTrouble, TensorBoard
from rollforward.run.plan import Plan, schedule_of
from rollforward.run.progress import ObserverList
from rollforward.run.saving import RunCheckpoints
from rollforward.run.sources import Beginning
from rollforward.run.team import changed_cut, described_cut, device_of, scored_once, team_of, weights_digest
from rollforward.run.worker import Company, Worker, at_work, joined
from rollforward.storage import LocalStorage
from rollforward.store import CheckpointStore
from rollforward.store.guests import adopt
from rollforward.store.journal.records import Identity
from rollforward.store.place import settle_storage
from rollforward.store.readahead import read_ahead
from rollforward.store.saved import About
from rollforward.verifiers.sameness import SameRewards
from rollforward.wording import counted


def train(plan: Plan, package: EnginePackage) -> None:
    """Run the plan to its end as this worker. Collective when there are several workers."""
    read_early(plan, package.this_process(os.environ).rank)
    with joined(plan, package) as company:
        worker = at_work(plan, company)
        introduce(plan, worker)
        take_over(plan, package, create_engine(plan, package, company), worker)


def read_early(plan: Plan, rank: int) -> None:
    """Have the disk read the checkpoint that is most likely restored, while the framework is imported."""
    found, run = plan.source.checkpoint, plan.source.run
    # A service would only send everything twice.
    if found is not None and isinstance(run, LocalStorage):
        read_ahead(run, found, near=rank * found.world_size // plan.world_size)


def create_engine(plan: Plan, package: EnginePackage, company: Company) -> Engine:
    """Model, optimizer and graphs, with the weights of the folders that the plan names."""
    with company.clock.timing("engine"):
        return package.create(engine_settings(plan), company.group)


def take_over(plan: Plan, package: EnginePackage, engine: Engine, worker: Worker) -> None:
    """Take over the run's folder, and what is in it, and run the plan to its end. Collective."""
    beginning = None if plan.source.needs_lock else restore(plan, engine)
    claim = claim_folder(plan, worker)
    observers: list[Observer] = [worker.heartbeat(plan, claim.incarnation), worker.display]
    keep_configuration(plan, claim, worker)
    make_ready(plan, package, engine, worker)
    beginning = beginning or restore(plan, engine)
    tell_beginning(plan, beginning, claim, worker)
    figures = open_figures(plan, beginning, claim, worker)
    observers += figures.observers
    store = open_store(plan, beginning, claim, worker)
    with worker.clock.timing("journal"):
        log, journal = open_journal(plan, engine, beginning, claim, figures, worker)
    if beginning.checkpoint is not None:
        observers.append(watch_recovery(plan, beginning, claim, log, journal, worker))
    checkpoints = RunCheckpoints(
        store,
        engine,
        log.journal,
        about_checkpoints(plan, beginning, log.journal.identity),
        say=worker.log.line,
        warn=worker.log.warn,
        committed=worker.display.saved,
        trouble=figures.trouble,
        prove_unchanged=plan.config.rl_config.save_ckpt_prove_unchanged,
        cadence=cadence(plan),
    )
    try:
        run_steps(plan, beginning.position, engine, checkpoints, log, observers, claim, worker)
        settle_storage(claim.storage)
    except Exception as error:
        log.failed(error)
        raise


def introduce(plan: Plan, worker: Worker) -> None:
    """Log what the run trains on, and where its configuration comes from."""
    worker.log.line(
        f"data: {len(plan.prompts)} prompts from {plan.config.rl_config.dataset_file}, "
        f"{plan.steps_per_epoch} steps an epoch, {plan.total_steps} steps in all"
    )
    given, means = plan.config.rl_config.num_rollouts, plan.chunks_per_worker
    kept = f"; num_rollouts is {given}, and means {means} here: the run's step stays as it is"
    each = counted(plan.world_size, "worker")
    if plan.model_parallel > 1:
        groups = counted(plan.replicas, "group")
        each = f"{groups} of {plan.model_parallel} workers, which hold the model together"
    worker.log.line(
        f"step: {counted(plan.chunks_per_step, 'chunk')}, {means} on each of "
        f"{each}{kept if given != means else ''}"
    )
    if plan.lora is not None:
        worker.log.line(
            f"adapters: rank {plan.lora.rank}, alpha {plan.lora.alpha:g}, beside "
            f"{', '.join(plan.lora.target_modules)}; the base is {plan.base}, digest {plan.facts[BASE]}"
        )
    if plan.carried_by:
        worker.log.line(f"configuration: from {plan.carried_by}")
    if plan.ignored:
        worker.log.line(f"configuration: ignored, since they mean nothing here: {', '.join(plan.ignored)}")


def keep_configuration(plan: Plan, claim: Claim, worker: Worker) -> None:
    """Store the configuration in the run's folder, and log what has changed in it. Collective."""

    def keep() -> None:
        if not worker.is_first:
            return
        before = None if plan.source.run is None else configuration.carried(plan.source.run, plan.branch)
        for line in configuration.differences(before.tree, plan.config) if before else ():
            worker.log.line(f"configuration: {line}")
        configuration.keep(claim.storage, claim.incarnation, plan.config)

    together(keep, worker.group.all_gather)


def make_ready(plan: Plan, package: EnginePackage, engine: Engine, worker: Worker) -> None:
    """Clear old strategy files, write this rank's, make the log folder. Collective."""
    folder, group = plan.outputs.strategy, worker.group

    def clear() -> list[str]:
        """Files that are not this run's stay: another run may need them."""
        if "strategy" in plan.outputs.named:
            worker.closing.enter_context(output_folders.alone(folder))
        return strategy_folder.clear(folder)

    if "strategy" not in plan.outputs.named:
        folder = output_folders.claim_strategies(folder, plan.outputs.run)
    # No rank may write its file before the first has cleared the folder.
    _, (cleared, *_) = together(lambda: clear() if worker.is_first else [], group.all_gather)
    described = dict(engine.layout()["policy_model"])
    for name, spec in engine.layout()["optimizer"].items():
        # A moment that one worker alone keeps is not laid out in any way that the format has words for.
        spread = plan.config.actor_config.enable_parallel_optimizer and plan.replicas > 1
        if not (spec.piece_of and spread):
            described[name] = spec
    content = package.strategy_file(described, group.world_size)
    logs = output_folders.claim_logs(plan.outputs.log, plan.outputs.run)

    def write() -> None:
        if content is not None:
            strategy_folder.write(folder, group.rank, content)
        logs.mkdir(parents=True, exist_ok=True)

    together(write, group.all_gather)
    written = "" if content is None else ", strategy_<rank>.ckpt written"
    worker.log.line(f"strategy: {len(cleared)} old files cleared from {folder}{written}")
    if worker.is_first:
        worker.log.keep(logs / "train.log")
    worker.log.line(f"logs: {logs}")


def restore(plan: Plan, engine: Engine) -> Beginning:
    """Load everything into the engine that it has not read itself. Collective."""
    return plan.source.restore(engine, plan.layout, steps_per_epoch=plan.steps_per_epoch, until=plan.branch)


def tell_beginning(plan: Plan, beginning: Beginning, claim: Claim, worker: Worker) -> None:
    """Log what was restored, and what has changed since it was saved. Collective."""
    for line in beginning.lines:
        worker.log.line(line)
    if beginning.checkpoint is not None:
        manifest = beginning.checkpoint.manifest
        for line in facts.warnings(facts_of(manifest), plan.facts):
            worker.log.line(f"warning: {line}")
        for line in changed_cut(plan, manifest.state):
            worker.log.line(f"warning: {line}")
        for line in changes(manifest.versions, plan.versions):
            worker.log.line(f"warning: the version of {line}; results may differ in their last bits")
    adopts = worker.is_first and not plan.in_place
    together(lambda: adopt(claim.storage) if adopts else 0, worker.group.all_gather)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Where each step's figures go, and those of earlier starts."""

    observers: Sequence[Observer]
    trouble: SaveTrouble
    finished: Position | None
    """Steps before it had been finished when the run was started, according to its figures."""


def open_figures(plan: Plan, beginning: Beginning, claim: Claim, worker: Worker) -> Figures:
    """Start keeping metrics, on the first rank; those of steps that are run again are cut off."""
    trouble = SaveTrouble()
    if not worker.is_first:
        return Figures(observers=[], trouble=trouble, finished=None)
    source = plan.source
    known = source.checkpoint is not None and source.run is not None
    told = metrics.read_from(source.run) if known and source.run is not None else []
    told = metrics.consistent(told, plan.steps_per_epoch)
    kept = metrics.before(told, beginning.position)
    events = plan.outputs.tensorboard
    if events is not None and "tensorboard" in plan.outputs.named:
        events = output_folders.claim_events(events, plan.outputs.run)
    board = None if events is None else TensorBoard(events, kept=kept)
    recorder = Metrics(
        claim.storage,
        kept=kept,
        incarnation=claim.incarnation,
        steps_per_epoch=plan.steps_per_epoch,
        tensorboard=board,
        trouble=trouble,
    )
    worker.closing.enter_context(closing(recorder))
    finished = metrics.place_of(told[-1]).following(plan.steps_per_epoch) if told else None
    return Figures(observers=[recorder], trouble=trouble, finished=finished)


def open_store(plan: Plan, beginning: Beginning, claim: Claim, worker: Worker) -> CheckpointStore:
    """Where checkpoints go; `meta.json` matches the restored checkpoint if that is from this folder."""
    restored = beginning.checkpoint
    store = CheckpointStore(
        claim.storage,
        rank=worker.group.rank,
        world_size=worker.group.world_size,
        exchange=worker.group.all_gather,
        all_sum=all_sum_of(worker.group),
        retention=retention(plan),
        previous=restored.manifest if restored and plan.in_place else None,
        fence=claim.fence,
        remote=plan.place.remote,
    )
    for warning in store.derive_meta():
        worker.log.warn(f"warning: {warning}")
    return store


def open_journal(
    plan: Plan, engine: Engine, beginning: Beginning, claim: Claim, figures: Figures, worker: Worker
) -> tuple[JournaledRollouts, JournalReport]:
    """The journal: the trainer asks it first, and so replays what it has beyond the checkpoint."""
    own = claim.storage
    manifest = beginning.checkpoint.manifest if beginning.checkpoint else None
    rl = plan.config.rl_config
    log, report = open_rollout_log(
        sources=plan.source.journals(own),
        storage=own,
        identity=identify(plan, beginning, claim, worker),
        start=beginning.position,
        checkpoint=(manifest.incarnation, manifest.position) if manifest else None,
        inherit_before=plan.branch,
        finished=figures.finished,
        settings=LogSettings(
            chunks_per_step=plan.chunks_per_step,
            steps_per_epoch=plan.steps_per_epoch,
            shape=ChunkShape(
                samples=plan.config.samples_per_chunk,
                prompt_width=plan.config.generate_config.max_prompt_length,
                completion_width=plan.config.generate_config.sampling_config.max_tokens,
                verifiers=len(plan.verifiers),
                prompts=len(plan.prompts),
                vocabulary=plan.vocabulary,
            ),
            on_divergence="accept" if rl.on_divergence == "accept" else "stop",
            compared=COMPARED if rl.beta > 0 else WITHOUT_KL,
            weights_digest_every=rl.weights_digest_interval,
            model_parallel=plan.model_parallel,
        ),
        all_gather=worker.group.all_gather,
        notice=lambda text: worker.log.warn(f"journal: {text}"),
        uninterrupted=stopping.finishing,
        weights_digest=partial(weights_digest, plan, engine),
    )
    worker.closing.callback(log.journal.close)
    for line in report.repaired:
        worker.log.warn(f"journal: {line}")
    for line in report.problems:
        worker.log.line(f"journal: {line}")
    if plan.branch is not None and report.until != plan.branch:
        raise NothingToResume(
            f"step {plan.branch} cannot be reached: from checkpoint {report.start} the journal leads up to "
            f"{report.until} only",
            hint="the lines above say what is damaged; an earlier step may be reachable",
        )
    return log, report


def identify(plan: Plan, beginning: Beginning, claim: Claim, worker: Worker) -> Identity:
    """Who writes the journal: which run, rank and start. Collective: a new run gets its name here."""
    manifest = beginning.checkpoint.manifest if beginning.checkpoint else None
    own = manifest.run_id if manifest else uuid.uuid4().hex
    return Identity(
        # The first rank's, on all.
        run_id=worker.group.all_gather(own)[0],
        rank=worker.group.rank,
        world_size=worker.group.world_size,
        incarnation=claim.incarnation,
        fingerprint=plan.fingerprint,
        fingerprints=facts.fingerprints(plan.facts, facts_of(manifest)) if manifest else frozenset(),
        versions=plan.versions,
        device=device_of(plan),
        about={"verifiers": list(plan.config.reward_config.verifier_function)},
    )


def watch_recovery(
    plan: Plan,
    beginning: Beginning,
    claim: Claim,
    log: JournaledRollouts,
    journal: JournalReport,
    worker: Worker,
) -> Recovering:
    """Report what the run resumes from, and when the replay is over. Collective."""
    restored = beginning.checkpoint
    assert restored is not None
    report = make_report(
        restored,
        journal,
        incarnation=log.journal.identity.incarnation,
        workers=worker.group.world_size,
        end=plan.until,
        bytes_restored=sum(worker.group.all_gather(sum(restored.role_bytes.values()))),
        seconds={**worker.clock.seconds, "find": restored.find_seconds, "load": restored.seconds},
        standby=worker.standby,
        left_behind=claim.left_behind,
    )
    return Recovering(
        report,
        log,
        worker.group,
        following=lambda position: position.following(plan.steps_per_epoch),
        say=worker.log.line,
        keep=partial(recovery_report.keep, claim.storage) if worker.is_first else lambda _: None,
        age=worker.clock.age,
    )


def about_checkpoints(plan: Plan, beginning: Beginning, identity: Identity) -> About:
    """What every checkpoint of this run stores besides its tensors."""
    return About(
        run_id=identity.run_id,
        incarnation=identity.incarnation,
        state={
            "steps_per_epoch": plan.steps_per_epoch,
            "facts": dict(plan.facts),
            **described_cut(plan),
            # Of the resumed checkpoint, for its copy in a new folder; later ones have their own.
            "metrics": beginning.checkpoint.manifest.metrics if beginning.checkpoint else {},
        },
        fingerprint=plan.fingerprint,
        versions=plan.versions,
        attachments=plan.attachments,
    )


def run_steps(
    plan: Plan,
    start: Position,
    engine: Engine,
    checkpoints: RunCheckpoints,
    log: JournaledRollouts,
    observers: Sequence[Observer],
    claim: Claim,
    worker: Worker,
) -> None:
    """Train from `start` to the end, or replay up to the checkpoint that is rebuilt."""
    say, done = worker.log.line, start.global_step(plan.steps_per_epoch)
    if plan.source.checkpoint is not None:
        worker.display.saved(start)
    if not plan.in_place and (not plan.rebuild or start == plan.until):
        # From here on the folder alone is enough to resume, whenever the run is killed.
        checkpoints.save_now(start, done)
    doing = "rebuilding" if plan.rebuild else "training"
    if start >= plan.until:
        reason = f"checkpoint {plan.until} is there, nothing to replay"
        say(f"{doing}: {reason if plan.rebuild else f'nothing to do, the run ends at {plan.until}'}")
        log.journal.note(start, FINISHED, {"steps": plan.total_steps})
        return
    how = "starts" if plan.source.run is None else "resumes"
    say(f"{doing}: {how} at step {start} ({done + 1} of {plan.total_steps})")
    trainer = build_trainer(plan, engine, checkpoints, log, observers, say, team_of(plan, engine))
    try:
        trainer.run(start, plan.until)
    except NonFinite as error:
        about = evidence.Circumstances(
            storage=claim.storage,
            incarnation=log.journal.identity.incarnation,
            verifiers=trainer.settings.verifier_names,
            samples_per_chunk=plan.config.samples_per_chunk,
            chunks=trainer.chunks,
            tensors=engine.tensors(),
        )
        raise evidence.keep(error, worker.group, about) from error
    log.journal.note(plan.until, FINISHED, {"steps": plan.total_steps})
    done = plan.until.global_step(plan.steps_per_epoch)
    say(f"done: {done} steps, the last checkpoint is {plan.until} in {plan.outputs.where}")


def build_trainer(
    plan: Plan,
    engine: Engine,
    checkpoints: RunCheckpoints,
    log: JournaledRollouts,
    observers: Sequence[Observer],
    say: Callable[[str], None],
    team: Group | None = None,
) -> Trainer:
    """The training loop, with everything it depends on. `team`: the workers that hold the model together."""
    same_rewards = SameRewards(plan.config.reward_config.verifier_function, say)
    score: Score = partial(verifiers.score, plan.verifiers)
    return Trainer(
        engine=engine,
        schedule=schedule_of(plan.config, plan.prompts, plan.chunks_per_step),
        learning_rate=learning_rate(plan),
        score=same_rewards.watching(score if team is None else scored_once(score, team)),
        decode=plan.tokenizer.decode,
        log=log if team is None else TeamRollouts(log, team),
        checkpoints=checkpoints,
        observer=ObserverList([checkpoints, *observers, same_rewards]),
        settings=trainer_settings(plan),
    )

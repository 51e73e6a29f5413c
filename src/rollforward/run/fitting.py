"""Whether a run will fit into memory, said before it starts; `rollforward doctor` asks.

What is needed is computed (`models.memory`), not tried. On the CPU all workers share the machine; on other
devices each has one of its own, whose memory is not known here, so the number is only told.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rollforward.config.keys import Config
from rollforward.config.loading import load, parse_override
from rollforward.engines.base import EnginePackage, Finding, find_engine
from rollforward.errors import CheckpointInvalid, ConfigError, ModelError
from rollforward.grpo.addition import divisors
from rollforward.inputs import is_there
from rollforward.inspection.machine import Room
from rollforward.models.config import CONFIG_FILE, parse_model_config
from rollforward.models.memory import Memory
from rollforward.run.adapters import lora_of
from rollforward.run.building import settings_without_data
from rollforward.run.configuration import carried
from rollforward.run.plan import replicas_of
from rollforward.run.sources import read_model_file
from rollforward.storage import Storage
from rollforward.store import list_checkpoints
from rollforward.store.restoring import read_attachments
from rollforward.wording import counted, in_bytes

CHECK = "memory"


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What is known of a start before it reads weights or data."""

    is_new: bool
    """Whether it begins from a Hugging Face folder."""
    first_save: int
    """Bytes of a checkpoint in which nothing is shared with an earlier one."""
    memory: Finding | None


def look(
    file: str | None,
    overrides: Sequence[str],
    run: Storage,
    *,
    actor: str,
    workers: int,
    room: Room | None,
) -> Planned | None:
    """What the configuration in `file`, or that of the run in `run`, asks for, with `overrides`.

    `actor`: as the command line names it. None when no model is named. ConfigError, ModelError; but what is
    wrong with what a run stored only leaves memory unchecked, since a resume may have a better one.
    """
    try:
        return _look(file, overrides, run, actor=actor, workers=workers, room=room)
    except (CheckpointInvalid, ConfigError, ModelError) as error:
        if file is not None or overrides:
            raise
        text = f"not compared with what the run needs: {error.message}"
        return Planned(is_new=False, first_save=0, memory=Finding(check=CHECK, level="note", text=text))


def _look(
    file: str | None,
    overrides: Sequence[str],
    run: Storage,
    *,
    actor: str,
    workers: int,
    room: Room | None,
) -> Planned | None:
    stored = None if file is not None else carried(run)
    config = load(file, [parse_override(text) for text in overrides], carried=stored).config
    folder = Path(actor or config.actor_config.load)
    is_new = is_there(folder / CONFIG_FILE) and (bool(actor) or not list_checkpoints(run))
    if is_new:
        content, said = read_model_file(folder / CONFIG_FILE), folder / CONFIG_FILE
    else:
        held = list_checkpoints(run)
        newest = next((each.manifest for each in held if each.valid and each.manifest is not None), None)
        if newest is None:
            return None
        files = read_attachments(run, newest)
        content, said = files.get(CONFIG_FILE, b""), Path(str(run))
    model_config, package = parse_model_config(content, said), find_engine(config.context.engine)
    lora = lora_of(config)
    layout = package.tensor_layout(model_config, lora) if lora else package.tensor_layout(model_config)
    return Planned(
        is_new=is_new,
        # A reference that equals the policy is not written again.
        first_save=sum(
            spec.nbytes
            for role, named in layout.items()
            if role != "ref" or config.ref_config.load
            for spec in named.values()
        ),
        memory=examine(config, model_config, package, workers, room),
    )


def examine(
    config: Config, model_config: Mapping[str, Any], package: EnginePackage, workers: int, room: Room | None
) -> Finding | None:
    """The finding; None where the engine does not say what it needs.

    ModelError for a model that it has not, or cannot cut as is asked for; ConfigError for workers that do not
    make whole groups. `room`: what there is; None: not known.
    """
    replicas = replicas_of(config, package, model_config, workers)
    settings = settings_without_data(config, model_config, chunks=config.rl_config.num_rollouts)
    need = package.memory_needed(settings, workers)
    if need is None:
        return None
    parts = sorted(((getattr(need, each.name), each.name) for each in fields(need)), reverse=True)
    told = ", ".join(f"{name.replace('_', ' ')} {in_bytes(size)}" for size, name in parts if size)
    text = f"a worker needs about {in_bytes(need.total)} at its peak ({told})"
    if config.context.device_target != "CPU":
        return Finding(check=CHECK, level="note", text=f"{text}; what its device has is not known here")
    if room is None:
        return Finding(check=CHECK, level="note", text=f"{text}; what this machine has is not known")
    together = need.total * workers
    if workers > 1:
        text += f", {counted(workers, 'worker')} {in_bytes(together)}"
    text += f"; there are {in_bytes(room.limit)} ({room.why}), of which {in_bytes(room.free)} are free"
    if together > room.limit:
        cut = _cut_further(config, package, model_config, workers)
        hint = what_to_try(config, need, replicas, cut)
        return Finding(check=CHECK, level="problem", text=text, hint=hint)
    if together > room.free:
        hint = "other programs hold the rest: end them, or expect the run to be killed"
        return Finding(check=CHECK, level="note", text=text, hint=hint)
    return Finding(check=CHECK, level="ok", text=text)


def what_to_try(config: Config, need: Memory, replicas: int, cut: int | None) -> str:
    """What makes a run smaller, that it does not do yet; what saves most comes first.

    `cut`: over how many of the workers the model could be cut instead; None: over no more than it is.
    """
    actor, ways = config.actor_config, []
    of_weights = need.reference + need.moments + need.gradients + need.new_gradients
    if not actor.lora.rank:
        ways.append((of_weights, "train adapters (actor_config.lora.rank: 8)"))
    if replicas > 1 and not actor.enable_parallel_optimizer:
        ways.append((need.moments, "actor_config.enable_parallel_optimizer: true"))
    if cut is not None:
        left_over = (need.total - need.framework) * actor.parallel_config.model_parallel // cut
        saved = need.total - need.framework - left_over
        ways.append((saved, f"actor_config.parallel_config.model_parallel: {cut}"))
    if not actor.recompute_config.recompute:
        ways.append((need.activations, "actor_config.recompute_config.recompute: true"))
    ways.append((need.activations // 2, "a smaller rl_config.batch_size, or fewer max_tokens"))
    ways.append((need.cache, "a smaller generate_config.infer_model_batch_size"))
    return "; ".join(way for saved, way in sorted(ways, reverse=True) if saved * 20 > need.total)


def _cut_further(
    config: Config, package: EnginePackage, model_config: Mapping[str, Any], workers: int
) -> int | None:
    """The next larger number of these workers that the model can be cut over."""
    for each in divisors(workers):
        if each > config.actor_config.parallel_config.model_parallel:
            with suppress(ModelError):
                package.check_model_parallel(model_config, each)
                return each
    return None

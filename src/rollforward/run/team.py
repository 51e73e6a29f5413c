"""Workers that hold a model together, in a run: which they are, and what they must have in common.

A team makes the same samples, so what is not computed by the model itself happens once: the first of a team
asks the verifiers, and it alone keeps chunks in the journal. Sums are added in another order when a model is
cut otherwise. So the number of workers of a team is no fact of the run, but belongs to what computes, like
versions and the device: a run may be resumed with another number, and its finished steps are then replayed
within a tolerance.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rollforward.agreement import together
from rollforward.errors import EngineError
from rollforward.grpo.ports import Engine, Group, Teams
from rollforward.grpo.trainer import Score
from rollforward.grpo.types import Floats, Prompt
from rollforward.run.plan import Plan
from rollforward.store.digests import digest
from rollforward.store.manifest import digest_of_arrays

_STATE = "model_parallel"
"""In a checkpoint's state: over how many workers the model was cut; missing: it was not."""


def team_of(plan: Plan, engine: Engine) -> Group | None:
    """The workers that hold the model together; None where each holds all of it. Collective for these."""
    if plan.model_parallel == 1:
        return None
    if not isinstance(engine.group, Teams):
        raise EngineError(
            f"the engine {plan.config.context.engine} cannot cut a model over workers",
            hint="leave actor_config.parallel_config.model_parallel out",
        )
    return engine.group.team(plan.model_parallel)


def scored_once(score: Score, team: Group) -> Score:
    """The rewards that the first of a team gives, for all of it: a verifier need not say the same twice."""

    def scored(prompts: Sequence[Prompt], texts: Sequence[str]) -> Floats:
        def own() -> str:
            # Not as numbers: what is not finite must arrive too.
            return score(prompts, texts).tobytes().hex() if team.rank == 0 else ""

        _, (rewards, *_) = together(own, team.all_gather)
        return np.frombuffer(bytes.fromhex(rewards), np.float32).reshape(len(texts), -1)

    return scored


def weights_digest(plan: Plan, engine: Engine) -> str:
    """Of the policy, the same on all workers. Collective where the model is cut over some."""
    own = digest_of_arrays(engine.tensors()["policy_model"])
    if plan.model_parallel == 1:
        return own
    parts = engine.group.all_gather(own)[: plan.model_parallel]
    return digest(" ".join(parts).encode())


def device_of(plan: Plan) -> str:
    """What computes, and how the model is cut over it: the same bits are promised on the same only."""
    device = plan.config.context.device_target
    return device if plan.model_parallel == 1 else f"{device}, model_parallel {plan.model_parallel}"


def described_cut(plan: Plan) -> dict[str, Any]:
    """For a checkpoint's state."""
    return {_STATE: plan.model_parallel} if plan.model_parallel > 1 else {}


def changed_cut(plan: Plan, state: Mapping[str, Any]) -> list[str]:
    """What has changed since a checkpoint with this state was saved, and what that means."""
    before = state.get(_STATE, 1)
    if before == plan.model_parallel:
        return []
    return [
        f"model_parallel changed from {before} to {plan.model_parallel}: sums are added in another order, so "
        "results differ in their last bits, and finished steps are replayed within a tolerance"
    ]

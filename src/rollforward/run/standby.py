"""A worker that has everything ready for a run that fails: `session.train`, with a wait in the middle.

What comes before the run's folder is locked is done in advance. When the worker is called, what it was made
from is read again, and only if nothing has changed does it go on where a start locks the folder.
"""

from collections.abc import Callable

from rollforward.agreement import together
from rollforward.engines.base import EnginePackage
from rollforward.errors import StandbyOutdated
from rollforward.processes import standby
from rollforward.run.building import engine_settings
from rollforward.run.plan import Plan
from rollforward.run.session import create_engine, introduce, take_over
from rollforward.run.worker import at_work, joined


def stand_by(plan: Plan, package: EnginePackage, again: Callable[[], Plan]) -> None:
    """Have everything ready that the run's folder has no part in; when called, run the plan to its end.

    `again` reads anew what the plan was made from. StandbyOutdated, with nothing written, when that has
    changed. Collective when there are several workers.
    """
    with joined(plan, package) as company:
        with standby.ended_first():
            engine = create_engine(plan, package, company)
            standby.wait_to_be_called(company.group.rank)
        company.clock.take_over()
        with company.clock.timing("prepare"):
            now, _ = together(
                lambda: still_true(plan, again()), company.group.all_gather, tell=lambda _: None
            )
        worker = at_work(now, company, standby=True)
        introduce(now, worker)
        take_over(now, package, engine, worker)


def still_true(before: Plan, now: Plan) -> Plan:
    """The plan as it is now; StandbyOutdated unless what a standby has ready is what it wants."""
    wanted = {
        "the configuration": (before.config, now.config),
        "the model or the tokenizer": (before.attachments, now.attachments),
        "the dataset, the model or a verifier": (before.facts, now.facts),
        "the installed software": (before.versions, now.versions),
        "the run": (engine_settings(before), engine_settings(now)),
    }
    changed = [name for name, (then, here) in wanted.items() if then != here]
    if changed:
        raise StandbyOutdated(
            f"{changed[0]} changed after the standby was started",
            hint="nothing: the run is started with what is there now",
        )
    return now

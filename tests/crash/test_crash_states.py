"""Every crash state of a run that saves, dedupes, prunes, is killed and resumes: none lost, none wrong."""

from itertools import islice

import pytest
from crash_run import ROOT, Checker, check_going_on, record, states

GOING_ON_EVERY = 100
SAMPLE = 2
"""One of so many states is tried in the suite, since an operation leaves many alike; all of them by name."""


@pytest.fixture(scope="module")
def run():
    return record()


def check_states(run, every):
    """How many of the states were tried."""
    checker = Checker(run)
    count = 0
    for count, (tree, reported) in enumerate(islice(states(run), 0, None, every), start=1):
        checker.check(tree, reported)
        if count % GOING_ON_EVERY == 0:
            check_going_on(tree)
    return count


def test_no_crash_loses_a_reported_checkpoint_or_shows_one_that_is_not_whole(run):
    assert check_states(run, SAMPLE) > 10_000


@pytest.mark.slow
def test_no_crash_at_all_does(run):
    assert check_states(run, 1) > 20_000


def test_the_run_goes_through_what_it_is_meant_to(run):
    paths = [op.path for op in run.disk.log]
    kinds = {op.kind for op in run.disk.log}
    assert run.error is None
    assert {"create", "write", "fsync", "rename", "unlink", "mkdir", "fsync_folder", "mark"} <= kinds
    assert any("policy_model.1_rank_2-0_5" in path for path in paths), "a position is saved twice"
    assert any(op.kind == "unlink" and "/commits/0_" in op.path for op in run.disk.log), "manifests go"
    tables = [op.target for op in run.disk.log if op.kind == "rename" and "/tables/" in op.target]
    assert tables.count(f"{ROOT}/tables/rank_2/table_rank_2-0_4.json") > 1, "one was left by a killed save"
    assert f"{ROOT}/tables/rank_1/table.1_rank_1-0_5.json" in tables
    assert any(op.kind == "unlink" and "/tables/" in op.path for op in run.disk.log), "tables go"
    marks = {op.note for op in run.disk.log if op.kind == "mark"}
    references = {op.target for op in run.disk.log if "/ref_rank_0-" in op.target}
    assert len(references) < len(marks), "references are shared"

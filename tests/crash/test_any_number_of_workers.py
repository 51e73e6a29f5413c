"""A run goes on with any number of workers that divides its step, and ends with the same bytes."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import pytest
from compare_runs import assert_nothing_finished_was_lost, assert_same_end
from toy_session import Killed, Place, ToyPackage, commit_at_once

from rollforward import boxes
from rollforward.cli.main import main
from rollforward.errors import CheckpointMismatch, DataError
from rollforward.grpo.addition import divisors
from rollforward.inspection.doctor import examine
from rollforward.inspection.folder import open_run
from rollforward.inspection.history import timeline
from rollforward.inspection.rollouts import read_texts
from rollforward.inspection.verifying import check_journals
from rollforward.interop.role_folders import checkpoint_folders
from rollforward.position import Position
from rollforward.replay.report import read
from rollforward.run import facts
from rollforward.storage import LocalStorage
from rollforward.store import Retention, find
from rollforward.store.contents import tables
from rollforward.store.journal.reading import journal_ranks, list_segments
from rollforward.store.pruning import prune

SETTINGS: dict[str, Any] = {
    "rl_config__chunk_size": 1,
    "rl_config__num_iterations": 2,
    "rl_config__save_ckpt_interval": 3,
    "rl_config__weights_digest_interval": 1,
    "ref_config__sync_ref_model": True,
    "ref_config__ref_model_sync_steps": 4,
}


def steps_of(chunks: int, workers: int, **changes: Any) -> dict[str, Any]:
    return {**SETTINGS, "rl_config__num_rollouts": chunks // workers, **changes}


class Counting(ToyPackage):
    """Notes which chunks were generated, by their prompts."""

    generated: ClassVar[Counter[str]] = Counter()

    def create(self, settings: Any, group: Any) -> Any:
        engine = super().create(settings, group)
        generate = engine.generate

        def counted(ids: Any, mask: Any, uniforms: Any) -> Any:
            self.generated[f"{ids.tolist()} {uniforms[0].tolist()}"] += 1
            return generate(ids, mask, uniforms)

        engine.generate = counted  # type: ignore[method-assign]
        return engine


def through(place: Place, run: str, starts: list[tuple[int, int | None]], **changes: Any) -> None:
    """Each start: the number of workers, and the update before which its last worker is killed."""
    for number, (workers, dies) in enumerate(starts):
        packages = [Counting(dies_at_update=dies if rank == workers - 1 else None) for rank in range(workers)]
        ends = place.train_by(workers, run, *packages, resume=number > 0, **changes)
        assert isinstance(ends[-1], Killed) if dies is not None else ends == [None] * workers, ends


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    commit_at_once(monkeypatch)
    Counting.generated.clear()
    return Place(tmp_path)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_four_two_one_two_and_four_workers_killed_in_between_are_as_one_that_was_not(
    place: Place, aggregation: str
) -> None:
    changes = {"rl_config__loss_aggregation": aggregation}
    through(place, "run", [(4, 5), (2, 4), (1, 5), (2, 5), (4, None)], **steps_of(4, 4, **changes))
    assert set(Counting.generated.values()) == {1}, "what was finished was not done again"
    place.train("whole", **steps_of(4, 1, **changes))
    assert_same_end(place.root / "run", place.root / "whole")
    assert_nothing_finished_was_lost(place.root / "run")
    reports = read(LocalStorage(place.root / "run"))
    assert [report.workers for report in reports] == [2, 1, 2, 4]
    assert all(report.steps_replayed for report in reports), "each of them had something to replay"


@pytest.mark.parametrize("starts", [[(3, 3), (6, 2), (1, None)], [(6, 1), (2, 4), (3, None)]])
def test_so_are_three_and_six_workers_with_six_chunks(
    place: Place, starts: list[tuple[int, int | None]]
) -> None:
    through(place, "run", starts, **steps_of(6, starts[0][0]))
    place.train("whole", **steps_of(6, 1))
    assert_same_end(place.root / "run", place.root / "whole")
    assert set(Counting.generated.values()) == {1}


@pytest.mark.parametrize("chunks", [4, 6])
def test_whoever_is_never_killed_gets_there_too(place: Place, chunks: int) -> None:
    for workers in divisors(chunks):
        place.train_by(workers, f"run_{workers}", **steps_of(chunks, workers))
        assert_same_end(place.root / f"run_{workers}", place.root / "run_1")


def test_a_number_that_does_not_divide_the_step_is_refused_and_the_others_are_named(place: Place) -> None:
    through(place, "run", [(6, 1)], **steps_of(6, 6))
    with pytest.raises(CheckpointMismatch, match=r"a step of this run has 6 chunks, .* 4 workers") as caught:
        place.plan("run", world_size=4, resume=True, **steps_of(6, 6))
    assert caught.value.hint == "start with a number of workers that divides 6: 1, 2, 3, 6"


def test_the_log_says_what_num_rollouts_means_now(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    through(place, "run", [(4, 2)], **steps_of(4, 4))
    assert "step: 4 chunks, 1 on each of 4 workers\n" in capsys.readouterr().out
    through(place, "again", [(4, 2), (2, None)], **steps_of(4, 4))
    assert (
        "step: 4 chunks, 2 on each of 2 workers; num_rollouts is 1, and means 2 here: the run's step stays "
        "as it is\n"
    ) in capsys.readouterr().out


def test_the_verbs_see_one_run(place: Place) -> None:
    through(place, "run", [(4, 5), (1, 3), (2, None)], **steps_of(4, 4))
    run = place.root / "run"
    for step in (3, 4, 5):
        texts = read_texts(LocalStorage(run), Position(*divmod(step, 5)))
        assert [sample.chunk for sample in texts.samples] == [c for c in range(4) for _ in range(4)]
        assert not texts.problems
    assert [verdict.problems for verdict in check_journals(LocalStorage(run))] == [()] * 4
    assert main(["verify", str(run)]) == 0
    folders = checkpoint_folders("", "", run)
    assert [finding.text for finding in examine(folders) if finding.level == "problem"] == []
    told = [entry.text for entry in timeline(open_run(run)) if entry.what in ("started", "resumed")]
    assert ["4 workers" in told[0], "by 1 worker;" in told[1], "by 2 workers;" in told[2]] == [True] * 3


def test_a_journal_that_is_missing_is_still_missed(place: Place) -> None:
    """Of the starts that had its rank; those with fewer workers left nothing there."""
    through(place, "run", [(4, 5), (2, None)], **steps_of(4, 4))
    storage = LocalStorage(place.root / "run")
    for segment in list_segments(storage, 1):
        if segment.name.incarnation == 2:
            storage.remove(segment.name.path)
    problems = {verdict.rank: verdict.problems for verdict in check_journals(storage)}
    assert "start 2" in problems[1][0]
    assert [problems[rank] for rank in (0, 2, 3)] == [()] * 3


def test_the_folders_of_workers_that_are_gone_go_with_the_checkpoints_that_need_them(place: Place) -> None:
    through(place, "run", [(4, 5), (1, None)], **steps_of(4, 4))
    storage = LocalStorage(place.root / "run")
    assert all(list_segments(storage, rank) for rank in range(4))
    assert prune(storage, Retention(newest=1)) == []
    assert [rank for rank in journal_ranks(storage) if list_segments(storage, rank)] == [0]
    files = [path.name for path in (place.root / "run").rglob("*.safetensors")]
    assert not [name for name in files if "rank_0" not in name]


def test_a_run_removes_them_by_itself_once_they_are_not_needed(place: Place) -> None:
    changes = steps_of(4, 4, rl_config__save_max_ckpt_num=1)
    through(place, "run", [(4, 4), (1, 4)], **changes)
    storage = LocalStorage(place.root / "run")
    assert all(list_segments(storage, rank) for rank in range(4)), "what is replayed from them is there"
    assert place.train_by(1, "run", resume=True, **changes) == [None]
    assert [rank for rank in journal_ranks(storage) if list_segments(storage, rank)] == [0]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_step_is_rebuilt_by_any_number_of_workers(place: Place, workers: int) -> None:
    changes = steps_of(4, 4, rl_config__save_ckpt_interval=0)
    place.train_by(4, "run", **changes)
    place.train_by(4, "stopped", **changes, rl_config__max_steps=7, actor_config__lr_schedule__decay_steps=20)
    asked = {"position": Position(1, 2), "rebuild": True}
    how = {"resume": True, "source": "run", "asked": asked}
    assert place.train_by(workers, "rebuilt", **how, **changes) == [None] * workers
    assert place.digests("rebuilt") == place.digests("stopped")


def test_a_branch_goes_on_by_fewer_and_by_more(place: Place) -> None:
    """Its folder alone is enough once it has a checkpoint: what the others' folders held was copied."""
    through(place, "run", [(2, 9)], **steps_of(4, 2))
    how = {"resume": True, "source": "run", "asked": {"position": Position(0, 4)}}
    packages = [Counting(dies_at_update=2) for _ in range(4)]
    place.train_by(4, "branch", *packages, **how, **steps_of(4, 2))
    shutil.move(place.root / "run", place.root / "away")
    assert place.train_by(1, "branch", Counting(), resume=True, **steps_of(4, 2)) == [None]
    place.train("whole", **steps_of(4, 1))
    assert place.digests("branch") == place.digests("whole")


@pytest.mark.parametrize("accepted", [False, True])
def test_a_divergence_is_noticed_across_a_change_of_workers(place: Place, accepted: bool) -> None:
    through(place, "run", [(2, 5)], **steps_of(4, 2))

    class Other(ToyPackage):
        def create(self, settings: Any, group: Any) -> Any:
            engine = super().create(settings, group)
            update = engine.update
            engine.update = lambda batch, rate: update(batch, rate * (1 + 1e-3))  # type: ignore[method-assign]
            return engine

    changes = steps_of(4, 2, rl_config__on_divergence="accept" if accepted else "stop")
    ends = place.train_by(4, "run", *[Other() for _ in range(4)], resume=True, **changes)
    if accepted:
        assert ends == [None] * 4
    else:
        assert all("the replay gave" in str(end) for end in ends), "on all workers alike"


def test_a_run_of_the_version_before_goes_on_by_another_number(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its facts have workers and rollouts in place of the chunks of a step."""
    with monkeypatch.context() as before:
        factors = {"world_size": 2, "rl_config.num_rollouts": 2}
        before.setattr(facts, "of_step", lambda chunks: factors if chunks == 4 else {})
        through(place, "run", [(2, 5)], **steps_of(4, 2))
    packages = [Counting() for _ in range(4)]
    assert place.train_by(4, "run", *packages, resume=True, **steps_of(4, 2)) == [None] * 4
    (report,) = read(LocalStorage(place.root / "run"))
    assert (report.lost, report.chunks_generated_again) == ((), 0)
    assert report.updates_repeated == report.updates_replayed > 0
    place.train("whole", **steps_of(4, 1))
    assert place.digests("run") == place.digests("whole")


@pytest.fixture(params=["whole tensors", "rows"])
def spread(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The configuration of a run whose workers keep a part of the optimizer each."""
    if request.param == "rows":
        monkeypatch.setattr(boxes, "BLOCK_BYTES", 48)
    return {"actor_config__enable_parallel_optimizer": True}


def test_a_spread_optimizer_gives_the_same_bytes_killed_and_on_other_numbers(
    place: Place, spread: dict[str, Any]
) -> None:
    through(place, "run", [(4, 5), (2, 4), (1, 5), (2, 5), (4, None)], **steps_of(4, 4, **spread))
    place.train("whole", **steps_of(4, 1))
    assert_same_end(place.root / "run", place.root / "whole")
    assert set(Counting.generated.values()) == {1}
    assert_nothing_finished_was_lost(place.root / "run")


def test_it_may_be_turned_on_and_off_between_starts(place: Place, spread: dict[str, Any]) -> None:
    for number, (workers, dies) in enumerate([(3, 5), (3, 4), (6, 5), (2, None)]):
        changes = steps_of(6, 3, **(spread if number % 2 else {}))
        packages = [Counting(dies_at_update=dies) for _ in range(workers)]
        place.train_by(workers, "run", *packages, resume=number > 0, **changes)
    place.train("whole", **steps_of(6, 1))
    assert_same_end(place.root / "run", place.root / "whole")


def test_each_worker_writes_and_keeps_its_part_only(place: Place, spread: dict[str, Any]) -> None:
    place.train_by(3, "spread", **steps_of(6, 3, **spread))
    place.train_by(3, "replicated", **steps_of(6, 3))
    assert_same_end(place.root / "spread", place.root / "replicated")
    manifest = find(LocalStorage(place.root / "spread")).manifest
    moments = [
        (piece.tensor, piece.box)
        for table in tables(LocalStorage(place.root / "spread"), manifest)
        for piece in table.pieces
        if piece.role == "optimizer" and piece.tensor.startswith("adam_m.")
    ]
    assert len(moments) == len(set(moments)) > 3 * (boxes.BLOCK_BYTES == 48)


def test_a_forged_number_of_chunks_is_refused_at_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """No list of its divisors is made, and nothing is sized by it."""
    place.train("run", **steps_of(4, 1, rl_config__max_steps=2))
    monkeypatch.setattr(facts, "chunks_in", lambda _: (1 << 61) - 1)
    with pytest.raises(DataError, match="20 prompts, but one step needs"):
        place.plan("run", world_size=2, resume=True, **steps_of(4, 1))

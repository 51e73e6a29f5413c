"""What any worker of a run has to say is heard: on its own output, and by the first worker."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from lockstep import LockStep
from toy_run import Ranks
from toy_session import Place

from rollforward.channel import FRAME_WORDS
from rollforward.errors import StorageError
from rollforward.run.log import WorkerLog
from rollforward.store.journal.writing import Journal


def test_a_warning_of_the_second_worker_reaches_screen_and_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    prune = Journal.prune

    def fails_on_the_second(self: Journal, *given: Any) -> list[str]:
        if self.identity.rank == 1:
            raise StorageError("removing journal/rank_1/1-0_0.journal: Input/output error (EIO)")
        return prune(self, *given)

    monkeypatch.setattr(Journal, "prune", fails_on_the_second)
    assert Place(tmp_path).train_by_two("run") == [None, None]
    told = "an old journal segment could not be removed: removing journal/rank_1/1-0_0.journal"
    shown = [line for line in capsys.readouterr().out.splitlines() if told in line]
    assert shown
    assert all(line.startswith("rank 1: warning: ") for line in shown)
    kept = (tmp_path / "output" / "log" / "train.log").read_text()
    assert f"rank 1: warning: {told}" in kept


def test_warnings_travel_with_what_is_exchanged_anyway_and_in_order() -> None:
    heard: list[str] = []
    exchanges: list[Any] = []

    def work(rank: int, exchange: Callable[[Any], list[Any]]) -> None:
        def counted(value: Any) -> list[Any]:
            if rank == 0:
                exchanges.append(value)
            return exchange(value)

        log = WorkerLog(heard.append if rank == 0 else lambda _: None, rank)
        group = log.heard_over(Ranks(rank, 3, counted))
        log.warn(f"first of {rank}")
        log.warn(f"second of {rank}")
        assert group.all_gather(rank) == [0, 1, 2]
        log.warn(f"third of {rank}")
        assert group.all_gather({"value": rank})[2] == {"value": 2}

    assert LockStep(3).run(work) == [None, None, None]
    assert len(exchanges) == 2
    assert [text for text in heard if "of 0" in text] == ["first of 0", "second of 0", "third of 0"]
    others = [f"rank {rank}: {text} of {rank}" for text in ("first", "second") for rank in (1, 2)]
    assert sorted(text for text in heard if text.startswith("rank")) == sorted(
        [*others, "rank 1: third of 1", "rank 2: third of 2"]
    )


def test_a_group_of_one_carries_nothing() -> None:
    group = Ranks(0, 1, lambda value: [value])
    assert WorkerLog(print, 0).heard_over(group) is group


class Adding(Ranks):
    """A group of ranks that can add up."""

    sums: ClassVar[list[int]] = []

    def all_sum(self, numbers: Sequence[int]) -> Sequence[int]:
        self.sums.append(len(numbers))
        return [sum(each) for each in zip(*self.exchange(list(numbers)), strict=True)]


@pytest.mark.parametrize("workers", [2, 4])
def test_ranks_that_can_add_up_do_so_for_a_commit_whose_size_does_not_know_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("toy_session.Ranks", Adding)
    monkeypatch.setattr(Adding, "sums", [])
    place = Place(tmp_path)
    assert place.train_by(workers, "run", rl_config__num_rollouts=4 // workers) == [None] * workers
    assert set(Adding.sums) == {FRAME_WORDS}
    assert len(list((tmp_path / "run" / "commits").iterdir())) == 3

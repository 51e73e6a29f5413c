"""Runs in object storage, over a service in memory: the same bytes as in a folder, wherever they go on.

`tests/objects` has the same against real servers, with processes that are killed.
"""

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from memory_service import Service, serve
from toy_session import Killed, Place, ToyPackage, commit_at_once

from rollforward.cli.main import main
from rollforward.errors import CheckpointMismatch, ConfigError, RunExists, RunLocked, StorageError
from rollforward.position import Position
from rollforward.replay import report
from rollforward.replay.metrics import read_from
from rollforward.storage import LocalStorage
from rollforward.storage.address import use_options
from rollforward.store import find, list_checkpoints
from rollforward.store.layout import LOCK
from rollforward.store.lease import Lease
from rollforward.store.lock import read_owner
from rollforward.store.place import RunPlace, close_storage, settle_storage
from rollforward.store.restoring import content_digests
from rollforward.store.shipping import Shipping

RUN = "s3://bucket/runs/17"
THERE = {"actor_config__save": RUN}


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    yield serve(monkeypatch)
    use_options([])


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, service: Service) -> Place:  # noqa: ARG001
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Place(tmp_path)


@pytest.fixture
def whole(place: Place) -> dict[str, str]:
    """The digests that every run must end with."""
    place.train("whole")
    return place.digests("whole")


def digests(service: Service, address: str = RUN) -> dict[str, str]:
    storage = service.at(address)
    return content_digests(storage, find(storage).manifest)


def lose_the_machine(place: Place) -> None:
    shutil.rmtree(place.root / "cache")


def test_it_ends_with_the_bytes_of_a_run_in_a_folder(place: Place, service: Service, whole: Any) -> None:
    place.train("x", **THERE)
    assert digests(service) == whole
    folder, bucket = read_from(RunPlace.at(place.root / "whole").storage), read_from(service.at(RUN))
    assert [record["loss"] for record in bucket] == [record["loss"] for record in folder]
    assert not (place.root / "s3:").exists()


def test_the_log_names_the_working_folder_and_it_holds_nothing_that_lasts(
    place: Place, service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    place.train("x", asked=None, rl_config__work_dir=str(place.root / "here"), **THERE)
    assert (
        f"run: in {RUN}; what is only of this machine is in {place.root / 'here'}" in capsys.readouterr().out
    )
    left = [path.name for path in (place.root / "here").rglob("*") if path.is_file()]
    assert sorted(left) == ["place.json", "rank_0.json", "run.lock", "started.json"]
    assert not service.at(RUN).stat("heartbeat")


@pytest.mark.parametrize("durability", ["local", "remote"])
@pytest.mark.parametrize("dies", [0, 1, 4, 7, 9])
def test_it_goes_on_elsewhere_when_the_machine_is_lost(
    place: Place, service: Service, whole: Any, dies: int, durability: str
) -> None:
    how = {**THERE, "rl_config__journal_durability": durability}
    with pytest.raises(Killed):
        place.train("x", ToyPackage(dies_at_update=dies), **how)
    lose_the_machine(place)
    place.train("x", resume=True, **how)
    assert digests(service) == whole
    (recovery,) = report.read(service.at(RUN))
    assert (recovery.chunks_generated_again, recovery.lost) == (0, ())


def test_what_the_service_lacks_is_shipped_by_the_next_start_on_the_machine(
    place: Place,
    service: Service,
    whole: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    die_while_the_service_is_away(place, service, monkeypatch)
    place.train("x", resume=True, **THERE)
    assert "did not have yet were shipped from" in capsys.readouterr().out
    assert digests(service) == whole
    (recovery,) = report.read(service.at(RUN))
    assert recovery.chunks_generated_again == 0


def test_what_was_on_a_lost_machine_only_is_told_and_made_again(
    place: Place,
    service: Service,
    whole: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    die_while_the_service_is_away(place, service, monkeypatch)
    say_it_was_behind(service)
    lose_the_machine(place)
    place.train("x", resume=True, **THERE)
    assert (
        "lost: what was on a lost machine only when it was last heard of: 4 records"
        in capsys.readouterr().out
    )
    assert digests(service) == whole
    assert "made again" in report.read(service.at(RUN))[0].lost[0]


def die_while_the_service_is_away(place: Place, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Afterwards the service is there again."""
    commit_at_once(monkeypatch)
    nothing_more_is_shipped(monkeypatch, service, after=5)
    with pytest.raises((Killed, StorageError)):
        place.train("x", ToyPackage(dies_at_update=5), **THERE)
    service.away = False
    monkeypatch.undo()
    serve_again(monkeypatch, service, place)


def nothing_more_is_shipped(monkeypatch: pytest.MonkeyPatch, service: Service, *, after: int) -> None:
    """The service goes away when so many updates are done; who wants it then gets an error at once."""
    ship, seen = Shipping.note, []

    def note(self: Shipping, growing: Any, synced: int, *, records: int) -> None:
        seen.append(synced)
        if len(seen) > 2 * after:
            service.away = True
        ship(self, growing, synced, records=records)

    monkeypatch.setattr(Shipping, "note", note)


def serve_again(monkeypatch: pytest.MonkeyPatch, service: Service, place: Place) -> None:
    """After `undo`."""
    monkeypatch.setattr("rollforward.storage.address._bucket", service.open)
    monkeypatch.chdir(place.root)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place.root / "cache"))


def say_it_was_behind(service: Service) -> None:
    """What the lost machine's last renewal said."""
    storage = service.at(RUN)
    there = storage.read_tagged("run.lock")
    assert there is not None
    value = json.loads(there[0])
    value["held"] = True
    value["lease"] |= {"seconds": 0.01, "behind": {"records": 4, "bytes": 900, "seconds": 3.0}}
    storage.write("run.lock", [json.dumps(value).encode()])


def test_no_step_waits_for_the_service(place: Place, service: Service) -> None:
    asked_by: set[str] = set()

    class Watched(ToyPackage):
        def create(self, *args: Any) -> Any:
            engine = super().create(*args)
            update = engine.update

            def watched(*inner: Any) -> Any:
                if not self.updates:
                    service.askers.clear()
                asked_by.update(service.askers)
                return update(*inner)

            engine.update = watched
            return engine

    place.train("x", Watched(), **THERE, rl_config__epochs=4)
    assert "checkpoints" in asked_by
    assert threading.current_thread().name not in asked_by


class TestWorkers:
    def test_two_end_with_the_bytes_of_one(self, place: Place, service: Service, whole: Any) -> None:
        place.train_by_two("x", **{**THERE, "rl_config__num_rollouts": 1})
        assert digests(service) == whole

    def test_two_that_died_are_gone_on_by_one_elsewhere(
        self, place: Place, service: Service, whole: Any
    ) -> None:
        how = {**THERE, "rl_config__num_rollouts": 1}
        died = place.train_by_two("x", ToyPackage(dies_at_update=4), ToyPackage(dies_at_update=4), **how)
        assert all(died)
        lose_the_machine(place)
        place.train("x", resume=True, **THERE)
        assert digests(service) == whole

    def test_a_working_folder_that_cannot_be_written_on_one_ends_both(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write = LocalStorage.write

        def full(self: LocalStorage, path: str, buffers: Any) -> int:
            if self.root.endswith("spool/rank_1"):
                raise StorageError(f"writing {path}: no space left on device")
            return write(self, path, buffers)

        monkeypatch.setattr(LocalStorage, "write", full)
        first, second = place.train_by_two("x", **{**THERE, "rl_config__num_rollouts": 1})
        assert "no space left" in str(second)
        assert str(first) == f"rank 1: {second}"


class TestOtherPlaces:
    def test_a_run_in_a_bucket_goes_on_in_a_folder(self, place: Place, whole: Any) -> None:
        with pytest.raises(Killed):
            place.train("x", ToyPackage(dies_at_update=6), **THERE)
        asked = {"actor_checkpoint_path": f"{RUN}/train", "ref_checkpoint_path": f"{RUN}/ref"}
        place.train("here", resume=True, asked=asked)
        assert place.digests("here") == whole

    def test_a_run_in_a_folder_goes_on_in_a_bucket(self, place: Place, service: Service, whole: Any) -> None:
        with pytest.raises(Killed):
            place.train("here", ToyPackage(dies_at_update=6))
        place.train("x", resume=True, source="here", **THERE)
        assert digests(service) == whole
        shutil.rmtree(place.root / "here")
        lose_the_machine(place)
        place.train("x", resume=True, **THERE)

    def test_a_run_branches_off_into_another_bucket(self, place: Place, service: Service, whole: Any) -> None:
        place.train("x", **THERE)
        asked = {"actor_checkpoint_path": f"{RUN}/train", "position": Position(1, 2)}
        place.train("y", resume=True, asked=asked, actor_config__save="s3://other/run")
        assert digests(service, "s3://other/run") == whole

    def test_not_into_its_own_place(self, place: Place) -> None:
        place.train("x", **THERE)
        asked = {"actor_checkpoint_path": f"{RUN}/train", "position": Position(1, 2)}
        with pytest.raises(ConfigError, match="needs a folder of its own"):
            place.plan("x", resume=True, asked=asked, **THERE)

    def test_policy_and_reference_are_of_one_run(self, place: Place) -> None:
        place.train("x", **THERE)
        asked = {"actor_checkpoint_path": f"{RUN}/train", "ref_checkpoint_path": str(place.root / "ref")}
        with pytest.raises(CheckpointMismatch, match="holds both"):
            place.plan("x", resume=True, asked=asked, **THERE)

    def test_a_new_run_does_not_replace_one(self, place: Place) -> None:
        place.train("x", **THERE)
        with pytest.raises(RunExists, match=f"{RUN} already holds a run: 5 checkpoints"):
            place.plan("x", **THERE)

    def test_a_working_folder_serves_one_run(self, place: Place) -> None:
        place.train("x", rl_config__work_dir=str(place.root / "here"), **THERE)
        with pytest.raises(StorageError, match=f"is the working folder of {RUN}, not of s3://bucket/other"):
            place.train(
                "y", rl_config__work_dir=str(place.root / "here"), actor_config__save="s3://bucket/other"
            )


class TestOneWriter:
    def test_a_second_trainer_on_this_machine_is_refused(self, place: Place) -> None:
        plan = place.plan("x", **THERE)
        with plan.place.held(), pytest.raises(RunLocked):
            place.train("x", **THERE)

    def test_one_that_was_replaced_commits_nothing_more(
        self, place: Place, service: Service, whole: Any
    ) -> None:
        """Its lease is taken over in the middle, as if it had been frozen for long."""

        class Replaced(ToyPackage):
            def create(self, *args: Any) -> Any:
                engine = super().create(*args)
                update = engine.update

                def taken(*inner: Any) -> Any:
                    if len(self.updates) == 5:
                        storage = service.at(RUN)
                        there = storage.read_tagged("run.lock")
                        assert there is not None
                        value = json.loads(there[0])
                        value["lease"]["seconds"] = 0.01
                        storage.write("run.lock", [json.dumps(value).encode()])
                        others.append(Lease.acquire(storage, place="elsewhere", seconds=3000))
                    return update(*inner)

                engine.update = taken
                return engine

        others: list[Lease] = []
        with pytest.raises(RunLocked, match="taken over"):
            place.train("x", Replaced(), **THERE)
        before = [info.manifest.incarnation for info in list_checkpoints(service.at(RUN)) if info.manifest]
        assert set(before) == {1}
        assert len(before) < 5
        others[0].release()
        lose_the_machine(place)
        place.train("x", resume=True, **THERE)
        assert digests(service) == whole

    def test_another_rank_of_a_start_that_was_replaced_does_nothing_more(
        self, service: Service, tmp_path: Path
    ) -> None:
        """The first rank's machine is lost; the other one's was only away for long."""

        def files() -> dict[str, bytes]:
            there = service.at(RUN)
            return {path: read(there, path) for path in every_file(there, "") if path != LOCK}

        lost = RunPlace.at(RUN, work_dir=tmp_path / "lost")
        lease = lost.hold(say=lambda _: None, seconds=0.01).lease  # type: ignore[attr-defined]
        zombie = lost.begin(rank=1, incarnation=1, hold=None)
        journal = zombie.appender("journal/rank_1/1-0_0.journal")
        journal.append([b"in time"])
        settle_storage(zombie)
        zombie.write("train/rank_1/meta.json", [b"of the first start"])
        with lease._lock:
            lease._released.set()  # it is not renewed any more

        elsewhere = RunPlace.at(RUN, work_dir=tmp_path / "elsewhere")
        with elsewhere.held() as hold:
            successor = elsewhere.begin(rank=1, incarnation=hold.incarnation, hold=None)
            successor.write("train/rank_1/meta.json", [b"of the second start"])
            before = files()
            journal.append([b", and too late"])
            for act in (
                lambda: settle_storage(zombie),
                lambda: zombie.write("train/rank_1/meta.json", [b"of the first start"]),
                lambda: zombie.remove("train/rank_1/meta.json"),
                lambda: zombie.rewrite("journal/rank_1/1-0_0.journal", [b"anew"]),
            ):
                with pytest.raises(RunLocked, match="taken over by"):
                    act()
            assert files() == before
            close_storage(successor)

    def test_starts_have_names_of_their_own_for_their_files(
        self, place: Place, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        commit_at_once(monkeypatch)
        with pytest.raises(Killed):
            place.train("x", ToyPackage(dies_at_update=4), **THERE)
        place.train("x", resume=True, **THERE)
        names = [entry.name for entry in service.at(RUN).scan("train/rank_0")]
        assert "policy_model_rank_0-0_3.safetensors" in names
        assert "policy_model.16_rank_0-2_0.safetensors" in names

    def test_the_lease_is_given_back(self, place: Place, service: Service) -> None:
        place.train("x", **THERE)
        owner = read_owner(service.at(RUN))
        assert owner is not None
        assert not owner.held


class TestVerbs:
    @pytest.fixture(autouse=True)
    def run(self, place: Place) -> None:
        place.train("x", **THERE)

    def test_prune_removes_there(self, service: Service, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["prune", RUN, "--save_max_ckpt_num", "2", "--dry_run"]) == 0
        assert len(list_checkpoints(service.at(RUN))) == 5
        assert main(["prune", RUN, "--save_max_ckpt_num", "2"]) == 0
        assert "checkpoint\t0_0" in capsys.readouterr().out
        assert len(list_checkpoints(service.at(RUN))) == 2
        assert main(["verify", "--deep", RUN]) == 0

    def test_prune_is_refused_while_a_trainer_runs(
        self, place: Place, service: Service, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with place.plan("x", resume=True, **THERE).place.held():
            assert main(["prune", RUN]) == 1
        assert "works on this machine" in capsys.readouterr().err
        assert len(list_checkpoints(service.at(RUN))) == 5

    def test_doctor_looks_there(self, capsys: pytest.CaptureFixture[str], service: Service) -> None:
        main(["doctor", "--save_checkpoint_dir", RUN, "--json"])
        found = {(each["check"], each["level"]) for each in json.loads(capsys.readouterr().out)["findings"]}
        assert {("service", "ok"), ("checkpoints", "ok"), ("journal", "ok")} <= found
        assert [entry.name for entry in service.at(RUN).scan("") if "run.lock" in entry.name] == ["run.lock"]

    def test_doctor_finds_what_is_damaged_there(
        self, capsys: pytest.CaptureFixture[str], service: Service
    ) -> None:
        storage = service.at(RUN)
        storage.write("train/rank_0/policy_model_rank_0-2_0.safetensors", [b"x" * 5000])
        assert main(["doctor", "--save_checkpoint_dir", RUN]) == 1
        assert "2_0" in capsys.readouterr().out


def test_options_reach_the_client_and_are_written_nowhere(
    place: Place, service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    use_options(["aws_secret_access_key=not-to-be-seen", "region=here"])
    place.train("x", **THERE)
    assert service.given[-1] == {"secret_access_key": "not-to-be-seen", "region": "here"}
    assert main(
        ["doctor", "--save_checkpoint_dir", RUN, "--storage_option", "secret_access_key=not-to-be-seen"]
    ) in (
        0,
        1,
    )
    written = [path.read_bytes() for path in place.root.rglob("*") if path.is_file()]
    storage = service.at(RUN)
    written += [read(storage, path) for path in every_file(storage, "")]
    captured = capsys.readouterr()
    assert len(written) > 20
    assert not any(b"not-to-be-seen" in each for each in written)
    assert "not-to-be-seen" not in captured.out + captured.err


@pytest.mark.parametrize("given", ["region", "=x", ""])
def test_an_option_of_another_form_is_refused(given: str) -> None:
    with pytest.raises(ConfigError, match="key=value"):
        use_options([given])


def read(storage: Any, path: str) -> bytes:
    with storage.open(path) as handle:
        content = bytearray(handle.size)
        handle.read_into(memoryview(content), 0)
    return bytes(content)


def every_file(storage: Any, folder: str) -> Iterator[str]:
    for entry in storage.scan(folder):
        path = f"{folder}/{entry.name}" if folder else entry.name
        if entry.kind == "folder":
            yield from every_file(storage, path)
        else:
            yield path

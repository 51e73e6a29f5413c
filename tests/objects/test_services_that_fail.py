"""A service that is full, refuses, is away or slow, before a run and in its middle: as the how-to says.

The loops are of `open_run`, in this process, so a test decides in which step what happens. Each step's batch
is sampled once over all starts: what was recorded is never lost; the end has the bytes of an undisturbed run.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gateway import Answer, Gateway, Obstruct, Reset, away, nothing, refusing_writes
from servers import BUCKET, SECRET, USER, SeaweedFS, bucket
from storage_case import all_bytes
from toy_session import Place
from training import Training

import rollforward
from rollforward.cli.main import main
from rollforward.errors import StorageError
from rollforward.replay import saving
from rollforward.storage import address as addresses
from rollforward.storage.address import default_work_dir
from rollforward.storage.objects import ObjectStorage

STEPS = 10
FULL = Answer(403, "QuotaExceeded", "The quota of the bucket is used up.")
NO_SPACE = Answer(507, "XMinioStorageFull", "Storage backend has reached its minimum free drive threshold.")
EXPIRED = Answer(400, "ExpiredToken", "The provided token has expired.")
PATIENCE = 300.0
"""Seconds after which a test hangs."""
OTHER_SECRET = "another-secret-that-must-not-be-seen"


@dataclass
class Loop:
    """A loop that saves every other step, at an address or in a folder."""

    where: str | Path
    before: dict[int, Callable[[], object]] = field(default_factory=dict)
    """What happens before a step, in the first start that comes to it."""
    said: list[str] = field(default_factory=list)
    sampled: list[int] = field(default_factory=list)

    def train(self, **options: Any) -> bytes:
        """To the end; the weights."""
        weights = np.zeros(3, np.float32)
        with rollforward.open_run(self.where, keep=2, log=self.said.append, **options) as run:
            start = run.restore({"policy": {"w": weights}})
            for step in range(start.step if start else 0, STEPS):
                self.before.pop(step, lambda: None)()
                batch = run.once(step, "batch", lambda step=step: self._sample(step))
                with run.updating(step):
                    weights += batch
                run.outcome(step, sum=float(weights.sum()))
                run.checkpoint(step + 1, {"policy": {"w": weights}}, every=2)
        return weights.tobytes()

    def _sample(self, step: int) -> Any:
        self.sampled.append(step)
        return np.random.default_rng(step).random(3).astype(np.float32)

    @property
    def log(self) -> str:
        return "\n".join(self.said)

    def lost_nothing(self, ended_with: bytes, whole: bytes) -> None:
        """All was sampled once, what the run ended with is right, and is what a later start finds."""
        assert ended_with == whole
        assert self.train() == whole
        assert self.sampled == list(range(STEPS))
        assert main(["verify", "--deep", str(self.where)]) == 0


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    """What an undisturbed run ends with."""
    return Loop(tmp_path / "whole").train()


@pytest.fixture
def loop(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loop:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Loop(address)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again for two minutes is tried once."""
    monkeypatch.setattr(addresses, "_RETRIES", {**addresses._RETRIES, "max_retries": 0})


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that is due while the last one is on its way is left for a later step, and not waited for."""
    monkeypatch.setattr(saving, "PATIENCE", 0.1)


def obstruct(gateway: Gateway, how: Obstruct) -> Callable[[], None]:
    """From then on."""
    return lambda: setattr(gateway, "obstruct", how)


def told(text: str, address: str, *words: str) -> None:
    """The bucket and a key in it, what the service answered, and what to try; no secret."""
    assert f"{address}/" in text, text
    for word in words:
        assert word in text, text
    assert SECRET not in text
    assert OTHER_SECRET not in text


class TestFull:
    @pytest.mark.parametrize("answer", [FULL, NO_SPACE], ids=["quota", "storage"])
    @pytest.mark.usefixtures("impatient")
    def test_the_run_goes_on_and_says_so_and_saves_again_when_there_is_room(
        self, loop: Loop, gateway: Gateway, whole: bytes, answer: Answer
    ) -> None:
        # A checkpoint is due at the end of every other step.
        loop.before = {3: obstruct(gateway, refusing_writes(answer)), 7: obstruct(gateway, nothing)}
        ended_with = loop.train()
        told(loop.log, loop.where, "was not saved", f"{answer.status} ", answer.code, answer.message)
        loop.lost_nothing(ended_with, whole)

    def test_a_run_that_ends_meanwhile_says_what_is_missing_and_the_next_start_brings_it(
        self, loop: Loop, gateway: Gateway, whole: bytes
    ) -> None:
        loop.before = {3: obstruct(gateway, refusing_writes(FULL))}
        with pytest.raises(StorageError) as caught:
            loop.train()
        told(f"{caught.value}\n{loop.log}", loop.where, "403", "QuotaExceeded", "quota raised")
        gateway.obstruct = nothing
        loop.lost_nothing(loop.train(), whole)

    @pytest.mark.usefixtures("impatient")
    def test_a_quota_of_the_service_itself(self, loop: Loop, own_server: SeaweedFS, whole: bytes) -> None:
        addresses.open_storage(f"{loop.where}-beside").write("large", [bytes(3 << 20)])
        loop.before = {3: lambda: own_server.limit(1)}
        with pytest.raises(StorageError) as caught:
            loop.train()
        told(f"{caught.value}\n{loop.log}", loop.where, "500", "InternalError", "full")
        own_server.limit(None)
        loop.lost_nothing(loop.train(), whole)

    def test_where_the_journal_must_be_there_the_run_ends_and_is_resumed_with_all_that_was_used(
        self, loop: Loop, gateway: Gateway, whole: bytes
    ) -> None:
        loop.before = {3: obstruct(gateway, refusing_writes(FULL))}
        with pytest.raises(StorageError) as caught:
            loop.train(journal_durability="remote")
        told(f"{caught.value}", loop.where, "403", "QuotaExceeded")
        assert loop.sampled[-1] == 3
        gateway.obstruct = nothing
        loop.lost_nothing(loop.train(journal_durability="remote"), whole)


class TestRefused:
    def test_wrong_credentials_are_told_before_anything_is_written(
        self, loop: Loop, seaweed: SeaweedFS, use: Any
    ) -> None:
        use(seaweed.url, AWS_SECRET_ACCESS_KEY=OTHER_SECRET)
        with pytest.raises(StorageError) as caught:
            loop.train()
        assert "SignatureDoesNotMatch" in str(caught.value)
        assert "AWS_SECRET_ACCESS_KEY" in caught.value.hint
        assert OTHER_SECRET not in str(caught.value)
        self.nothing_is_there(loop, seaweed, use)

    def nothing_is_there(self, loop: Loop, seaweed: SeaweedFS, use: Any) -> None:
        assert not default_work_dir(str(loop.where)).exists()
        use(seaweed.url)
        assert addresses.open_storage(loop.where).scan("") == []

    def test_credentials_that_end_in_mid_run_cost_no_more_than_a_new_start(
        self, loop: Loop, gateway: Gateway, whole: bytes
    ) -> None:
        loop.before = {3: lambda: setattr(gateway, "headers", of_a_user_that_was_removed)}
        with pytest.raises(StorageError) as caught:
            loop.train()
        told(
            f"{caught.value}\n{loop.log}",
            loop.where,
            "was not saved",
            "InvalidAccessKeyId",
            "AWS_ACCESS_KEY_ID",
        )
        gateway.headers = dict
        loop.lost_nothing(loop.train(), whole)

    def test_a_token_that_expires_is_told_as_that(self, loop: Loop, gateway: Gateway, whole: bytes) -> None:
        loop.before = {3: obstruct(gateway, lambda *_: EXPIRED)}
        with pytest.raises(StorageError) as caught:
            loop.train()
        told(f"{caught.value}\n{loop.log}", loop.where, "400", "ExpiredToken", "get new ones")
        gateway.obstruct = nothing
        loop.lost_nothing(loop.train(), whole)

    def test_a_clock_that_is_off_is_told_before_anything_is_written(
        self, loop: Loop, gateway: Gateway, seaweed: SeaweedFS, use: Any
    ) -> None:
        gateway.headers = an_hour_late
        with pytest.raises(StorageError) as caught:
            loop.train()
        assert "RequestTimeTooSkewed" in str(caught.value)
        assert "NTP" in caught.value.hint
        self.nothing_is_there(loop, seaweed, use)

    def test_a_clock_that_is_off_in_mid_run_and_set_again_loses_nothing(
        self, loop: Loop, gateway: Gateway, whole: bytes
    ) -> None:
        loop.before = {
            3: lambda: setattr(gateway, "headers", an_hour_late),
            7: lambda: setattr(gateway, "headers", dict),
        }
        ended_with = loop.train()
        told(loop.log, loop.where, "was not saved", "RequestTimeTooSkewed", "NTP")
        loop.lost_nothing(ended_with, whole)


def of_a_user_that_was_removed(headers: dict[str, str]) -> dict[str, str]:
    """As a user sends them whom the service does not know any more."""
    return {name: value.replace(USER, "removed") for name, value in headers.items()}


def an_hour_late(headers: dict[str, str]) -> dict[str, str]:
    """As a machine sends them whose clock is off; the service looks at that before the signature."""
    written = "%Y%m%dT%H%M%SZ"
    (name,) = [name for name in headers if name.lower() == "x-amz-date"]
    then = datetime.strptime(headers[name], written) - timedelta(hours=1)
    return headers | {name: then.strftime(written)}


class TestAway:
    @pytest.mark.usefixtures("hasty")
    def test_steps_do_not_wait_for_a_service_that_is_away_for_a_while(
        self, loop: Loop, gateway: Gateway, whole: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ever = {"max_retries": 10**6, "retry_timeout": timedelta(days=1)}
        monkeypatch.setattr(addresses, "_RETRIES", {**addresses._RETRIES, **ever})
        came_back: list[str] = []

        def comes_back(why: str) -> None:
            came_back.append(why)
            gateway.obstruct = nothing

        # By a step, to which only a loop comes that has gone on without it.
        too_late = threading.Timer(PATIENCE, comes_back, ["too late"])
        too_late.start()
        loop.before = {3: obstruct(gateway, away), 5: lambda: comes_back("by a step")}
        ended_with = loop.train()
        too_late.cancel()
        loop.lost_nothing(ended_with, whole)
        assert came_back == ["by a step"]

    @pytest.mark.usefixtures("impatient")
    def test_away_for_longer_than_a_request_is_tried_a_checkpoint_fails_and_the_next_is_saved(
        self, loop: Loop, gateway: Gateway, whole: bytes
    ) -> None:
        loop.before = {3: obstruct(gateway, away), 7: obstruct(gateway, nothing)}
        ended_with = loop.train()
        told(loop.log, loop.where, "was not saved", "AWS_ENDPOINT_URL")
        loop.lost_nothing(ended_with, whole)

    @pytest.mark.usefixtures("impatient")
    def test_where_the_journal_must_be_there_the_run_ends_and_can_be_resumed(
        self, loop: Loop, gateway: Gateway, whole: bytes
    ) -> None:
        loop.before = {3: obstruct(gateway, away)}
        with pytest.raises(StorageError) as caught:
            loop.train(journal_durability="remote")
        told(str(caught.value), loop.where, "AWS_ENDPOINT_URL")
        gateway.obstruct = nothing
        loop.lost_nothing(loop.train(journal_durability="remote"), whole)


class TestSlow:
    @pytest.mark.parametrize("what", ["safetensors", "/journal/"])
    def test_steps_do_not_wait_for_what_takes_long(
        self, loop: Loop, gateway: Gateway, whole: bytes, what: str, request: pytest.FixtureRequest
    ) -> None:
        if what == "/journal/":
            request.getfixturevalue("hasty")  # a save waits for the journal
        held, goes_on = threading.Event(), threading.Event()

        def hold(method: str, path: str) -> None:
            if method == "PUT" and what in path:
                held.set()
                assert goes_on.wait(PATIENCE)

        # A step lets it go on, to which only a loop comes that does not wait for it.
        loop.before = {3: obstruct(gateway, hold), 4: lambda: held.wait(PATIENCE), 5: goes_on.set}
        loop.lost_nothing(loop.train(), whole)
        assert "was not saved" not in loop.log

    def test_a_service_that_asks_to_wait_is_asked_again(
        self, loop: Loop, gateway: Gateway, whole: bytes
    ) -> None:
        put_off: set[str] = set()

        def slow_down(method: str, path: str) -> Answer | None:
            if method != "PUT" or path in put_off:
                return None
            put_off.add(path)
            return Answer(503, "SlowDown", "Please reduce your request rate.")

        gateway.obstruct = slow_down
        loop.lost_nothing(loop.train(), whole)
        assert len(put_off) > STEPS
        assert "was not saved" not in loop.log


class TestBreaks:
    """Connections that break in mid-request: the client cannot know whether it was carried out."""

    @pytest.fixture(params=["before it is carried out", "after it was carried out"])
    def breaks(self, request: pytest.FixtureRequest, gateway: Gateway) -> Callable[[int], None]:
        """From then on, that many requests which change something break there."""
        where = "obstruct" if request.param.startswith("before") else "withhold"

        def times(number: int) -> None:
            left = [number]

            def tear(method: str, _path: str) -> None:
                if method in ("PUT", "POST") and left[0]:
                    left[0] -= 1
                    raise Reset

            setattr(gateway, where, tear)

        return times

    def test_a_conditional_write_that_breaks_off_is_repeated_and_done_once(
        self, address: str, breaks: Callable[[int], None], gateway: Gateway
    ) -> None:
        storage = addresses.open_storage(address)
        breaks(2)
        first = storage.put_if("run.lock", b"one", None)
        assert storage.read_tagged("run.lock") == (b"one", first)
        breaks(2)
        second = storage.put_if("run.lock", b"two", first)
        assert storage.read_tagged("run.lock") == (b"two", second)
        assert [method for method, path in gateway.asked if path.endswith("run.lock")].count("PUT") == 6

    @pytest.mark.parametrize("where", ["obstruct", "withhold"])
    def test_a_conditional_write_that_breaks_off_does_not_replace_what_another_wrote_meanwhile(
        self, address: str, gateway: Gateway, seaweed: SeaweedFS, where: str
    ) -> None:
        other = ObjectStorage(bucket(seaweed.url, address.removeprefix(f"s3://{BUCKET}/")), address)
        storage = addresses.open_storage(address)
        tag = storage.put_if("run.lock", b"mine", None)

        def overtaken(method: str, _path: str) -> None:
            if method == "PUT":
                setattr(gateway, where, nothing)
                there = other.read_tagged("run.lock")
                assert there is not None
                assert other.put_if("run.lock", b"another's", there[1])
                raise Reset

        setattr(gateway, where, overtaken)
        assert storage.put_if("run.lock", b"mine again", tag) is None
        assert getattr(gateway, where) is nothing
        assert storage.read_tagged("run.lock")[0] == b"another's"

    def test_appends_and_removals_that_break_off_are_repeated(
        self, address: str, breaks: Callable[[int], None]
    ) -> None:
        storage = addresses.open_storage(address)
        breaks(1)
        growing = storage.appender("journal/a")
        growing.append([b"one"])
        breaks(1)
        growing.append([b"two"])
        assert all_bytes(storage, "journal/a") == b"onetwo"
        breaks(1)
        storage.remove("journal/a")
        assert storage.scan("journal") == []

    def test_a_run_whose_connections_break_again_and_again_does_not_notice(
        self, loop: Loop, whole: bytes, breaks: Callable[[int], None]
    ) -> None:
        loop.before = {step: lambda: breaks(3) for step in range(1, STEPS)}
        ended_with = loop.train(journal_durability="remote")
        assert "was not saved" not in loop.log
        assert "lacks" not in loop.log
        loop.lost_nothing(ended_with, whole)


class TestTrainer:
    """The same of `rollforward train`, as a process."""

    @pytest.fixture
    def training(self, tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> Training:
        monkeypatch.chdir(tmp_path)
        return Training(Place(tmp_path), address)

    def test_a_full_bucket_ends_no_step_and_the_end_says_what_to_do(
        self, training: Training, gateway: Gateway
    ) -> None:
        training.place.train("whole")
        full = refusing_writes(FULL)

        def from_the_second_checkpoint_on(method: str, path: str) -> Answer | None:
            return full(method, path) if any("-0_3" in there for _, there in gateway.asked) else None

        gateway.obstruct = from_the_second_checkpoint_on
        trainer = training.start()
        training.logs.append(trainer.communicate(timeout=600)[0])
        assert trainer.returncode == 1, training.log
        told(training.log, training.address, "step 1_4", "was not saved", "403 Forbidden, QuotaExceeded")
        assert "start the run again on this machine" in training.log
        gateway.obstruct = nothing
        training.finish()
        training.check(training.place.digests("whole"), 10)
        assert training.generated_again() == 0

    def test_wrong_credentials_end_a_start_before_anything_is_written(
        self, training: Training, seaweed: SeaweedFS, use: Any
    ) -> None:
        use(seaweed.url)
        trainer = training.start(more=["--storage_option", f"secret_access_key={OTHER_SECRET}"])
        output, _ = trainer.communicate(timeout=600)
        assert trainer.returncode == 1
        assert f"listing {training.address}: 403 Forbidden, SignatureDoesNotMatch" in output
        assert "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in output
        assert OTHER_SECRET not in output
        assert addresses.open_storage(training.address).scan("") == []
        assert not training.home().exists()

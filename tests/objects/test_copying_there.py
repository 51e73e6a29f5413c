"""`rollforward copy` to a real object store: processes killed, the server killed, a run resumed elsewhere."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from servers import SECRET, SeaweedFS
from toy_session import Killed, Place, ToyPackage, commit_at_once

from rollforward.cli.main import main
from rollforward.storage.address import open_storage
from rollforward.store.catalog import load_manifest, positions
from rollforward.store.copying import MARK
from rollforward.store.restoring import verify

KILLS = 20
ENDS = "from rollforward.cli.main import run_process; run_process()"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    found = Place(tmp_path)
    found.train("run")
    return found


def copying(source: object, target: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", ENDS, "copy", str(source), str(target)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    )


def whole_checkpoints(address: str) -> list[str]:
    """Those there are; each is read and digested."""
    storage = open_storage(address)
    for position in positions(storage):
        verify(storage, load_manifest(storage, position))
    return [str(position) for position in positions(storage)]


def test_killed_again_and_again_it_leaves_only_whole_checkpoints(
    place: Place, seaweed: SeaweedFS, address: str, use, capsys: pytest.CaptureFixture[str]
) -> None:
    use(seaweed.url)
    moments = random.Random(7)
    for _ in range(KILLS):
        process = copying(place.root / "run", address)
        time.sleep(moments.uniform(0.3, 1.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        whole_checkpoints(address)
    done = copying(place.root / "run", address)
    output, errors = done.communicate(timeout=600)
    assert (done.returncode, errors) == (0, "")
    assert "checkpoints there: 0_0, 0_3, 1_1, 1_4, 2_0" in output
    assert whole_checkpoints(address) == ["2_0", "1_4", "1_1", "0_3", "0_0"]
    assert main(["diff", str(place.root / "run"), address]) == 0
    assert SECRET not in output + errors + capsys.readouterr().out


def test_a_server_that_goes_away_and_comes_back_costs_only_time(
    place: Place, tmp_path: Path, address: str, use
) -> None:
    server = SeaweedFS(tmp_path / "server")
    server.start()
    use(server.url)
    (place.root / "run" / "large").write_bytes(random.Random(1).randbytes(60 << 20))
    process = copying(place.root / "run", address)
    there = open_storage(address)
    while there.stat(MARK) is None:
        assert process.poll() is None
    server.stop()
    server.start()
    try:
        _, errors = process.communicate(timeout=600)
        assert (process.returncode, errors) == (0, "")
        assert main(["diff", str(place.root / "run"), address]) == 0
    finally:
        server.stop()


def test_a_run_whose_machine_is_lost_goes_on_elsewhere_with_the_same_bytes(
    place: Place, tmp_path: Path, seaweed: SeaweedFS, address: str, use, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(seaweed.url)
    commit_at_once(monkeypatch)
    with pytest.raises(Killed):
        place.train("lost", ToyPackage(dies_at_update=7))
    assert main(["copy", str(tmp_path / "lost"), address]) == 0
    shutil.rmtree(tmp_path / "lost")
    assert main(["verify", "--deep", address]) == 0
    assert main(["copy", address, str(tmp_path / "lost")]) == 0
    place.train("lost", resume=True)
    assert place.digests("lost") == place.digests("run")

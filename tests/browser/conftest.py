"""Runs to look at, their pages, and one browser for all of them."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import example_run
import pytest
from chromium import Browser, chromium

from rollforward.cli.main import main


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's run, killed twice, with another number of checkpoints to keep at its last start."""
    folder = tmp_path_factory.mktemp("example")
    for number, step in enumerate(example_run.KILLS):
        example_run.kill_at(
            folder, step, example_run.start(folder, steps=example_run.STEPS, resume=number > 0)
        )
    last = {"rl_config.save_max_ckpt_num": 4}
    process = example_run.start(folder, steps=example_run.STEPS, resume=True, **last)
    assert process.wait(example_run.PATIENCE) == 0, (folder / "train.log").read_text()[-3000:]
    return folder / "run"


@pytest.fixture(scope="session")
def damaged(example: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy with a byte turned in the newest policy and one in the middle of the journal."""
    run = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(example, run)
    newest = max((run / "train").rglob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    for path in (newest, sorted((run / "journal").rglob("*.journal"))[0]):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0x10
        path.write_bytes(content)
    return run


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes the page of some runs, as a user does."""

    def make(*runs: Path, options: tuple[str, ...] = ("--language", "en")) -> Path:
        out = tmp_path_factory.mktemp("page") / "report.html"
        assert main(["report", *map(str, runs), "--out", str(out), *options]) == 0
        return out

    return make


@pytest.fixture(scope="session")
def running_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(running_browser: Browser) -> Iterator[Browser]:
    """At the size of a laptop, light; a page that says anything on its console fails its test."""
    running_browser.size(1280, 900)
    running_browser.console()
    yield running_browser
    assert running_browser.console() == []

"""What `rollforward` offers to other programs: nothing comes or goes unnoticed, and importing it is quick."""

import inspect
import subprocess
import sys

import pytest

import rollforward
from rollforward import library

PUBLIC = {
    "Run": ["checkpoint", "close", "metrics", "once", "outcome", "restore", "until", "updating"],
    "Piece": ["array", "global_shape", "of", "offset"],
    "Start": ["epoch", "free", "position", "state", "step"],
}


def test_the_package_offers_these_names() -> None:
    assert sorted(rollforward.__all__) == ["Piece", "Run", "Start", "__version__", "open_run"]
    for name in rollforward.__all__:
        assert getattr(rollforward, name) is not None


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_class_has_these_members(name: str) -> None:
    kind = getattr(library, name)
    members = {member for member in vars(kind) if not member.startswith("_")}
    members |= set(getattr(kind, "__dataclass_fields__", {}))
    assert sorted(members) == PUBLIC[name]


def test_open_run_takes_these_parameters() -> None:
    parameters = inspect.signature(rollforward.open_run).parameters
    assert list(parameters) == [
        "path",
        "rank",
        "world_size",
        "all_gather",
        "all_sum",
        "facts",
        "versions",
        "keep",
        "prove_unchanged",
        "on_divergence",
        "attachments",
        "work_dir",
        "journal_durability",
        "storage_options",
        "log",
    ]
    assert [name for name, one in parameters.items() if one.kind is not one.KEYWORD_ONLY] == ["path"]


def test_a_name_that_is_not_there_is_said_to_be_missing() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'open_runs'"):
        rollforward.open_runs  # noqa: B018 - the look is what is tested


def test_importing_the_package_loads_nothing_else() -> None:
    program = "import sys, rollforward; print('numpy' in sys.modules, 'rollforward.library' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]

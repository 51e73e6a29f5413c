"""What a run needs is computed before it starts, and compared with what there is.

python tests/unit/test_memory.py     writes the table of docs/how-to/memory.md anew
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from rollforward.cli.main import main
from rollforward.config.loading import load
from rollforward.engines.base import Finding
from rollforward.engines.mindspore.package import MindSpore, free_port
from rollforward.errors import ConfigError, ModelError
from rollforward.inspection import machine
from rollforward.inspection.machine import Room, room
from rollforward.models.config import ModelConfig
from rollforward.models.lora import MODULES
from rollforward.models.memory import Memory, Work, memory_of
from rollforward.models.shapes import tensor_layout
from rollforward.models.sharding import counts
from rollforward.run import fitting

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "how-to" / "memory.md"
BEGIN, END = "<!-- the table: python tests/unit/test_memory.py -->", "<!-- its end -->"
QWEN = {"model_type": "qwen2", "max_position_embeddings": 32768, "rope_theta": 1e6, "rms_norm_eps": 1e-6}


def model(
    family: str, vocabulary: int, hidden: int, inner: int, layers: int, heads: int, kv: int, tied: bool
) -> Any:
    return ModelConfig.parse(
        QWEN
        | {
            "model_type": family,
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv,
            "tie_word_embeddings": tied,
        }
    )


MODELS = {
    "0.1 B": model("llama", 49152, 576, 1536, 30, 9, 3, True),
    "1.5 B": model("qwen2", 151936, 1536, 8960, 28, 12, 2, True),
    "7 B": model("qwen2", 152064, 3584, 18944, 28, 28, 4, False),
    "32 B": model("qwen2", 152064, 5120, 27648, 64, 40, 8, False),
}
"""The shapes of SmolLM2-135M and of Qwen2.5."""
WAYS: dict[str, dict[str, Any]] = {
    "all weights": {},
    "recompute": {"recompute": True},
    "optimizer over 8": {"recompute": True, "parallel_optimizer": True, "replicas": 8},
    "LoRA, rank 8": {"recompute": True, "rank": 8, "modules": MODULES},
}
WORK = Work(rows=1, width=1024, cache_rows=0, sums=0)


def table() -> str:
    """Gigabytes at the peak, without the cache of generation."""
    lines = [f"| parameters | T | {' | '.join(WAYS)} |", f"|---|---|{'---|' * len(WAYS)}"]
    for name, config in MODELS.items():
        for cut in (1, 2, 4, 8):
            if cut not in counts(config):
                continue
            found = [memory_of(config, WORK, model_parallel=cut, **way).total for way in WAYS.values()]
            lines.append(f"| {name} | {cut} | {' | '.join(f'{each / 1e9:.1f}' for each in found)} |")
    return "\n".join(lines)


def test_the_page_has_the_table_that_is_computed() -> None:
    said = re.search(
        f"{re.escape(BEGIN)}\n(.*?)\n{re.escape(END)}", PAGE.read_text(encoding="utf-8"), re.DOTALL
    )
    assert said is not None
    assert said[1] == table(), f"run python {__file__}"


def parts(**changes: Any) -> Memory:
    return memory_of(MODELS["1.5 B"], WORK, **changes)


def test_weights_reference_and_moments_are_the_tensors_of_the_layout() -> None:
    layout = tensor_layout(MODELS["1.5 B"])
    found = parts()
    sizes = {role: sum(spec.nbytes for spec in named.values()) for role, named in layout.items()}
    assert (found.weights, found.reference) == (sizes["policy_model"], sizes["ref"])
    assert found.moments == sizes["optimizer"] - 8


def test_what_each_way_saves() -> None:
    whole = parts()
    assert parts(recompute=True).activations < whole.activations / 2, "what is left is the head's"
    assert parts(parallel_optimizer=True, replicas=4).moments == pytest.approx(whole.moments / 4)
    adapters = parts(rank=8, modules=MODULES)
    assert adapters.reference == 0
    assert adapters.moments < whole.moments / 50
    assert adapters.weights < whole.weights * 1.02
    cut = parts(model_parallel=2)
    assert cut.weights == pytest.approx(whole.weights / 2, rel=1e-3)
    assert whole.activations / 2 < cut.activations < whole.activations


def test_the_engine_says_what_its_settings_need() -> None:
    config = json.loads((ROOT / "examples/arithmetic/model/config.json").read_text())
    demo = load(str(ROOT / "examples/arithmetic/grpo.yaml")).config
    there = Room(limit=10**9, free=10**9, why="a test")
    found = fitting.examine(demo, config, MindSpore(), 1, there)
    assert found is not None
    assert found.level == "ok", found.text
    found = fitting.examine(demo, config, MindSpore(), 4, there)
    assert found is not None
    assert found.level == "problem", found.text
    assert "1.00 GB (a test)" in found.text
    found = fitting.examine(demo, config, MindSpore(), 1, Room(limit=10**10, free=10**6, why="a test"))
    assert found is not None
    assert found.level == "note"


def test_the_workers_of_a_cut_model_need_less_each_and_must_make_whole_groups() -> None:
    config = json.loads((ROOT / "examples/arithmetic/model/config.json").read_text())
    example = str(ROOT / "examples/arithmetic/grpo.yaml")

    def look(cut: int, workers: int, there: int) -> Finding:
        demo = load(example, [("actor_config.parallel_config.model_parallel", cut)]).config
        found = fitting.examine(demo, config, MindSpore(), workers, Room(limit=there, free=there, why="-"))
        assert found is not None
        return found

    def need(cut: int, workers: int) -> str:
        return look(cut, workers, 10**10).text

    def hint(cut: int, workers: int) -> str:
        return look(cut, workers, 10**9).hint

    for part, whole, cut in (
        ("moments", "2.4 MB", "1.2 MB"),
        ("cache", "4.2 MB", "2.1 MB"),
    ):
        assert f"{part} {whole}" in need(1, 2)
        assert f"{part} {cut}" in need(2, 2)
    assert "actor_config.parallel_config.model_parallel: 2" in hint(1, 4)
    assert "model_parallel" not in hint(2, 4), "this model cannot be cut over 4"
    assert "model_parallel" not in hint(1, 3)
    with pytest.raises(ConfigError, match="3 workers cannot be shared out in groups of 2"):
        need(2, 3)
    with pytest.raises(ModelError, match="cannot be cut over 4 workers"):
        need(4, 4)


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


class TestRoom:
    MEMINFO = "MemTotal:       2000 kB\nMemFree: 3 kB\nMemAvailable:   1500 kB\n"

    def test_the_machines_memory(self, tmp_path: Path) -> None:
        write(tmp_path, meminfo=self.MEMINFO)
        found = room(tmp_path, tmp_path / "none")
        assert found == Room(limit=2_048_000, free=1_536_000, why="the machine's memory")

    def test_the_tightest_limit_of_the_groups_around_the_process(self, tmp_path: Path) -> None:
        proc, groups = tmp_path / "proc", tmp_path / "groups"
        write(proc, meminfo=self.MEMINFO, self__cgroup="0::/job/step\n")
        write(groups, **{"job__memory.max": "1000000\n", "job__step__memory.max": "max\n"})
        found = room(proc, groups)
        assert found is not None
        assert (found.limit, found.free) == (1_000_000, 1_000_000)
        assert str(groups / "job/memory.max") in found.why

    def test_a_limit_of_the_first_version(self, tmp_path: Path) -> None:
        proc, groups = tmp_path / "proc", tmp_path / "groups"
        write(proc, meminfo=self.MEMINFO, self__cgroup="5:cpu,memory:/a\n1:name=systemd:/b\n")
        write(
            groups,
            **{
                "memory__a__memory.limit_in_bytes": "700000",
                "memory__memory.limit_in_bytes": "9223372036854771712",
            },
        )
        found = room(proc, groups)
        assert found is not None
        assert found.limit == 700_000

    def test_where_it_cannot_be_known(self, tmp_path: Path) -> None:
        assert room(tmp_path, tmp_path) is None


def test_doctor_says_before_a_new_run_whether_it_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    example = ROOT / "examples/arithmetic"
    command = [
        "doctor",
        "--config",
        str(example / "grpo.yaml"),
        "--actor_checkpoint_path",
        str(example / "model"),
    ]
    command += ["--save_checkpoint_dir", str(tmp_path / "run")]

    def findings(*more: str, code: int = 0) -> dict[str, dict[str, str]]:
        assert main([*command, "--json", *more]) == code
        return {each["check"]: each for each in json.loads(capsys.readouterr().out)["findings"]}

    def megabytes(found: dict[str, dict[str, str]]) -> float:
        said = re.match(r"a worker needs about ([0-9.]+) MB at its peak", found["memory"]["text"])
        assert said is not None
        return float(said[1])

    # What importing MindSpore, in an earlier test, leaves behind.
    for name in [name for name in os.environ if name.startswith("HCCL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MS_SCHED_PORT", str(free_port()))
    monkeypatch.setattr(machine, "room", lambda: Room(limit=2 * 10**9, free=2 * 10**9, why="a test"))
    found = findings()
    assert found["memory"]["level"] == "ok"
    assert "folders" not in found, "there is no run to look at yet"
    cut = findings("--workers", "2", "--set", "actor_config.parallel_config.model_parallel=2")
    assert megabytes(cut) < megabytes(found)
    found = findings("--workers", "8", code=1)
    assert found["memory"]["level"] == "problem"
    assert "a test" in found["memory"]["text"]


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}", encoding="utf-8")

"""MindSpore as a run sees it: `engines.base.EnginePackage`. Importing this loads no framework.

`msrun` starts one script several times: once as the scheduler, which brings the workers together, and
once for each worker. Environment variables say which is which.

How MindSpore 2.10 handles signals, which `processes.stopping` therefore expects of any framework: it
takes over SIGINT while it compiles or runs a graph and turns it into SIGTERM; it sends SIGTERM to itself
when a worker has not answered for 30 s (MS_NODE_TIMEOUT); it keeps the interpreter lock while the workers
find each other (seconds) and while it compiles (up to 2.5 s at a time for 12 layers of 512 columns); an
exception that passes through a compilation is treated as an error of the model, and the process is
aborted later in its exit handlers.
"""

import os
import random
import re
import socket
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rollforward.engines.base import Finding, Launch, Process
from rollforward.engines.mindspore.batches import ladder_of
from rollforward.engines.mindspore.pages import Pages
from rollforward.errors import EngineError
from rollforward.grpo.addition import programs
from rollforward.grpo.ports import Engine, Group, Meeting
from rollforward.grpo.types import EngineSettings, LoraSettings
from rollforward.interop.strategy_format import strategy_file
from rollforward.models import sharding
from rollforward.models.config import ModelConfig
from rollforward.models.lora import adapter_shapes
from rollforward.models.memory import Memory, Work, memory_of
from rollforward.models.shapes import layout_of_trained, tensor_layout
from rollforward.tensors import Layout, TensorSpec

TIMEOUTS = {"HCCL_CONNECT_TIMEOUT": 2400, "HCCL_EXEC_TIMEOUT": 7200}
"""Environment variable -> recommended seconds."""
SCHEDULER_PORT = 8118
"""Where `msrun` puts its scheduler by default."""

ARITHMETIC = (
    "DNNL_MAX_CPU_ISA",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_DEFAULT_FPMATH_MODE",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "HCCL_DETERMINISTIC",
    "LCCL_DETERMINISTIC",
    "ATB_LLM_LCOC_ENABLE",
    "ATB_MATMUL_SHUFFLE_K_ENABLE",
    "CLOSE_MATMUL_K_SHIFT",
)
"""Environment variables that choose instruction sets, precisions and orders of addition."""

_PORTS = range(20000, 32768)
"""Below what Linux gives to whoever asks for any port (/proc/sys/net/ipv4/ip_local_port_range)."""
_FOREVER = 10**9
"""Seconds."""
_NO_WORKER = "-2"
"""For `msrun --tail_worker_log`: a number that no worker has; the launcher's parent shows the log."""
_NOISE = re.compile(r"\[(?:DEBUG|INFO|WARNING)\] [A-Z_]+\(\d+")
"""How MindSpore's own log lines begin."""


class MindSpore:
    """`rollforward.engines.mindspore`."""

    def missing(self) -> str | None:
        """The extra `mindspore`, unless MindSpore and a NumPy that it works with are there."""
        install = "pip install 'rollforward[mindspore]'"
        if find_spec("mindspore") is None:
            return f"MindSpore is not installed: {install}"
        if not version("numpy").startswith("1."):
            # Every PyNative operator of MindSpore 2.10 fails with NumPy 2.
            return f"MindSpore does not work with NumPy {version('numpy')}: {install}"
        return None

    def vocab_size(self, model_config: Mapping[str, Any]) -> int:
        """From config.json."""
        return ModelConfig.parse(model_config).vocab_size

    def tensor_layout(self, model_config: Mapping[str, Any], lora: LoraSettings | None = None) -> Layout:
        """From config.json."""
        config = ModelConfig.parse(model_config)
        if lora is None:
            return tensor_layout(config)
        return layout_of_trained(adapter_shapes(config, lora.rank, lora.target_modules))

    def memory_needed(self, settings: EngineSettings, workers: int) -> Memory | None:
        """For the widest rows, and the largest cache, that the settings allow."""
        ladder, lora = ladder_of(settings), settings.lora
        config = ModelConfig.parse(settings.model_config)
        replicas = workers // settings.model_parallel
        pages = Pages(
            slots=settings.samples_per_generation,
            prompt_length=settings.prompt_length,
            max_tokens=settings.sampling.max_tokens,
            kv_heads=config.kv_heads // settings.model_parallel,
        )
        work = Work(
            rows=max(1, ladder.columns // ladder.widths[0]),
            width=ladder.widths[0],
            cache_rows=pages.rows,
            sums=max(program.slots for program in programs(settings.chunks * replicas, replicas)),
        )
        return memory_of(
            config,
            work,
            replicas=replicas,
            model_parallel=settings.model_parallel,
            parallel_optimizer=settings.parallel_optimizer,
            recompute=settings.recompute,
            rank=lora.rank if lora else 0,
            modules=lora.target_modules if lora else (),
        )

    def check_model_parallel(self, model_config: Mapping[str, Any], workers: int) -> None:
        """As `models.sharding` cuts it."""
        sharding.check(ModelConfig.parse(model_config), workers)

    def versions(self) -> Mapping[str, str]:
        """Of MindSpore."""
        try:
            return {"mindspore": version("mindspore")}
        except PackageNotFoundError:
            return {}

    def sources(self) -> Sequence[Path]:
        """This folder, and what of a model it computes with."""
        rooms = (Path(__file__).parent, Path(__file__).parents[2] / "models")
        return sorted(path for room in rooms for path in room.glob("*.py"))

    def arithmetic_variables(self) -> Sequence[str]:
        """oneDNN's on the CPU; on Ascend, those that decide the order of additions."""
        return ARITHMETIC

    def this_process(self, environment: Mapping[str, str]) -> Process:
        """By `msrun`'s variables."""
        workers = _number(environment.get("MS_WORKER_NUM"), 1)
        role = environment.get("MS_ROLE")
        if role == "MS_SCHED":
            return Process(role="scheduler", rank=-1, world_size=workers)
        if role == "MS_WORKER" and workers > 1:
            return Process(role="worker", rank=_number(environment.get("RANK_ID"), 0), world_size=workers)
        return Process(role="alone", rank=0, world_size=1)

    def launched(self, environment: Mapping[str, str]) -> str:
        """`msrun` sets a role for every process that it starts."""
        return "msrun" if "MS_ROLE" in environment else ""

    def launch(self, workers: int, log_folder: Path, environment: Mapping[str, str]) -> Launch:
        """By `msrun`, with its scheduler on a free port."""
        # -P: no module in the working folder shadows an installed one.
        command = [sys.executable, "-P", "-m", "mindspore.parallel.cluster.run"]
        command += [f"--worker_num={workers}", f"--local_worker_num={workers}", "--join=True"]
        command += [f"--master_port={free_port()}", f"--log_dir={log_folder}"]
        command += [f"--tail_worker_log={_NO_WORKER}"]
        # msrun starts `python`, whichever that is: it must be this one.
        path = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
        return Launch(
            name="msrun",
            command=command,
            environment={**environment, "PATH": path},
            own_log="msrun.log",
            worker_log="worker_{rank}.log",
            see_also="scheduler.log",
            noise=_NOISE,
        )

    def prepare(self, environment: MutableMapping[str, str], *, patience: float) -> None:
        """Quiet, without its own compile cache, and patient."""
        # MindSpore logs its own warnings to standard error, many at each start.
        environment.setdefault("GLOG_v", "3")
        # Its compile cache returns wrong graphs unless the engine decides when it is on.
        environment.pop("MS_COMPILER_CACHE_ENABLE", None)
        # MindSpore's own limit on the CPU is 30 s, and it does not say which worker is late. One
        # worker may well generate for 30 s longer than another.
        wait = round(2 * patience) + 60 if patience else _FOREVER
        environment.setdefault("MS_CPU_COMM_OP_TIMEOUT", str(wait))

    def examine(self, environment: Mapping[str, str]) -> list[Finding]:
        """Timeouts of the communication library, and the scheduler's port."""
        found = [_check_timeout(name, value, environment.get(name)) for name, value in TIMEOUTS.items()]
        port = environment.get("MS_SCHED_PORT") or str(SCHEDULER_PORT)
        found.append(_check_port(port))
        missing = self.missing()
        if missing is not None:
            found.append(
                Finding(check="engine", level="note", text=f"training is not possible here: {missing}")
            )
        return found

    def connect(self, device_target: str, meeting: Meeting) -> Group:
        """Over MindSpore's communication library where `msrun` started several workers."""
        from rollforward.engines.mindspore.parallel import connect

        return connect(device_target, meeting)

    def lost_contact(self) -> bool:
        """Whether MindSpore has ended its group."""
        if "mindspore" not in sys.modules:
            return False
        from rollforward.engines.mindspore.parallel import lost_contact

        return lost_contact()

    def create(self, settings: EngineSettings, group: Group) -> Engine:
        """Model, optimizer and compiled graphs."""
        from rollforward.engines.mindspore.engine import create

        return create(settings, group)

    def strategy_file(self, layout: Mapping[str, TensorSpec], world_size: int) -> bytes | None:
        """In MindSpore's own format."""
        return strategy_file(layout, world_size)

    def serve_scheduler(self, device_target: str) -> None:
        """As `msrun`'s scheduler."""
        from rollforward.engines.mindspore.parallel import serve_scheduler

        serve_scheduler(device_target)


def free_port() -> int:
    """A TCP port that nothing listens on at this moment.

    If there is one, below those that the system gives to whoever asks for any: seconds pass before the
    launcher listens, and in between it could be given away, to one of the workers as well.
    """
    for wanted in (*random.SystemRandom().sample(_PORTS, 100), 0):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", wanted))
            port: int = probe.getsockname()[1]
            return port
    raise EngineError("no TCP port is free on this machine", hint="see which are in use: ss -tan")


def _number(text: str | None, default: int) -> int:
    """What the launcher has put into a variable; the default where it is not a number."""
    return int(text) if text and text.isascii() and text.isdigit() else default


def _check_timeout(name: str, recommended: int, value: str | None) -> Finding:
    hint = f"export {name}={recommended}"
    if value is None:
        return Finding(
            check="timeouts",
            level="note",
            text=f"{name} is not set; {recommended} s are recommended for several Ascend devices",
            hint=hint,
        )
    if not (value.isascii() and value.isdigit()):
        return Finding(
            check="timeouts", level="problem", text=f"{name} is {value!r}, not a number of seconds", hint=hint
        )
    if int(value) < recommended:
        return Finding(
            check="timeouts",
            level="problem",
            text=f"{name} is {value} s, less than the recommended {recommended} s: when a "
            "worker needs longer to load or compile, the others' collectives fail",
            hint=hint,
        )
    return Finding(check="timeouts", level="ok", text=f"{name} is {value} s")


def _check_port(text: str) -> Finding:
    hint = (
        "stop what listens there, or use msrun --master_port; rollforward train --workers finds a free port "
        "by itself"
    )
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 1 << 16):
        return Finding(
            check="port",
            level="problem",
            text=f"MS_SCHED_PORT is {text!r}, not a port number",
            hint=f"unset it, or export MS_SCHED_PORT={SCHEDULER_PORT}",
        )
    with socket.socket() as probe:
        # As the scheduler itself binds it: a port that only waits for old packets counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", int(text)))
        except OSError as error:
            return Finding(
                check="port",
                level="problem",
                text=f"port {text}, where msrun puts its scheduler, cannot be used: {error.strerror}",
                hint=hint,
            )
    return Finding(check="port", level="ok", text=f"port {text} is free for msrun's scheduler")

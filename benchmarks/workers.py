"""What it costs that any number of workers gives the same bits, and what spreading the optimizer saves.

    python benchmarks/workers.py [--workers 2 4] [--layers 8] [--width 512] [--repeats N] [--json FILE]

The gradients and the optimizer of a decoder's tensors, without the decoder: nothing else takes time.
Each row is one run under `msrun`, so its peak memory is its own; of the workers, the worst counts.

    all-reduce          one AllReduce over all workers, in an order of its own
    tree 1, tree 4      the order of `grpo.addition`, with so many chunks on each worker
    optimizer whole     AdamW, every worker keeps and updates everything
    optimizer spread    each keeps its part, and the new values go to the others

On one machine the workers share its cores and its memory's speed; between machines the exchanges of a round
run side by side, as an all-reduce's do.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rollforward.engines.mindspore.package import free_port

HEADER = (
    f"{'workers':>7} {'what':<18} {'seconds':>8} {'ratio':>6} {'optimizer MB':>13} {'peak MB besides':>16}"
)


def main() -> None:
    """Measure in fresh processes, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--measure", nargs=2, metavar=("WHAT", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args, *args.measure)
        return
    rows = []
    print(HEADER)
    for workers in args.workers:
        for base, *others in (("all-reduce", "tree 1", "tree 4"), ("optimizer whole", "optimizer spread")):
            against = None
            for what in (base, *others):
                rows.append({"workers": workers, "what": what, **under_msrun(workers, what, args)})
                against = against or rows[-1]
                print(line(rows[-1], against), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))


def under_msrun(workers: int, what: str, args: argparse.Namespace) -> dict[str, Any]:
    """`measure` by so many workers; what the first found."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, "-P", "-m", "mindspore.parallel.cluster.run", "--join=True"]
        command += [f"--worker_num={workers}", f"--local_worker_num={workers}", f"--log_dir={folder}"]
        command += [f"--master_port={free_port()}"]
        command += [__file__, f"--layers={args.layers}", f"--width={args.width}", f"--repeats={args.repeats}"]
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        subprocess.run(
            [*command, "--measure", what, str(out)],
            env={"GLOG_v": "3", **os.environ, "PATH": path},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,  # MindSpore sometimes crashes in its exit handlers
        )
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def measure(args: argparse.Namespace, what: str, out: str) -> None:
    """One row, as a worker of `msrun`."""
    import mindspore as ms
    import numpy as np

    from rollforward.engines.mindspore import adding
    from rollforward.engines.mindspore.memory import Viewed
    from rollforward.engines.mindspore.parallel import connect, serve_scheduler

    if os.environ.get("MS_ROLE") == "MS_SCHED":
        serve_scheduler()
    group = connect()
    gradients = parameters(args, "gradient.")
    buffers = ms.ParameterTuple(list(gradients.values()))
    before = peak()
    kept = 0
    if what.startswith("optimizer"):
        step, kept = optimizer_step(args, gradients, group, spreads=what.endswith("spread"))
    elif what == "all-reduce":
        cell = adding.AddOther(buffers, "hccl_world_group")
        step = lambda: cell().asnumpy()  # noqa: E731
    else:
        total = adding.TotalGradient(buffers, int(what.split()[1]), group, Viewed())
        views = [buffer.asnumpy() for buffer in buffers]
        step = lambda: total.add_up(lambda _: [view.fill(1) for view in views])  # noqa: E731
    step()
    seconds = best(step, args.repeats, group.all_gather)
    figures = {"seconds": seconds, "optimizer_mb": kept / 1e6, "peak_mb": (peak() - before) / 1e6}
    everyone = group.all_gather(figures)
    if group.rank == 0:
        size = sum(int(np.prod(buffer.shape)) for buffer in buffers)
        worst = {name: max(each[name] for each in everyone) for name in figures}
        Path(out).write_text(json.dumps({"parameters": size, **worst}))


def parameters(args: argparse.Namespace, prefix: str) -> dict[str, Any]:
    """The tensors of a Llama, by name."""
    import mindspore as ms
    import numpy as np

    from rollforward.models.config import ModelConfig
    from rollforward.models.shapes import tensor_layout

    model = {
        "model_type": "llama",
        "vocab_size": 16384,
        "hidden_size": args.width,
        "intermediate_size": 3 * args.width,
        "num_hidden_layers": args.layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    }
    layout = tensor_layout(ModelConfig.parse(model))["policy_model"]
    return {
        name: ms.Parameter(np.ones(spec.shape, np.float32), name=prefix + name)
        for name, spec in layout.items()
    }


def optimizer_step(
    args: argparse.Namespace, gradients: dict[str, Any], group: Any, *, spreads: bool
) -> tuple[Callable[[], Any], int]:
    """AdamW and, where it is spread, what brings the values to all; and the bytes of the moments here."""
    import mindspore as ms
    import numpy as np

    from rollforward.boxes import whole
    from rollforward.engines.mindspore.optimizer import ApplyAdamW, from_owners, step_scalars
    from rollforward.grpo.spreading import spread
    from rollforward.grpo.types import OptimizerSettings

    policy, settings = parameters(args, ""), OptimizerSettings()
    shapes = {name: tuple(each.shape) for name, each in policy.items()}
    kept = spread(shapes, group.world_size)
    own = kept[group.rank] if spreads else {name: whole(shape) for name, shape in shapes.items()}
    apply = ApplyAdamW(policy, gradients, settings, own)
    bringing = from_owners(policy, kept, apply.rows, group.rank) if spreads else []
    scalars = step_scalars(1, 1e-6, settings)

    def step() -> None:
        apply(ms.Tensor(np.float32(1.0)), *scalars).asnumpy()
        for cell in bringing:
            cell().asnumpy()

    moments = (*apply.first, *apply.second)
    return step, sum(4 * int(np.prod(moment.shape)) for moment in moments)


def best(action: Callable[[], Any], repeats: int, meet: Callable[[Any], Any]) -> float:
    """Seconds of the fastest of several runs, each begun by all together."""
    taken = []
    for _ in range(repeats):
        meet(None)
        start = time.perf_counter()
        action()
        taken.append(time.perf_counter() - start)
    return min(taken)


def peak() -> int:
    """Most bytes that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def line(row: dict[str, Any], base: dict[str, Any]) -> str:
    """A row of the table; `base`: what its seconds are compared with."""
    ratio = row["seconds"] / base["seconds"]
    memory = f"{row['optimizer_mb']:>13.0f} {row['peak_mb']:>16.0f}"
    return f"{row['workers']:>7} {row['what']:<18} {row['seconds']:>8.3f} {ratio:>6.2f} {memory}"


if __name__ == "__main__":
    main()

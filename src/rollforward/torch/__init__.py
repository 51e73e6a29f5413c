"""What a PyTorch loop needs of `rollforward.open_run`: its tensors, optimizer, random state and processes.

    arrays         a tensor as a NumPy array, over the same memory where the host sees it, and back
    optimizers     an optimizer's state as a role, whether it has made its moments yet or not
    randomness     the state of all generators of this process as arrays
    processes      a process group as the `all_gather` that the library asks for; arrays of every process
    plain          Python values (schedulers, histories) as bytes, without pickle

`examples/own_loop_torch` is a loop that uses it. Nothing here knows a trainer: `rollforward.trl` does.
Left out: tensors that are split over processes (FSDP, DeepSpeed, tensor parallelism).
"""

from rollforward.torch.arrays import HostCopies, as_array, as_tensor, put_back
from rollforward.torch.optimizers import load_optimizer, optimizer_groups, optimizer_tensors
from rollforward.torch.processes import gather_arrays, process_group
from rollforward.torch.randomness import random_state, set_random_state

__all__ = [
    "HostCopies",
    "as_array",
    "as_tensor",
    "gather_arrays",
    "load_optimizer",
    "optimizer_groups",
    "optimizer_tensors",
    "process_group",
    "put_back",
    "random_state",
    "set_random_state",
]

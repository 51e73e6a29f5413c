"""Which storage a run is in, and which one it resumes from: folders of this machine, or addresses."""

from rollforward.config.places import Outputs
from rollforward.errors import CheckpointMismatch
from rollforward.interop.role_folders import name_checkpoint_folders
from rollforward.storage import LocalStorage, Storage
from rollforward.storage.address import is_remote, open_storage
from rollforward.store.layout import ROLE_FOLDERS
from rollforward.store.place import RunPlace


def place_of(outputs: Outputs) -> RunPlace:
    """Where a run writes. A service is asked at once; errors as from `open_storage`."""
    if outputs.address:
        return RunPlace.at(outputs.address, work_dir=outputs.run)
    return RunPlace.at(outputs.run)


def resumed_address(actor: str, reference: str, outputs: Outputs) -> str | None:
    """The address of the run in object storage that is resumed; None when it is in a folder of this machine.

    `actor` and `reference` as on the command line: `train/` and `ref/` of a run, or the run, or "" for the
    run that is written to. CheckpointMismatch when they are of two runs.
    """
    address = _run_of(actor, "policy_model") if actor else outputs.address
    other = _run_of(reference, "ref") if reference else address
    if not is_remote(address) and not is_remote(other):
        return None
    if address != other:
        raise CheckpointMismatch(
            f"the policy is to come from {address or outputs.where} and the reference from {other}: a "
            "checkpoint holds both, from the same step",
            hint="name train/ and ref/ of one run",
        )
    return address


def resumed_storage(actor: str, reference: str, outputs: Outputs) -> Storage:
    """Where the run that a command line resumes is; nothing is checked about a folder."""
    address = resumed_address(actor, reference, outputs)
    if address is not None:
        return open_storage(address)
    return LocalStorage(name_checkpoint_folders(actor, reference, outputs.run).run)


def _run_of(path: str, role: str) -> str:
    """`s3://bucket/run` of `s3://bucket/run/train`; a path as it is."""
    return path.rstrip("/").removesuffix(f"/{ROLE_FOLDERS[role]}") if is_remote(path) else path

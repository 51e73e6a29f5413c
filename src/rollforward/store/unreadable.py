"""What an error of the storage says about a checkpoint: that it is bad, or that nobody could look."""

from rollforward.errors import CheckpointInvalid, CheckpointUnreadable, StorageError


def rejection(error: StorageError, what: str = "") -> CheckpointInvalid:
    """The CheckpointInvalid to raise where reading failed, its message beginning with `what`.

    CheckpointUnreadable unless the error says what is there: EIO today may be none tomorrow.
    """
    before = f"{what}: " if what else ""
    if error.settled:
        return CheckpointInvalid(f"{before}{error.message}")
    return CheckpointUnreadable(f"{before}could not be read: {error.message}")

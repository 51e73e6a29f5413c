"""What a storage error says about a checkpoint: that it is bad, or only that it could not be read."""

from rollforward.errors import CheckpointInvalid, CheckpointUnreadable, StorageError


def rejection(error: StorageError, what: str = "") -> CheckpointInvalid:
    """The CheckpointInvalid to raise when reading failed; its message starts with `what`.

    CheckpointUnreadable unless the error says what is there: an EIO today may be gone tomorrow.
    """
    before = f"{what}: " if what else ""
    if error.settled:
        return CheckpointInvalid(f"{before}{error.message}")
    return CheckpointUnreadable(f"{before}could not be read: {error.message}")

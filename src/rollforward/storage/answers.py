"""Messages for what an object store answered: which operation failed, on what, why, and what to try.

The client's own messages are long and meant for its authors. What helps is in them: the status, and the code
and the message of the answer. Credentials never are.
"""

import html
import re

from obstore.exceptions import (
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)

from rollforward.errors import StorageError

_CREDENTIALS = (
    "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and what this user may do with the bucket: "
    "list, read, write and delete objects"
)
_EXPIRED = "these credentials have expired or were revoked: get new ones, and start again with them"
_FULL = "the bucket is full: have its quota raised, or free some space there"
_HINTS = {
    "NoSuchBucket": "make the bucket first, or check how its name is spelled",
    "AccessDenied": _CREDENTIALS,
    "InvalidAccessKeyId": _CREDENTIALS,
    "SignatureDoesNotMatch": _CREDENTIALS,
    "RequestTimeTooSkewed": "the clocks of this machine and of the service differ: set them by NTP",
    "ExpiredToken": _EXPIRED,
    "InvalidToken": _EXPIRED,
    "TokenRefreshRequired": _EXPIRED,
    "QuotaExceeded": _FULL,
    "XMinioAdminBucketQuotaExceeded": _FULL,
    "XMinioStorageFull": "the service has no space left: free some, or use another",
    "InternalError": "try again; if it stays, see the service's own log: is the bucket or its disk full?",
    "EntityTooLarge": "the service refuses objects of this size: see its limits",
    "SlowDown": "the service asks for fewer requests: try again later",
}
_ELSE = "try again; if it stays, see what the service's own log says"


_BROKE_OFF = "error sending request"
"""Whether the service has carried it out is unknown."""


def broke_off(error: Exception) -> bool:
    """Whether the connection broke, or could not be made, before an answer had come."""
    return _BROKE_OFF in str(error)


def service_error(operation: str, address: str, error: FileNotFoundError | BaseError) -> StorageError:
    """A StorageError that says which operation failed, on what, what was answered, and what to try."""
    text = str(error)
    code = next(iter(re.findall(r"<Code>([^<]+)</Code>", text)), "")
    if isinstance(error, FileNotFoundError) and code in ("", "NoSuchKey"):
        found = StorageError(
            f"{operation} {address}: no such object", hint="check that the address is spelled as it is there"
        )
        found.settled = True
        return found
    if isinstance(error, PreconditionError):
        return StorageError(
            f"{operation} {address}: it was replaced meanwhile",
            hint="another process writes there: look again",
        )
    if isinstance(error, UnauthenticatedError | PermissionDeniedError):
        hint = _HINTS.get(code, _CREDENTIALS)
    elif broke_off(error) or "Connect" in text:
        hint = "the service cannot be reached: check AWS_ENDPOINT_URL and the network"
    else:
        hint = _HINTS.get(code, _ELSE)
    return StorageError(f"{operation} {address}: {_answer(text)}", hint=hint)


def _answer(text: str) -> str:
    """The status, code and message of the service's answer; or the client's own words without its details."""
    words = text.split("\n\nDebug source:", 1)[0]
    status = re.search(r"status code: (\d+ [A-Za-z ]+)", words)
    code = re.search(r"<Code>([^<]+)</Code>", words)
    message = re.search(r"<Message>([^<]+)</Message>", words)
    parts = [found[1].strip() for found in (status, code, message) if found]
    if parts:
        return html.unescape(", ".join(parts)).rstrip(".")
    _, dash, cause = words.partition(" - ")
    return " ".join((cause if dash else words).split())[:300]

"""From text to a storage: a path, `file:///...`, or `s3://bucket/prefix`.

S3 is reached through obstore, which the extra `s3` installs. Credentials, region and endpoint come from the
usual AWS_* variables, and from options, which count before them: obstore's names for S3, such as `endpoint`,
`region` or `access_key_id`. Nothing here puts their values into a message, or anywhere else.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from rollforward.errors import ConfigError
from rollforward.storage.base import Storage, check_path
from rollforward.storage.local import LocalStorage

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig, S3Config

_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_RETRIES: "RetryConfig" = {
    "max_retries": 60,
    "retry_timeout": timedelta(seconds=120),
    "backoff": {"init_backoff": timedelta(seconds=0.2), "max_backoff": timedelta(seconds=5), "base": 2},
}
"""Two minutes without the service are survived; what stays away longer is an error."""
_AT_FIRST: "RetryConfig" = {**_RETRIES, "max_retries": 5}
"""For the first request, some seconds: until then it may be the address that is wrong."""


_OPTIONS: dict[str, str] = {}
"""Of this process: what `use_options` was given."""


def use_options(given: Iterable[str]) -> None:
    """From now on, open every storage of this process with these options: `key=value`, each.

    ConfigError for one that has another form. Repeated, they replace the earlier ones.
    """
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ConfigError(
                "--storage_option takes key=value", hint="write it as in --storage_option endpoint=http://..."
            )
        found[name.strip().lower().removeprefix("aws_")] = value
    _OPTIONS.clear()
    _OPTIONS.update(found)


def is_remote(address: str | Path) -> bool:
    """Whether the address leads to a service rather than to a folder of this machine."""
    return isinstance(address, str) and "://" in address and not address.startswith("file://")


def local_path(address: str | Path) -> Path:
    """The folder that a path or a `file://` address names; ConfigError for an address of a service."""
    if isinstance(address, Path) or "://" not in address:
        return Path(address)
    parts = urlsplit(address)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
        raise ConfigError(
            f"{address} is not a folder of this machine",
            hint="name a folder; rollforward copy brings a run from a service here",
        )
    return Path(unquote(parts.path))


def default_work_dir(address: str) -> Path:
    """Where a run in a service keeps what is only of this machine: `~/.cache/rollforward/NAME-DIGEST`.

    Below `$XDG_CACHE_HOME` if that is set. One folder for each address.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    name = address.strip("/")
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return Path(cache).expanduser() / "rollforward" / f"{name.rpartition('/')[2]}-{digest}"


def open_storage(address: str | Path, options: Mapping[str, str] | None = None) -> Storage:
    """The storage at an address. A service is asked at once, so that a wrong address is told at the start.

    `options`: see above; without them, those of `use_options`.
    ConfigError for an address that leads nowhere; StorageError, with the service's answer, when it refuses.
    """
    if not is_remote(address):
        return LocalStorage(local_path(address))
    parts = urlsplit(str(address))
    if parts.scheme != "s3":
        raise ConfigError(
            f"{address}: there is no storage for {parts.scheme}://",
            hint="use a path, file:///... or s3://...",
        )
    prefix = parts.path.strip("/")
    if not parts.netloc or not prefix or parts.query or parts.fragment:
        raise ConfigError(
            f"{address} does not name a bucket and a run in it", hint="write s3://bucket/path/of/the/run"
        )
    try:
        check_path(prefix)
    except ValueError as error:
        raise ConfigError(f"{address}: {error}", hint="write s3://bucket/path/of/the/run") from error
    return _bucket(parts.netloc, prefix, dict(_OPTIONS if options is None else options))


def _bucket(bucket: str, prefix: str, given: dict[str, str]) -> Storage:
    try:
        from obstore.exceptions import BaseError
        from obstore.store import S3Store

        from rollforward.storage.objects import ObjectStorage
    except ImportError as error:
        raise ConfigError(
            f"s3://{bucket}: object storage needs obstore, which is not installed: {error}",
            hint="pip install 'rollforward[s3]'",
        ) from error
    endpoint = given.get("endpoint") or next(
        (os.environ[name] for name in _ENDPOINTS if os.environ.get(name)), ""
    )
    # Plain HTTP only where the user has named such an endpoint.
    options: ClientConfig = {
        "allow_http": endpoint.startswith("http://"),
        "connect_timeout": timedelta(seconds=5),
        "timeout": timedelta(seconds=120),
    }
    try:
        config: S3Config = {**given}  # type: ignore[typeddict-item] # whatever the user names
        first = S3Store(bucket, prefix=prefix, config=config, client_options=options, retry_config=_AT_FIRST)
        store = S3Store(bucket, prefix=prefix, config=config, client_options=options, retry_config=_RETRIES)
    except BaseError as error:
        told = str(error).splitlines()[0]
        for value in sorted(given.values(), key=len, reverse=True):
            told = told.replace(value, "...") if value else told
        raise ConfigError(
            f"s3://{bucket}: {told}", hint="check the AWS_* variables and --storage_option"
        ) from None
    address = f"s3://{bucket}/{prefix}"
    ObjectStorage(first, address).scan("")
    return ObjectStorage(store, address, _RETRIES)

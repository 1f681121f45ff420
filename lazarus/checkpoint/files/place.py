"""Check that a checkpoint URL can be used by writing and reading a small file. EFFECTS."""

from __future__ import annotations

import os
from contextlib import suppress

from lazarus.checkpoint.errors import CheckpointError, StorageError
from lazarus.checkpoint.files.patience import patiently
from lazarus.checkpoint.files.storage import (
    delete_file,
    open_storage,
    read_file,
    redacted,
    write_file,
)
from lazarus.errors import ConfigError

# Unknown protocol, missing package, incomplete URL, read-only place, missing permission.
_MISTAKES = (
    ValueError,
    ImportError,
    TypeError,
    AttributeError,
    NotImplementedError,
    PermissionError,
)
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError")  # raised by botocore
_CONTENT = b"lazarus can write here\n" * 200  # too large for inline storage in an inode


def write_probe(url: str, name: str) -> None:
    """Write a small file with the code that writes checkpoints, and read it back.

    Raises:
        StorageError: The write or read failed, or the content differs.
    """
    storage = open_storage(url)
    write_file(storage, name, [_CONTENT], kind="probe")
    if _content(url, name) != _CONTENT:
        raise StorageError(
            url=storage.place(name), operation="read", reason="it is not what was written"
        )


def sees_probe(url: str, name: str) -> bool:
    """Whether the probe file that another node wrote exists with the right content."""
    return _content(url, name) == _CONTENT


def _content(url: str, name: str) -> bytes | None:
    try:
        return read_file(open_storage(url), name)
    except FileNotFoundError:
        return None


def remove_probe(url: str, name: str) -> None:
    """Delete the file that ``write_probe`` wrote, and its local folder if that is empty."""
    with suppress(CheckpointError):
        storage = open_storage(url)
        delete_file(storage, name)
        if storage.is_local:
            with suppress(OSError):
                os.rmdir(storage.root)


def check_place(url: str, *, name: str, patience_s: float) -> None:
    """Check, before a run starts, that this machine can write to the checkpoint URL.

    Args:
        url: Root of the run's checkpoints.
        name: Name of the probe file; unique to the caller.
        patience_s: Seconds for which a failing object store is tried again.

    Raises:
        ConfigError: The URL cannot be used: protocol, package, folder or permissions are wrong.
        StorageError: The storage is full or out of order.
    """
    is_local = False
    try:
        is_local = open_storage(url).is_local
        patiently(
            lambda: write_probe(url, name),
            for_s=0.0 if is_local else patience_s,
            stuck_s=patience_s,
            place=redacted(url),
            operation="write",
        )
    except StorageError as problem:
        if (is_local or _is_mistake(problem.__cause__)) and not problem.is_full:
            raise ConfigError(
                f"checkpoint.url = {redacted(url)} cannot be used: {problem}"
            ) from problem
        raise
    finally:
        remove_probe(url, name)


def _is_mistake(cause: BaseException | None) -> bool:
    """Whether the error needs a change of the URL or its setup, so that retrying is useless."""
    if type(cause).__name__ in _NO_CREDENTIALS:
        return True
    return isinstance(cause, _MISTAKES)

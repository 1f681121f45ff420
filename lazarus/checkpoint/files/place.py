"""Whether the place of checkpoints can be used: a small file goes there and back. EFFECTS."""

from __future__ import annotations

import os
from collections.abc import Callable
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

# No such protocol or package, a URL that lacks a part, a place that is only read, no rights.
_MISTAKES = (
    ValueError,
    ImportError,
    TypeError,
    AttributeError,
    NotImplementedError,
    PermissionError,
)
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError")  # of botocore, if it is there
_CONTENT = b"lazarus can write here\n" * 200  # more than what fits beside a file's name


def write_probe(url: str, name: str) -> None:
    """Write a small file, with the code that writes checkpoints, and read it back.

    Raises:
        StorageError: Storage refuses, or gives back something else.
    """
    storage = open_storage(url)
    write_file(storage, name, [_CONTENT], kind="probe")
    if _content(url, name) != _CONTENT:
        raise StorageError(
            url=storage.place(name), operation="read", reason="it is not what was written"
        )


def sees_probe(url: str, name: str) -> bool:
    """Whether a file that another node wrote is there, and whole."""
    return _content(url, name) == _CONTENT


def _content(url: str, name: str) -> bytes | None:
    try:
        return read_file(open_storage(url), name)
    except FileNotFoundError:
        return None


def remove_probe(url: str, name: str) -> None:
    """Delete what ``write_probe`` wrote, and the folder if nothing else is in it."""
    with suppress(CheckpointError):
        storage = open_storage(url)
        delete_file(storage, name)
        if storage.is_local:
            with suppress(OSError):
                os.rmdir(storage.root)


def check_place(
    url: str,
    *,
    name: str,
    patience_s: float,
    waiting: Callable[[], None] = lambda: None,
) -> None:
    """Refuse a place that this machine cannot write to, before anything is started.

    Args:
        url: Where the run's checkpoints shall be.
        name: Of the probe: unique to who asks.
        patience_s: For how long an object store that refuses is asked again.
        waiting: Called all the time meanwhile.

    Raises:
        ConfigError: It cannot be used like this: protocol, package, folder or rights.
        StorageError: It could be used, but is full, or out of order.
    """
    is_local = False
    try:
        is_local = open_storage(url).is_local
        patiently(
            lambda: write_probe(url, name),
            for_s=0.0 if is_local else patience_s,
            stuck_s=patience_s,
            waiting=waiting,
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
    """Whether it is the URL, or what is set up for it, that must change: waiting helps nothing."""
    if type(cause).__name__ in _NO_CREDENTIALS:
        return True
    return isinstance(cause, _MISTAKES)

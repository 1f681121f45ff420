"""Read and write files at a URL, with durable and atomic writes. EFFECTS.

In a local folder, a write makes a temporary file, fsyncs it, renames it and fsyncs the folder. On
an object store, a write is one upload, which is atomic (an object appears whole or not at all).
Each stage calls a ``Probe``, so that a test can kill the process between any two stages.

Errors of a backend are raised as ``StorageError`` with the URL and the operation. Only
``FileNotFoundError`` passes through readers: a missing file is a normal answer.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from lazarus.basics.careful import open_regular
from lazarus.checkpoint.errors import DamagedError, StorageError
from lazarus.errors import LazarusError

Probe = Callable[[str], None]
Buffer = bytes | bytearray | memoryview
_BLOCK_BYTES = 8 << 20
# A scheme, perhaps after those of wrappers: "s3://", "simplecache::s3://". "c:foo" is a file name.
_URL = re.compile(r"(?:[A-Za-z][\w+.-]*::)*[A-Za-z][\w+.-]+://")
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
_FOLDER_RACES = 8  # attempts, since another writer may remove a new folder before its use


def no_progress(num_bytes: int) -> None:
    """Ignore the number of bytes; the default for ``progress``."""


def no_probe(label: str) -> None:
    """Do nothing; the default probe outside tests."""


@dataclass(frozen=True, slots=True)
class Storage:
    """A root folder on an fsspec filesystem. Paths are relative to it, with forward slashes.

    ``url`` is the name shown in messages, without secrets.
    """

    fs: Any
    root: str
    is_local: bool
    url: str = ""

    def full(self, path: str) -> str:
        """The path below ``root``, as passed to the filesystem.

        Raises:
            DamagedError: The path is absolute or leaves the root.
        """
        parts = path.split("/")
        if path.startswith("/") or ".." in parts or "" in parts or "\\" in path:
            raise DamagedError(f"path {path!r} leaves the checkpoint folder")
        return f"{self.root}/{path}"

    def place(self, path: str = "") -> str:
        """A path as shown in messages; without ``path``, the root."""
        root = self.url or self.root
        return f"{root.rstrip('/')}/{path}" if path else root


def is_url(place: str) -> bool:
    """Whether a place is a URL, ``scheme://``; everything else is a path on this machine."""
    return _URL.match(place) is not None


def anchored(place: str) -> str:
    """Make a path absolute, so that processes with other working folders can use it too.

    A URL is returned unchanged.
    """
    return place if is_url(place) else _absolute(place)


def _absolute(path: str) -> str:
    return str(Path(os.path.expanduser(path)).absolute())


def open_storage(url: str) -> Storage:
    """Open the storage behind a folder or any fsspec URL. Nothing is created.

    A path is not parsed: ``::``, ``?``, ``#`` and ``%`` are ordinary characters of a name.

    Raises:
        StorageError: The protocol is unknown, or a package that it needs is not installed.
    """
    scheme, _, rest = url.partition("://")
    shown = redacted(url)
    if not is_url(url) or scheme in LocalFileSystem.protocol:
        root = _absolute(rest if is_url(url) else url)
        local = fsspec.filesystem("file")
        return Storage(fs=local, root=root.rstrip("/"), is_local=True, url=shown)
    with _asked(shown, "open"):
        fs, root = fsspec.core.url_to_fs(url)
    is_local = isinstance(fs, LocalFileSystem)
    return Storage(fs=fs, root=str(root).rstrip("/"), is_local=is_local, url=shown)


@contextmanager
def _asked(place: str, operation: str, *, may_lack: bool = False) -> Iterator[None]:
    """Turn every exception of a backend into a StorageError; a LazarusError passes unchanged.

    With ``may_lack``, FileNotFoundError passes unchanged too.
    """
    try:
        yield
    except LazarusError:
        raise
    except Exception as problem:
        if may_lack and isinstance(problem, FileNotFoundError):
            raise
        raise storage_error(problem, url=place, operation=operation) from problem


def storage_error(problem: BaseException, *, url: str, operation: str) -> StorageError:
    """Turn an exception of a backend into a StorageError with a message of one line."""
    text = " ".join(str(problem).split()) or type(problem).__name__
    is_full = False
    if isinstance(problem, OSError) and problem.errno is not None:
        is_full = problem.errno in _NO_ROOM
        text = problem.strerror or text
    else:
        text = f"{type(problem).__name__}: {text}"
    return StorageError(url=url, operation=operation, reason=text, is_full=is_full)


def redacted(url: str) -> str:
    """The URL without user, password and query, safe to log."""
    if not is_url(url):
        return url
    parts = urlsplit(url)
    if not parts.scheme or ("@" not in parts.netloc and not parts.query):
        return url
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def write_file(
    storage: Storage,
    path: str,
    chunks: Iterable[Buffer],
    *,
    probe: Probe = no_probe,
    kind: str,
    sync_folder: bool = True,
    is_new: bool = True,
    progress: Callable[[int], None] = no_progress,
) -> tuple[int, str]:
    """Write a file atomically and durably: afterwards it is complete, or absent.

    A failed write leaves nothing behind, not even an empty folder.

    Args:
        storage: Where to write.
        path: Relative path of the file.
        chunks: Content of the file.
        probe: Called with ``{kind}.open``, ``.written``, ``.synced`` and ``.renamed``.
        kind: Prefix of the probe labels.
        sync_folder: False when writing many files into one folder: the caller then calls
            ``sync_folders`` once. Until then, a power cut may lose the files' names.
        is_new: False if an older file of this name may exist; a failed write leaves it unchanged.
        progress: Called with the number of bytes of each block written.

    Returns:
        Bytes written and their sha256 in hex.

    Raises:
        StorageError: The file cannot be written.
    """
    full = storage.full(path)
    probe(f"{kind}.open")
    with _asked(storage.place(path), "write"):
        if storage.is_local:
            result = _write_local(full, chunks, probe=probe, kind=kind, progress=progress)
        else:
            pour = partial(_pour, chunks=chunks, progress=progress)
            result = _upload(storage, full, pour, probe=probe, kind=kind, is_new=is_new)
        probe(f"{kind}.renamed")
        if sync_folder:
            sync_folders(storage, [path])
    return result


def _write_local(
    full: str,
    chunks: Iterable[Buffer],
    *,
    probe: Probe,
    kind: str,
    progress: Callable[[int], None],
) -> tuple[int, str]:
    temporary = f"{full}.{os.urandom(6).hex()}.tmp"
    try:
        with _created(temporary) as file:
            result = _pour(file, chunks=chunks, progress=progress)
            probe(f"{kind}.written")
            file.flush()
            os.fsync(file.fileno())
        probe(f"{kind}.synced")
        os.replace(temporary, full)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        with suppress(OSError):
            os.rmdir(os.path.dirname(full))  # removes the folder only if it is empty
        raise
    return result


def _created(path: str) -> Any:
    """Open a new file. The folder is created again if a failed writer has just removed it."""
    for _ in range(_FOLDER_RACES):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with suppress(FileNotFoundError):
            return open(path, "wb")
    return open(path, "wb")


def _upload(
    storage: Storage,
    full: str,
    pour: Callable[[Any], tuple[int, str]],
    *,
    probe: Probe,
    kind: str,
    is_new: bool,
) -> tuple[int, str]:
    """Upload one object.

    The remote file is not used as a context manager: after an error, leaving ``with`` would upload
    half of the object.
    """
    remote = storage.fs.open(full, "wb")
    try:
        result = pour(remote)
        probe(f"{kind}.written")
        remote.close()
    except BaseException:
        with suppress(Exception):
            remote.discard()
        with suppress(AttributeError):
            remote.closed = True  # else its destructor would upload half an object
        if is_new:
            with suppress(Exception):
                storage.fs.rm_file(full)
        raise
    return result


def sync_folders(storage: Storage, paths: Iterable[str]) -> None:
    """Fsync the local folders of written files, and their parent folders."""
    if not storage.is_local:
        return
    folders = {os.path.dirname(storage.full(path)) for path in paths}
    with _asked(storage.place(), "sync"):
        for folder in sorted(folders | {os.path.dirname(f) for f in folders}):
            _sync_folder(folder)


def _pour(
    file: Any, *, chunks: Iterable[Buffer], progress: Callable[[int], None]
) -> tuple[int, str]:
    digest, count = hashlib.sha256(), 0
    for chunk in chunks:
        view = memoryview(chunk).cast("B")
        for start in range(0, len(view), _BLOCK_BYTES):
            block = view[start : start + _BLOCK_BYTES]
            digest.update(block)
            file.write(block)
            progress(len(block))
        count += len(view)
    return count, digest.hexdigest()


def _sync_folder(folder: str) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_file(
    storage: Storage, path: str, *, progress: Callable[[int], None] | None = None
) -> bytes:
    """Read a whole file. ``progress`` is called with the number of bytes of each block read.

    Raises:
        FileNotFoundError: The file does not exist.
        StorageError: The file cannot be read.
    """
    with _asked(storage.place(path), "read", may_lack=True):
        full = storage.full(path)
        if progress is None:
            if storage.is_local:
                with open_regular(full) as file:  # an expert of a large model has gigabytes
                    return file.read()
            data: bytes = storage.fs.cat_file(full)
            return data
        blocks = []
        with open_regular(full) if storage.is_local else storage.fs.open(full, "rb") as file:
            while block := file.read(_BLOCK_BYTES):
                blocks.append(block)
                progress(len(block))
    return b"".join(blocks)


def hash_file(storage: Storage, path: str) -> tuple[int, str]:
    """Size in bytes and sha256 (hex) of a file, read block by block.

    Raises:
        FileNotFoundError: The file does not exist.
        StorageError: The file cannot be read.
    """
    digest, count = hashlib.sha256(), 0
    full = storage.full(path)
    with (
        _asked(storage.place(path), "read", may_lack=True),
        open_regular(full) if storage.is_local else storage.fs.open(full, "rb") as file,
    ):
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            count += len(block)
    return count, digest.hexdigest()


def file_size(storage: Storage, path: str) -> int | None:
    """Size of a file in bytes, or None if the file does not exist."""
    try:
        with _asked(storage.place(path), "look at", may_lack=True):
            size: int = storage.fs.info(storage.full(path))["size"]
    except FileNotFoundError:
        return None
    return size


def folder_sizes(storage: Storage, folder: str) -> dict[str, int]:
    """Sizes in bytes of all files directly under a folder, by path. Uses a single request."""
    entries = _entries(storage, storage.full(folder), storage.place(folder))
    return {
        f"{folder}/{e['name'].rpartition('/')[2]}": int(e["size"])
        for e in entries
        if e["type"] == "file"
    }


def list_folder(storage: Storage, folder: str = "") -> list[tuple[str, bool]]:
    """Sorted (name, is_folder) pairs of the entries directly under a folder."""
    full = storage.full(folder) if folder else storage.root
    entries = _entries(storage, full, storage.place(folder))
    found = {(e["name"].rstrip("/").rpartition("/")[2], e["type"] == "directory") for e in entries}
    return sorted(found)


def _entries(storage: Storage, full: str, place: str) -> list[dict[str, Any]]:
    """Details of the entries directly under a folder; empty if the folder does not exist."""
    try:
        with _asked(place, "list", may_lack=True):
            storage.fs.invalidate_cache()
            found: list[dict[str, Any]] = storage.fs.ls(full, detail=True)
    except FileNotFoundError:
        return []
    except StorageError as problem:
        if isinstance(problem.__cause__, NotADirectoryError):
            return []
        raise
    return found


def delete_file(storage: Storage, path: str) -> None:
    """Delete a file. A file that does not exist is no error."""
    try:
        with _asked(storage.place(path), "delete", may_lack=True):
            storage.fs.rm_file(storage.full(path))
    except FileNotFoundError:
        return


def delete_empty_folder(storage: Storage, folder: str) -> None:
    """Delete a local folder if it is empty. Object stores have no folders."""
    if storage.is_local:
        with suppress(OSError):  # not empty, or gone: both are fine
            os.rmdir(storage.full(folder))

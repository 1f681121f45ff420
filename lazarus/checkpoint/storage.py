"""Files at a URL: durable writes, checked reads. EFFECTS.

A local folder gets temporary file, fsync, rename, fsync of the folder. An object store gets one
upload, which is atomic by itself (an object appears whole or not at all). Every step reports to
a ``Probe``, so that a test can kill the process between any two of them.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from lazarus.careful import open_regular, read_bytes
from lazarus.checkpoint.errors import DamagedError

Probe = Callable[[str], None]
Buffer = bytes | bytearray | memoryview
_BLOCK_BYTES = 8 << 20
# A scheme, perhaps behind those of wrappers: "s3://", "simplecache::s3://". "c:foo" is a file name.
_URL = re.compile(r"(?:[A-Za-z][\w+.-]*::)*[A-Za-z][\w+.-]+://")


def no_probe(label: str) -> None:
    """The probe of production: nothing happens."""


@dataclass(frozen=True, slots=True)
class Storage:
    """A root folder on some filesystem. Paths are relative to it, with forward slashes."""

    fs: Any
    root: str
    is_local: bool

    def full(self, path: str) -> str:
        """The path as the filesystem knows it.

        Raises:
            DamagedError: The path leaves the root.
        """
        parts = path.split("/")
        if path.startswith("/") or ".." in parts or "" in parts or "\\" in path:
            raise DamagedError(f"path {path!r} leaves the checkpoint folder")
        return f"{self.root}/{path}"


def is_url(place: str) -> bool:
    """Whether a place is a URL, ``scheme://``; everything else is a path on this machine."""
    return _URL.match(place) is not None


def anchored(place: str) -> str:
    """The same place for every process, whatever folder it works in: a path is made absolute."""
    return place if is_url(place) else _absolute(place)


def _absolute(path: str) -> str:
    return str(Path(os.path.expanduser(path)).absolute())


def open_storage(url: str) -> Storage:
    """The storage behind a folder or any fsspec URL. Nothing is created.

    A path is taken as it is: ``::``, ``?``, ``#`` and ``%`` are letters of a name like any other.
    """
    scheme, _, rest = url.partition("://")
    if not is_url(url) or scheme in LocalFileSystem.protocol:
        root = _absolute(rest if is_url(url) else url)
        return Storage(fs=fsspec.filesystem("file"), root=root.rstrip("/"), is_local=True)
    fs, root = fsspec.core.url_to_fs(url)
    return Storage(fs=fs, root=str(root).rstrip("/"), is_local=isinstance(fs, LocalFileSystem))


def redacted(url: str) -> str:
    """The URL without user, password and query, fit for logs."""
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
) -> tuple[int, str]:
    """Write a file so that it is whole and durable, or absent, under its name.

    Whoever writes many files into one folder passes ``sync_folder=False`` and calls
    ``sync_folders`` once: until then a power cut may take the names of whole files away.

    Probe labels: ``{kind}.open``, ``{kind}.written``, ``{kind}.synced``, ``{kind}.renamed``.

    Returns:
        Bytes written and their sha256 in hex.
    """
    full = storage.full(path)
    probe(f"{kind}.open")
    if not storage.is_local:
        with storage.fs.open(full, "wb") as remote:
            result = _pour(remote, chunks)
            probe(f"{kind}.written")
        probe(f"{kind}.renamed")
        return result
    os.makedirs(os.path.dirname(full), exist_ok=True)
    temporary = f"{full}.{os.urandom(6).hex()}.tmp"
    with open(temporary, "wb") as file:
        result = _pour(file, chunks)
        probe(f"{kind}.written")
        file.flush()
        os.fsync(file.fileno())
    probe(f"{kind}.synced")
    os.replace(temporary, full)
    probe(f"{kind}.renamed")
    if sync_folder:
        sync_folders(storage, [path])
    return result


def sync_folders(storage: Storage, paths: Iterable[str]) -> None:
    """Make the names of written files durable: their folders, and the folders' own names."""
    if not storage.is_local:
        return
    folders = {os.path.dirname(storage.full(path)) for path in paths}
    for folder in sorted(folders | {os.path.dirname(f) for f in folders}):
        _sync_folder(folder)


def _pour(file: Any, chunks: Iterable[Buffer]) -> tuple[int, str]:
    digest, count = hashlib.sha256(), 0
    for chunk in chunks:
        view = memoryview(chunk).cast("B")
        for start in range(0, len(view), _BLOCK_BYTES):
            block = view[start : start + _BLOCK_BYTES]
            digest.update(block)
            file.write(block)
        count += len(view)
    return count, digest.hexdigest()


def _sync_folder(folder: str) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_file(storage: Storage, path: str) -> bytes:
    """The whole file.

    Raises:
        FileNotFoundError: It is not there.
    """
    if storage.is_local:
        return read_bytes(storage.full(path))
    data: bytes = storage.fs.cat_file(storage.full(path))
    return data


def hash_file(storage: Storage, path: str) -> tuple[int, str]:
    """Bytes and sha256 of a file, read block by block.

    Raises:
        FileNotFoundError: It is not there.
    """
    digest, count = hashlib.sha256(), 0
    full = storage.full(path)
    with open_regular(full) if storage.is_local else storage.fs.open(full, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            count += len(block)
    return count, digest.hexdigest()


def file_size(storage: Storage, path: str) -> int | None:
    """Bytes of a file, or None if it is not there."""
    try:
        size: int = storage.fs.info(storage.full(path))["size"]
    except FileNotFoundError:
        return None
    return size


def folder_sizes(storage: Storage, folder: str) -> dict[str, int]:
    """Bytes of every file directly under a folder, by path; one request for all of them."""
    storage.fs.invalidate_cache()
    try:
        entries = storage.fs.ls(storage.full(folder), detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return {
        f"{folder}/{e['name'].rpartition('/')[2]}": int(e["size"])
        for e in entries
        if e["type"] == "file"
    }


def list_folder(storage: Storage, folder: str = "") -> list[tuple[str, bool]]:
    """Names directly under a folder, sorted, each with whether it is a folder itself."""
    full = storage.full(folder) if folder else storage.root
    storage.fs.invalidate_cache()
    try:
        entries = storage.fs.ls(full, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = {(e["name"].rstrip("/").rpartition("/")[2], e["type"] == "directory") for e in entries}
    return sorted(found)


def delete_file(storage: Storage, path: str) -> None:
    """Delete a file; one that is already gone is no error."""
    try:
        storage.fs.rm_file(storage.full(path))
    except FileNotFoundError:
        return


def delete_empty_folder(storage: Storage, folder: str) -> None:
    """Delete a local folder if nothing is left in it; object stores have no folders."""
    if storage.is_local and not os.listdir(storage.full(folder)):
        os.rmdir(storage.full(folder))

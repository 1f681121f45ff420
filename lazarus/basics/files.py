"""Replace and create files atomically."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to, and rename the file to ``path`` at the end.

    After an error, an old file at ``path`` is unchanged.
    """
    partial = path.with_name(f"{path.name}.tmp")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def synced(path: Path) -> Iterator[BinaryIO]:
    """Open a file to replace ``path`` atomically and durably, even if the machine crashes."""
    with replaced(path) as partial, partial.open("wb") as out:
        yield out
        out.flush()
        os.fsync(out.fileno())
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def created(path: Path, data: bytes, *, draft: Path, is_durable: bool = False) -> bool:
    """Create a file whole; returns False, and changes nothing, if it exists already.

    Args:
        path: The file.
        data: Its content.
        draft: Path in the same folder that is written first; no other writer may use it.
        is_durable: Whether the content must survive a crash of the machine.
    """
    try:
        with draft.open("wb") as out:
            out.write(data)
            if is_durable:
                out.flush()
                os.fsync(out.fileno())
        os.link(draft, path)
    except FileExistsError:
        return False
    finally:
        draft.unlink(missing_ok=True)
    return True

"""Ownership of a run's folder: at most one driver owns it, and others can see if it is alive.

The owner is described by the file ``owner-N.json`` with the highest N. A process takes the folder
by creating the file with the next number, which only one process can do. An owner removes its file
when it ends; a killed owner leaves it behind. On the same machine, the owner's process (pid, start
time, boot) shows whether it is alive; from other machines, its heartbeats do: every few seconds,
the owner touches its file.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from lazarus.basics.files import created
from lazarus.basics.threads import spawn
from lazarus.errors import ConfigError

_NAME = re.compile(r"owner-(\d{1,9})\.json")
_BEATS = 6  # heartbeats of a living owner within ``gone_after_s``
_LOOK_S = 0.1  # between two checks for a heartbeat of an owner on another machine
_STARTED_WORD = 19  # index in /proc/PID/stat, after the name: start time in ticks since boot
_MOST_BYTES = 1 << 16  # largest size of an owner's file
_LONGEST_SILENCE_S = 7 * 86400.0

State = Literal["alive", "gone", "elsewhere"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """The process that took a folder, as described by its file.

    ``gone_after_s`` is the number of seconds without a heartbeat after which others may take the
    folder.
    """

    pid: int
    host: str
    run: str
    boot: str
    namespace: str
    started: int
    gone_after_s: float

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def state(self) -> State:
        """Whether the owner's process is alive; "elsewhere" if this machine cannot see it."""
        here = _myself(run="", gone_after_s=0.0)
        if (self.host, self.boot, self.namespace) != (here.host, here.boot, here.namespace):
            return "elsewhere"
        return "alive" if started_at(self.pid) == self.started else "gone"


def owner_of(folder: Path) -> Owner | None:
    """The owner of a run's folder, alive or killed; None after an orderly end.

    If ``state`` of the owner is "gone", the run's driver was killed. If it is "elsewhere", see
    ``silence_s``.

    Raises:
        ConfigError: The owner's file is damaged.
    """
    found = _newest(folder)
    return None if found is None else _read(found)


def silence_s(folder: Path, *, now_s: float) -> float:
    """Seconds since the owner's last heartbeat, by wall clock; 0 without an owner.

    Clocks of two machines may differ, so taking a folder does not rely on this value.
    """
    found = _newest(folder)
    try:
        return 0.0 if found is None else max(0.0, now_s - found.stat().st_mtime)
    except FileNotFoundError:
        return 0.0


class Ownership:
    """A folder owned by this process; made by ``take``, given back by ``release``.

    ``on_lost`` is called with a reason if the folder is removed or taken by another run.
    """

    def __init__(self, path: Path, owner: Owner) -> None:
        self.owner = owner
        self._path = path
        self._released = threading.Event()
        self.on_lost: Callable[[str], None] = lambda reason: None
        self._thread = spawn("owner", self._beat, on_death=self._died)

    def _died(self, name: str, problem: BaseException) -> None:
        """Report the loss of ownership: without heartbeats, others may take the folder."""
        self.on_lost(f"the thread that keeps the run's folder died: {problem!r}")

    def _beat(self) -> None:
        while not self._released.wait(self.owner.gone_after_s / _BEATS):
            try:
                os.utime(self._path)
                lost = _newest(self._path.parent) != self._path
            except FileNotFoundError:
                lost = True
            except OSError:
                continue  # a passing error of disk or network; the next heartbeat may succeed
            if lost and not self._released.is_set():
                folder = self._path.parent
                self.on_lost(f"the run's folder {folder} was removed, or taken by another run")
                return

    def release(self) -> None:
        """Give the folder back; does nothing if it was released before."""
        self._released.set()
        with contextlib.suppress(OSError):
            self._path.unlink()


def take(
    folder: Path, *, run: str, gone_after_s: float, say: Callable[[str], None] | None = None
) -> Ownership:
    """Become the owner of an existing folder.

    Args:
        folder: Folder of a run.
        run: Id of the run, written into the owner's file for information.
        gone_after_s: Seconds without a heartbeat after which other machines may take the folder.
        say: Called with a message if taking the folder will take a while; default: print.

    Raises:
        ConfigError: The folder has an owner; the message names it.
        OSError: The folder cannot be written.
    """
    me = _myself(run=run, gone_after_s=min(gone_after_s, _LONGEST_SILENCE_S))
    while True:
        standing = _newest(folder)
        if standing is not None:
            _refuse_unless_gone(standing, say or _say)
        number = 1 + _number(standing)
        path = folder / f"owner-{number}.json"
        if not _create(path, me):
            continue  # another process was faster
        newest = _newest(folder)
        if newest is None or _number(newest) > number:  # the number was used and removed before
            path.unlink(missing_ok=True)
            continue
        _remove_below(folder, number)
        return Ownership(path, me)


def _refuse_unless_gone(standing: Path, say: Callable[[str], None]) -> None:
    """Raise unless the owner is gone. For an owner on another machine, wait for heartbeats."""
    try:
        owner = _read(standing)
    except FileNotFoundError:
        return  # the owner has just ended
    state = owner.state
    if state == "elsewhere":
        say(f"{standing.parent} was taken by {owner}; looking whether that still lives, for up to "
            f"{owner.gone_after_s:.0f} s")  # fmt: skip
        state = "alive" if _beats(standing, owner.gone_after_s) else "gone"
    if state == "alive":
        itself = " (this process)" if owner.pid == os.getpid() else ""
        raise ConfigError(
            f"{standing.parent} belongs to a run under way: {owner}{itself}; end that one first, "
            f"or give another run.dir"
        )


def _beats(path: Path, limit_s: float) -> bool:
    """Whether the owner touches its file within ``limit_s``, measured by this machine's clock."""
    pause = threading.Event()
    until = time.monotonic() + limit_s
    try:
        before = _looked_at(path)
        while time.monotonic() < until:
            pause.wait(_LOOK_S)
            if _looked_at(path) != before:
                return True
    except FileNotFoundError:
        pass  # the owner ended orderly
    return False


def _looked_at(path: Path) -> int:
    with path.open("rb") as file:  # opening makes a network file system ask its server
        return os.fstat(file.fileno()).st_mtime_ns


def _newest(folder: Path) -> Path | None:
    """The owner's file with the highest number; None without one."""
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return max(found, key=_number, default=None)


def _number(path: Path | None) -> int:
    match = None if path is None else _NAME.fullmatch(path.name)
    return 0 if match is None else int(match[1])


def _read(path: Path) -> Owner:
    status = path.stat()
    try:
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_BYTES:
            raise ValueError("not a small file")
        owner = Owner(**json.loads(path.read_text(encoding="utf-8")))
        if any(type(getattr(owner, f.name)).__name__ != f.type for f in fields(Owner)):
            raise ValueError("a field of another type")
        if not 0 < owner.gone_after_s <= _LONGEST_SILENCE_S:
            raise ValueError("a time that no owner gives")
    except (ValueError, TypeError, RecursionError) as problem:
        text = f"{path} does not say who owns the folder; remove it if no run uses the folder"
        raise ConfigError(text) from problem
    return owner


def _create(path: Path, owner: Owner) -> bool:
    """Create an owner's file atomically; return False if it exists already."""
    draft = path.with_name(f".owner-{os.getpid()}-{threading.get_ident()}")
    return created(path, json.dumps(asdict(owner)).encode(), draft=draft)


def _remove_below(folder: Path, number: int) -> None:
    for path in folder.iterdir():
        if _NAME.fullmatch(path.name) and _number(path) < number:
            path.unlink(missing_ok=True)


def _myself(*, run: str, gone_after_s: float) -> Owner:
    return Owner(
        pid=os.getpid(),
        host=socket.gethostname(),
        run=run,
        boot=Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip(),
        namespace=os.readlink("/proc/self/ns/pid"),
        started=started_at(os.getpid()) or 0,
        gone_after_s=float(gone_after_s),
    )


def started_at(pid: int) -> int | None:
    """Start time of a process in ticks since boot; None if it is gone or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    words = text.rpartition(")")[2].split()
    return None if words[0] in "ZX" else int(words[_STARTED_WORD])


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

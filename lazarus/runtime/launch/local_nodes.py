"""The nodes of a run that live on this machine, apart from their ranks: folder and keeper."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from lazarus.basics.threads import say_so, spawn
from lazarus.checkpoint.errors import KeeperUnavailableError
from lazarus.checkpoint.files.store import Tag
from lazarus.control.cluster.replacing import Machine
from lazarus.errors import RoomTakenError
from lazarus.runtime.keeper.client import KeeperClient
from lazarus.runtime.keeper.process import KeeperConfig, KeeperProcess, start_keeper
from lazarus.runtime.rpc.channel import endpoint

_REPLACEMENTS = 3  # of one node's keeper: one that dies again and again stays away
_PINGS = 3  # in a row that a keeper does not answer, in the time that it may be silent
_NODE_NEWS_S = 1.0  # a node that dies takes its keeper along, and is closed long before this


@dataclass(frozen=True, kw_only=True, slots=True)
class NodePlace:
    """Where one node of the run lives."""

    host: str  # the address that its processes bind to, and are reached at
    keeper: str = ""  # address of its keeper of snapshots; empty: it has none
    zone: str = ""  # availability zone of its machine; empty: not known
    memory_share: float = 1.0  # of the memory that one of its processes sees


class OwnPlaces:
    """Places for nodes on this computer: each stands for a machine, and takes one node."""

    def __init__(self, count: int) -> None:
        self._lock = threading.Lock()
        self._count = count
        self._taken: dict[str, str] = {}  # node key -> place

    def machines(self) -> tuple[Machine, ...]:
        with self._lock:
            taken = set(self._taken.values())
            names = [f"place-{number}" for number in range(self._count)]
        return tuple(Machine(id=name, room=int(name not in taken)) for name in names)

    def add(self) -> None:
        with self._lock:
            self._count += 1

    def take(self, key: str, place: str) -> None:
        """
        Raises:
            RoomTakenError: Another node of the run is there.
        """
        with self._lock:
            if place in self._taken.values():
                raise RoomTakenError(f"{place} is taken")
            self._taken[key] = place

    def leave(self, key: str) -> None:
        with self._lock:
            self._taken.pop(key, None)

    def shortage(self) -> str:
        with self._lock:
            return f"{len(self._taken)} of {self._count} places on this computer are taken"


class LocalNodes:
    """Owns the keepers of this machine: they end with this process, or before.

    A keeper that dies alone, or hangs, is replaced, at its address and without its snapshots.
    """

    def __init__(self, host: str, *, bind_host: str) -> None:
        self._host, self._bind_host = host, bind_host
        self._lock = threading.Lock()
        self._keepers: dict[str, KeeperProcess] = {}
        self._folders: dict[str, Path] = {}
        self._closed: dict[str, threading.Event] = {}

    def open(self, key: str, *, keeper: KeeperConfig | None, folder: Path) -> NodePlace:
        """Make the node's folder and start its keeper.

        Raises:
            KeeperUnavailableError: It did not start.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with self._lock:
            self._folders[key] = folder
        if keeper is None:
            return NodePlace(host=self._host)
        bound = replace(keeper, bind=endpoint(self._bind_host, 0))
        started = start_keeper(bound, host=self._host)
        (folder / str(started.process.pid)).touch()
        again = endpoint(self._bind_host, int(started.address.rpartition(":")[2]))
        closed = threading.Event()
        with self._lock:
            self._keepers[key], self._closed[key] = started, closed
        config = replace(keeper, bind=again)
        spawn("keeper-watch", self._follow, key, config, closed, on_death=say_so)
        return NodePlace(host=self._host, keeper=started.address)

    def _follow(self, key: str, config: KeeperConfig, closed: threading.Event) -> None:
        """Replace the keeper of a node that lives on without it."""
        for _ in range(_REPLACEMENTS):
            with self._lock:
                keeper = self._keepers.get(key)
            if keeper is None:
                return
            spawn("keeper-pulse", _end_hung, keeper, config, closed, on_death=say_so)
            if keeper.process.wait() == 0 or closed.wait(_NODE_NEWS_S):
                return  # the node is closed, or the keeper was told to leave
            keeper.stop()
            try:
                started = start_keeper(config, host=self._host)
            except KeeperUnavailableError:
                continue  # its port is taken, or there is no room: checkpoints say that they fail
            with self._lock:
                if not closed.is_set():
                    (self._folders[key] / str(keeper.process.pid)).unlink(missing_ok=True)
                    (self._folders[key] / str(started.process.pid)).touch()
                    self._keepers[key] = started
                    continue
            started.stop()
            return

    def note(self, key: str, pid: int = 0) -> None:
        """A process (this one) belongs to the node: a fault that ends the node ends it too."""
        with self._lock:
            folder = self._folders[key]
        (folder / str(pid or os.getpid())).touch()

    def close(self, key: str) -> None:
        """End the keeper, remove the folder. Fine if the node is gone already."""
        with self._lock:
            keeper = self._keepers.pop(key, None)
            folder = self._folders.pop(key, None)
            closed = self._closed.pop(key, None)
        if closed is not None:
            closed.set()
        if keeper is not None:
            keeper.process.kill()
            keeper.stop()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    def close_all(self) -> None:
        with self._lock:
            keys = tuple(self._folders)
        for key in keys:
            self.close(key)


def _end_hung(keeper: KeeperProcess, config: KeeperConfig, closed: threading.Event) -> None:
    """Kill a keeper that answers nothing any more; whoever waits for its end replaces it."""
    every_s, missed = config.silent_s / _PINGS, 0
    tag = Tag(job=config.job, term=0, generation=0)
    while not closed.wait(every_s) and keeper.process.poll() is None:
        client = KeeperClient(
            keeper.address, credentials=config.credentials, tag=tag, timeout_s=every_s
        )
        with closing(client):
            missed = 0 if client.answers() else missed + 1
        if missed >= _PINGS and not closed.is_set():
            print(f"keeper {keeper.address} is silent: replaced", file=sys.stderr, flush=True)
            keeper.process.kill()
            return

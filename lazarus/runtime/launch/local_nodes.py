"""Folders and keepers of the run's nodes on this machine. Ranks are started by the launcher."""

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

_REPLACEMENTS = 3  # starts of a new keeper for one node; after these the node has none
_PINGS = 3  # unanswered pings in a row, within ``silent_s``, after which a keeper counts as hung
_NODE_NEWS_S = 1.0  # if the keeper died with its node, the node is closed long before this


@dataclass(frozen=True, kw_only=True, slots=True)
class NodePlace:
    """Addresses and resources of one node of the run."""

    host: str  # address that its processes bind to and are reached at
    keeper: str = ""  # address of the node's keeper; empty: none
    zone: str = ""  # availability zone of its machine; empty: unknown
    # The node's memory, in multiples of the memory that one of its processes sees: 0.5 where two
    # nodes share a machine, the number of ranks where each rank sees only its own GPU.
    memory_share: float = 1.0


class OwnPlaces:
    """Places for nodes on this computer: each place counts as a machine that takes one node."""

    def __init__(self, count: int) -> None:
        self._lock = threading.Lock()
        self._count = count
        self._taken: dict[str, str] = {}  # node key -> place

    def machines(self) -> tuple[Machine, ...]:
        """All places as machines, with room 1 for free ones and 0 for taken ones."""
        with self._lock:
            taken = set(self._taken.values())
            names = [f"place-{number}" for number in range(self._count)]
        return tuple(Machine(id=name, room=int(name not in taken)) for name in names)

    def add(self) -> None:
        """Add one place."""
        with self._lock:
            self._count += 1

    def take(self, key: str, place: str) -> None:
        """Put a node in a place.

        Raises:
            RoomTakenError: Another node of the run has the place.
        """
        with self._lock:
            if place in self._taken.values():
                raise RoomTakenError(f"{place} is taken")
            self._taken[key] = place

    def leave(self, key: str) -> None:
        """Free the place of a node; does nothing if the node has none."""
        with self._lock:
            self._taken.pop(key, None)

    def shortage(self) -> str:
        with self._lock:
            return f"{len(self._taken)} of {self._count} places on this computer are taken"


class LocalNodes:
    """Starts, watches and ends the keepers on this machine; none outlives this process.

    A keeper that dies or hangs while its node lives is replaced by a new one at the same address.
    The snapshots of the old keeper are lost.
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
            KeeperUnavailableError: The keeper did not start.
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
        """Wait for the end of a node's keeper and replace the keeper if the node still lives."""
        for _ in range(_REPLACEMENTS):
            with self._lock:
                keeper = self._keepers.get(key)
            if keeper is None:
                return
            spawn("keeper-pulse", _end_hung, keeper, config, closed, on_death=say_so)
            if keeper.process.wait() == 0 or closed.wait(_NODE_NEWS_S):
                return  # the node is closed, or the keeper left on an order
            keeper.stop()
            try:
                started = start_keeper(config, host=self._host)
            except KeeperUnavailableError:
                continue  # its port or memory is not available; failed checkpoints are reported
            with self._lock:
                if not closed.is_set():
                    (self._folders[key] / str(keeper.process.pid)).unlink(missing_ok=True)
                    (self._folders[key] / str(started.process.pid)).touch()
                    self._keepers[key] = started
                    continue
            started.stop()
            return

    def note(self, key: str) -> None:
        """Add this process to a node: an injected fault that ends the node ends the process too."""
        with self._lock:
            folder = self._folders[key]
        (folder / str(os.getpid())).touch()

    def close(self, key: str) -> None:
        """End the node's keeper and remove its folder; does nothing if the node is closed."""
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
        """Close all nodes."""
        with self._lock:
            keys = tuple(self._folders)
        for key in keys:
            self.close(key)


def _end_hung(keeper: KeeperProcess, config: KeeperConfig, closed: threading.Event) -> None:
    """Ping a keeper and kill it once it stops answering; ``_follow`` then replaces it."""
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

"""Process groups that can be broken at once: built per generation, released by their own process.

Gloo has no abort, and a rank that waits for a stopped peer waits for its whole time-out. So we keep
a duplicate of every connected socket of the group: shutting that down makes the collective that
sits on it raise within milliseconds, whatever the cause, and a duplicate cannot be reused by
somebody else. NCCL has its own abort.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import distributed as dist

from dispatcher.exchange import Exchange, TorchExchange
from dispatcher.shared import SharedExchange, can_share
from lazarus.errors import FencedError

_CONNECT_S = 5.0  # to the store

T = TypeVar("T")

c10d: Any = dist  # torch's stubs lack these classes


def listen(host: str) -> socket.socket:
    """A listening TCP socket on ``host`` and a free port; nothing binds to all interfaces."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server = socket.socket(family, socket.SOCK_STREAM)
    server.bind((host, 0))
    server.listen(1024)
    return server


class RendezvousStore:
    """The TCP store of a run; it lives in the controller, never in a rank."""

    def __init__(self, host: str, *, timeout_s: float) -> None:
        server = listen(host)
        self.address = f"{host}:{server.getsockname()[1]}"
        self._store = c10d.TCPStore(
            host,
            server.getsockname()[1],
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
            master_listen_fd=server.detach(),
            use_libuv=True,
        )


def _sockets() -> dict[int, str]:
    """Socket file descriptors of this process and what they are."""
    found: dict[int, str] = {}
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{name}")
            if target.startswith("socket:"):
                found[int(name)] = target
    return found


def _connected(fd: int, skip_ports: frozenset[int]) -> socket.socket | None:
    """A duplicate of a connected TCP socket that does not lead to one of ``skip_ports``."""
    try:
        copy = socket.socket(fileno=os.dup(fd))
    except OSError:
        return None
    try:
        listening = copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        tcp = copy.family in (socket.AF_INET, socket.AF_INET6)
        if not listening and tcp and copy.getpeername()[1] not in skip_ports:
            return copy
    except OSError:
        pass  # not connected (any more): nothing to shut down
    copy.close()
    return None


def _open_client(address: str, port: int) -> Any:
    """A client of the store. Fails at once where nobody listens: the client itself tries on.

    Raises:
        RuntimeError: The store is gone, and with it the controller that named it.
    """
    try:
        socket.create_connection((address, port), timeout=_CONNECT_S).close()
        return c10d.TCPStore(
            address,
            port,
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=_CONNECT_S),
        )
    except (OSError, RuntimeError) as problem:
        raise RuntimeError(f"no rendezvous store at {address}:{port}: {problem}") from problem


class Group:
    """One generation's process group over its own store client, releasable from another thread."""

    def __init__(self, *, generation: int, skip_ports: frozenset[int]) -> None:
        self.generation = generation
        self._skip_ports = skip_ports
        self._lock = threading.Lock()
        self._released = False
        self._before: set[str] = set()
        self._held: dict[str, socket.socket] = {}
        self._made: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()
        self._store: Any = None
        self._shared: SharedExchange | None = None
        self.pg: dist.ProcessGroup | None = None

    def build(
        self,
        *,
        store: str,
        prefix: str,
        rank: int,
        size: int,
        host: str,
        device: torch.device,
        timeout_s: float,
    ) -> dist.ProcessGroup:
        """Connect all pairs; blocks until every rank is here or ``release`` is called.

        Raises:
            FencedError: Released while building.
            RuntimeError: A peer did not come.
        """
        with self._lock:
            self._check()
            self._before = set(_sockets().values())
        address, _, port = store.rpartition(":")
        client = self._unless_released(lambda: _open_client(address, int(port)))
        client.set_timeout(timedelta(seconds=timeout_s))
        self._hold()
        self._store = c10d.PrefixStore(prefix, client)
        if device.type == "cuda":
            pg = _nccl(self._store, rank, size, timeout_s)
        else:
            rendezvous = self._store
            pg = self._unless_released(lambda: _gloo(rendezvous, rank, size, host, timeout_s))
        self._hold()
        with self._lock:
            self._before = set()  # what is opened from now on is not the group's
        self.pg = pg
        return pg

    def exchange(self, *, shared: bool, timeout_s: float) -> Exchange:
        """Collectives of the built group; with ``shared`` through memory where that is possible.

        Raises:
            RuntimeError: A peer left meanwhile, or the group was released.
        """
        assert self.pg is not None
        over = TorchExchange(self.pg)
        if not shared or over.size == 1 or not can_share():
            return over
        found = SharedExchange(over.rank, over.size)
        with self._lock:
            self._check()
            self._shared = found
        return found if found.connect(over, timeout_s=timeout_s) else over

    def _unless_released(self, make: Callable[[], T]) -> T:
        """What ``make`` makes, in a thread of its own: some waits have no socket to shut down.

        A store client tries to connect for as long as it may, and gloo waits for a peer that was
        to connect to it. After ``release`` such a thread ends by itself, at its own time-out.

        Raises:
            FencedError: Released meanwhile.
        """

        def work() -> None:
            try:
                self._made.put((make(), None))
            except Exception as problem:  # noqa: BLE001 - raised in the thread that waits
                self._made.put((None, problem))

        threading.Thread(target=work, name=f"group-{self.generation}", daemon=True).start()
        made, problem = self._made.get()
        with self._lock:
            self._check()
        if problem is not None:
            raise problem
        return cast(T, made)

    def _check(self) -> None:
        if self._released:
            raise FencedError(generation=self.generation, fence=self.generation + 1)

    def _hold(self) -> None:
        """Take duplicates of the sockets that appeared; if released meanwhile, shut them down."""
        with self._lock:
            self._collect()
            if self._released:
                self._shut()
            self._check()

    def _collect(self) -> None:
        for fd, name in _sockets().items():
            if name in self._before or name in self._held:
                continue
            if (copy := _connected(fd, self._skip_ports)) is not None:
                self._held[name] = copy

    def _shut(self) -> None:
        for held in self._held.values():
            with suppress(OSError):
                held.shutdown(socket.SHUT_RDWR)

    def release(self) -> None:
        """Free every thread that waits on this group, now. Any thread may call it, repeatedly."""
        with self._lock:
            self._released = True
            self._made.put((None, None))  # whoever waits need not
            if self._before:
                self._collect()
            self._shut()
            shared = self._shared
        if shared is not None:
            shared.abort()
        abort = getattr(self.pg, "abort", None)
        if abort is not None and self.pg is not None and self.pg.name() == "nccl":
            abort()

    def close(self) -> None:
        """Release, and give all sockets and threads back."""
        self.release()
        if self._shared is not None:
            self._shared.close()
        self.pg = None
        self._store = None
        with self._lock:
            for held in self._held.values():
                held.close()
            self._held.clear()


def _gloo(store: Any, rank: int, size: int, host: str, timeout_s: float) -> dist.ProcessGroup:
    options = c10d.ProcessGroupGloo._Options()
    options._timeout = timedelta(seconds=timeout_s)
    options._threads = 2
    options._devices = [c10d.ProcessGroupGloo.create_device(hostname=host)]
    group: dist.ProcessGroup = c10d.ProcessGroupGloo(store, rank, size, options)
    return group


def _nccl(store: Any, rank: int, size: int, timeout_s: float) -> dist.ProcessGroup:
    options = c10d.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout_s)
    group: dist.ProcessGroup = c10d.ProcessGroupNCCL(store, rank, size, options)
    return group

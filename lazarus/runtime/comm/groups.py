"""Process groups that another thread of the same process can abort; one group per generation.

Gloo has no abort: a rank that waits for a stopped peer waits for the whole time-out. So this module
keeps a duplicate of every connected socket of a group. Shutting a duplicate down makes the
collective that waits on the socket raise within milliseconds. The duplicate stays valid after gloo
closes its own descriptor, so that no unrelated socket that reuses the number is shut down. NCCL has
an abort of its own.
"""

from __future__ import annotations

import json
import queue
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import distributed as dist

from dispatcher.exchange import Exchange, TorchExchange
from dispatcher.local.shared import SharedExchange, can_share
from lazarus.basics.threads import spawn
from lazarus.errors import FencedError
from lazarus.runtime.host.sockets import (
    Address,
    address_of,
    connections,
    is_mute,
    listeners,
    peer_of,
    socket_names,
)

_FIRST_ATTEMPT_S, _LAST_ATTEMPT_S = 1.0, 5.0  # limits of the first and of later connect attempts
_PAUSE_S = 0.05  # between two attempts

T = TypeVar("T")

c10d: Any = dist  # torch's stubs lack these classes


class StoreUnreachableError(RuntimeError):
    """The rendezvous store does not answer. No rank of the group is to blame."""


def _open_client(
    address: str, port: int, *, timeout_s: float, over: threading.Event
) -> tuple[Any, Address]:
    """Connect to the rendezvous store, in several attempts.

    Args:
        address: Host of the store.
        port: Port of the store.
        timeout_s: Limit of all attempts together.
        over: Set by another thread to stop further attempts.

    Returns:
        The client, and the store's numeric address and port.

    Raises:
        StoreUnreachableError: No attempt succeeded.
    """
    until = time.monotonic() + timeout_s
    attempt_s = _FIRST_ATTEMPT_S
    while True:
        try:
            with socket.create_connection((address, port), timeout=attempt_s) as probe:
                place = peer_of(probe) or (address, port)
            return _client_within(address, port, place, within_s=attempt_s), place
        except (OSError, RuntimeError) as problem:
            if over.is_set() or time.monotonic() + _PAUSE_S > until:
                raise StoreUnreachableError(
                    f"no rendezvous store at {address}:{port} for {timeout_s:.0f} s: {problem}"
                ) from problem
        over.wait(_PAUSE_S)
        attempt_s = min(2 * attempt_s, _LAST_ATTEMPT_S, max(_PAUSE_S, until - time.monotonic()))


def _client_within(address: str, port: int, place: Address, *, within_s: float) -> Any:
    """Make one attempt to connect to the store, in a thread of its own.

    Torch's client waits for ever if the server accepts but never answers. After ``within_s`` its
    sockets to the store are shut down, which frees the thread.

    Raises:
        OSError, RuntimeError: The attempt failed or took too long.
    """
    earlier = set(socket_names().values())
    made: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def attempt() -> None:
        limit = timedelta(seconds=within_s)
        made.put(c10d.TCPStore(address, port, None, False, limit, wait_for_workers=False))

    spawn("store-client", attempt, on_death=lambda name, problem: made.put(problem))
    try:
        found = made.get(timeout=within_s)
    except queue.Empty:
        for _, link in connections(besides=earlier):
            with link:
                if peer_of(link) == place:
                    link.shutdown(socket.SHUT_RDWR)
        raise TimeoutError(f"no greeting within {within_s:.1f} s") from None
    if isinstance(found, BaseException):
        raise found
    return found


class Group:
    """One generation's process group with its own store client; ``release`` aborts it.

    Only sockets of this group are shut down: those connected to the store or to a peer's listener,
    and those accepted by this rank's listener. Ranks publish the addresses of their listeners in
    the store.
    """

    def __init__(self, *, generation: int) -> None:
        self.generation = generation
        self._lock = threading.Lock()
        self._over = threading.Event()  # set by ``release``
        self._store_place: Address | None = None
        self._earlier: set[str] = set()  # sockets that existed before this group was built
        self._own_ports: frozenset[int] = frozenset()  # ports of this rank's listener
        self._rank_at: dict[Address, int] = {}  # address of a peer's listener -> its rank
        self._held: dict[str, socket.socket] = {}
        self._made: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
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
        connect_s: float,
    ) -> dist.ProcessGroup:
        """Connect to all peers; blocks until every rank has come or ``release`` is called.

        Args:
            store: Address of the store, "host:port".
            prefix: Prefix of this group's keys in the store.
            rank: This process's rank in the group.
            size: Number of ranks in the group.
            host: Address of this rank.
            device: Device of the group's tensors: NCCL for CUDA, else gloo.
            timeout_s: Longest wait for a peer, here and in every collective.
            connect_s: Longest wait for a connection to the store, all attempts together.

        Raises:
            FencedError: The group was released meanwhile.
            StoreUnreachableError: The store does not answer.
            RuntimeError: A peer did not come in time.
        """
        with self._lock:
            self._check()
            self._earlier = set(socket_names().values())
        address, _, port = store.rpartition(":")
        client, self._store_place = self._unless_released(
            lambda: _open_client(address, int(port), timeout_s=connect_s, over=self._over)
        )
        client.set_timeout(timedelta(seconds=timeout_s))
        self._hold()
        self._store = c10d.PrefixStore(prefix, client)
        try:
            if device.type == "cuda":
                pg = _nccl(self._store, rank, size, timeout_s)
            else:
                pg = self._unless_released(lambda: self._gloo(rank, size, host, timeout_s))
        except c10d.DistNetworkError as problem:
            raise StoreUnreachableError(f"the rendezvous store at {store}: {problem}") from problem
        self._hold()
        self.pg = pg
        return pg

    def _gloo(self, rank: int, size: int, host: str, timeout_s: float) -> dist.ProcessGroup:
        """Exchange the addresses of all listeners through the store, and connect by gloo."""
        store = self._store
        options = c10d.ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=timeout_s)
        options._threads = 2
        device, places = _device_at(host)
        options._devices = [device]
        self._own_ports = frozenset(port for _, port in places)
        if size > 1:
            store.set(f"listener/{rank}", json.dumps(places))
            peers = [peer for peer in range(size) if peer != rank]
            told = store.multi_get([f"listener/{peer}" for peer in peers])
            self._rank_at = {
                (ip, port): peer
                for peer, text in zip(peers, told, strict=True)
                for ip, port in json.loads(text)
            }
        group: dist.ProcessGroup = c10d.ProcessGroupGloo(store, rank, size, options)
        return group

    def exchange(self, *, shared: bool, timeout_s: float) -> Exchange:
        """Collectives over the built group.

        Args:
            shared: Use shared memory if this machine supports it and all ranks are on it.
            timeout_s: Longest wait for a peer.

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
        """Call ``make`` in a thread of its own and return its result, unless released first.

        Some waits have no socket that ``release`` could shut down: a store client that tries to
        connect, and gloo waiting for a peer to connect. After ``release`` such a thread ends at
        its own time-out.

        Raises:
            FencedError: The group was released meanwhile.
        """

        def died(name: str, problem: BaseException) -> None:
            self._made.put((None, problem))  # raised in the thread that waits

        spawn(f"group-{self.generation}", lambda: self._made.put((make(), None)), on_death=died)
        made, problem = self._made.get()
        with self._lock:
            self._check()
        if problem is not None:
            raise problem
        return cast(T, made)

    def _check(self) -> None:
        if self._over.is_set():
            raise FencedError(generation=self.generation, fence=self.generation + 1)

    def _hold(self) -> None:
        """Duplicate the group's sockets; if the group was released meanwhile, shut them down.

        Raises:
            FencedError: The group was released meanwhile.
        """
        with self._lock:
            self._collect()
            if self._over.is_set():
                self._shut()
            self._check()

    def _collect(self) -> None:
        for name, copy in connections(besides=set(self._held)):
            if self._is_own(name, copy):
                self._held[name] = copy
            else:
                copy.close()

    def _is_own(self, name: str, connected: socket.socket) -> bool:
        peer = peer_of(connected)
        if peer is None:
            return False
        if peer == self._store_place:
            return name not in self._earlier
        return peer in self._rank_at or address_of(connected)[1] in self._own_ports

    def _shut(self) -> None:
        for held in self._held.values():
            with suppress(OSError):
                held.shutdown(socket.SHUT_RDWR)

    def mute_peers(self) -> tuple[int, ...]:
        """Ranks whose machine does not acknowledge data sent to it: a broken link. Never blocks."""
        on_host: dict[str, set[int]] = {}
        for (ip, _), peer in self._rank_at.items():
            on_host.setdefault(ip, set()).add(peer)
        found: set[int] = set()
        with self._lock:
            for link in self._held.values():
                place = peer_of(link)
                if place is None or not is_mute(link):
                    continue
                called = self._rank_at.get(place)
                if called is not None:
                    found.add(called)
                elif len(callers := on_host.get(place[0], set())) == 1:
                    found |= callers
        return tuple(sorted(found))

    def release(self) -> None:
        """Abort the group, so that every thread that waits on it raises.

        Any thread may call this, more than once.
        """
        with self._lock:
            self._over.set()
            self._made.put((None, None))  # wakes ``_unless_released``
            if self.pg is None:
                self._collect()
            self._shut()
            shared = self._shared
        if shared is not None:
            shared.abort()
        abort = getattr(self.pg, "abort", None)
        if abort is not None and self.pg is not None and self.pg.name() == "nccl":
            abort()

    def close(self) -> None:
        """Release the group and free its sockets and threads."""
        self.release()
        if self._shared is not None:
            self._shared.close()
        self.pg = None
        self._store = None
        with self._lock:
            for held in self._held.values():
                held.close()
            self._held.clear()


def _device_at(host: str) -> tuple[Any, list[Address]]:
    """Create a gloo device, and find its address: the listener that appeared with the device.

    If another thread opened a listener at the same moment, the address is ambiguous; then another
    device is created, up to three in all.
    """
    for _ in range(3):
        before = listeners()
        device = c10d.ProcessGroupGloo.create_device(hostname=host)
        places = [place for name, place in listeners().items() if name not in before]
        if len(places) == 1:
            break
    return device, places


def _nccl(store: Any, rank: int, size: int, timeout_s: float) -> dist.ProcessGroup:
    options = c10d.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout_s)
    group: dist.ProcessGroup = c10d.ProcessGroupNCCL(store, rank, size, options)
    return group

"""Ranks of real gloo groups in processes of their own, told by a pipe what to do next."""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from dispatcher import Exchange, SharedExchange
from lazarus.runtime.comm.groups import Group

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["lazarus.runtime.launch.preload"])


class RankProcess:
    """The parent's end of one rank."""

    def __init__(self) -> None:
        self._here, there = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=_serve, args=(there,), daemon=True)
        self.process.start()
        there.close()

    def tell(self, order: str, **more: Any) -> None:
        self._here.send((order, more))

    def answer(self, *, timeout_s: float = 60.0) -> Any:
        if not self._here.poll(timeout_s):
            raise TimeoutError("the rank does not answer")
        return self._here.recv()

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    rank = _Rank(pipe)
    while True:
        order, more = pipe.recv()
        getattr(rank, order)(**more)


class _Rank:
    """Collectives run in a thread, so that release comes from another one, as in a worker."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._group: Group | None = None
        self._exchange: Exchange | None = None
        self._users: list[socket.socket] = []
        self._thread: threading.Thread | None = None
        self._outcome: Any = None

    def build(
        self,
        *,
        store: str,
        generation: int,
        rank: int,
        size: int,
        answer: bool,
        shared: bool = False,
        connect_s: float = 20.0,
    ) -> None:
        group = Group(generation=generation)
        self._group = group

        def work() -> None:
            group.build(
                store=store,
                prefix=f"g{generation}",
                rank=rank,
                size=size,
                host="127.0.0.1",
                device=torch.device("cpu"),
                timeout_s=60.0,
                connect_s=connect_s,
            )
            self._exchange = group.exchange(shared=shared, timeout_s=60.0)
            assert isinstance(self._exchange, SharedExchange) == shared

        self._start(work)
        if answer:
            self.join()

    def collective(self, *, kind: str) -> None:
        exchange = self._exchange
        assert exchange is not None
        size = exchange.size

        def work() -> None:
            if kind == "all_reduce":
                exchange.all_reduce(torch.ones(200_000), label="dense_grad")
                return
            source = torch.ones(size * 50_000)
            splits = [50_000] * size
            exchange.all_to_all(
                torch.empty_like(source),
                source,
                output_splits=splits,
                input_splits=splits,
                label="dispatch",
            )

        self._start(work)

    def _start(self, work: Any) -> None:
        def run() -> None:
            try:
                work()
                self._outcome = "done"
            except Exception as problem:  # noqa: BLE001 - the outcome is what is asked for
                self._outcome = type(problem).__name__

        self._outcome = None
        self._thread = threading.Thread(target=run)
        self._thread.start()

    def join(self) -> None:
        assert self._thread is not None
        self._thread.join(30)
        self._pipe.send("stuck" if self._thread.is_alive() else self._outcome)

    def reach_gloo(self) -> None:
        """Answer once the thread has the store and is about to meet its peers."""
        assert self._group is not None
        give_up = time.monotonic() + 20
        while self._group._store is None and time.monotonic() < give_up:
            time.sleep(0.01)
        self._pipe.send("never got there" if self._group._store is None else "in gloo")

    def release(self) -> None:
        """Free the thread; answer (outcome, seconds it took)."""
        assert self._group is not None and self._thread is not None
        began = time.monotonic()
        self._group.release()
        self._thread.join(30)
        took = time.monotonic() - began
        self._pipe.send(("stuck" if self._thread.is_alive() else self._outcome, took))

    def close(self) -> None:
        assert self._group is not None
        self._exchange = None
        self._group.close()
        self._pipe.send("closed")

    def open_own_socket(self) -> None:
        """A connection of user code."""
        self._users.extend(socket.socketpair(socket.AF_UNIX))
        server = socket.create_server(("127.0.0.1", 0))
        client = socket.create_connection(server.getsockname())
        self._users += [client, server.accept()[0], server]
        self._pipe.send("open")

    def own_socket_works(self) -> None:
        client, served = self._users[2], self._users[3]
        try:
            client.sendall(b"x")
            self._pipe.send(served.recv(1) == b"x")
        except OSError:
            self._pipe.send(False)

    def count(self) -> None:
        """(file descriptors, threads) of this process."""
        fds = len(list(Path("/proc/self/fd").iterdir()))
        self._pipe.send((fds, len(list(Path(f"/proc/{os.getpid()}/task").iterdir()))))

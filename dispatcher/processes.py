"""Run a function in several gloo processes on this node, for tests and benchmarks.

The processes are forked from a server that has PyTorch loaded already, so four ranks start in about
a second. Function and arguments are pickled.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, TCPStore

from dispatcher.exchange import TorchExchange


def run_processes(
    body: Callable[..., Any],
    *,
    size: int,
    args: Sequence[Any] = (),
    threads: int = 1,
    timeout_s: float = 120.0,
    limit_s: float | None = None,
) -> list[Any]:
    """Call ``body(exchange, *args)`` in ``size`` processes and return the results by rank.

    Args:
        body: A function at the top level of its file.
        size: Number of ranks.
        args: Further arguments, picklable.
        threads: PyTorch threads of each process.
        timeout_s: Longest wait for a collective, in seconds.
        limit_s: Longest time until all ranks have returned, in seconds; None: ten times
            ``timeout_s``.

    Raises:
        RuntimeError: A rank failed, and the message holds its traceback; or a rank has not
            returned within ``limit_s``. All ranks are ended.
    """
    limit_s = 10 * timeout_s if limit_s is None else limit_s
    until_s = time.monotonic() + limit_s
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    spawner = multiprocessing.get_context("forkserver")
    spawner.set_forkserver_preload(["torch", "numpy", "dispatcher"])
    module = sys.modules[body.__module__]
    task = pickle.dumps((body.__qualname__, tuple(args)))
    ends: list[Connection] = []
    workers = []
    for rank in range(size):
        ours, theirs = spawner.Pipe()
        place = (rank, size, store.port, threads, timeout_s)
        home = (body.__module__, str(module.__file__))
        worker = spawner.Process(target=_work, args=(theirs, place, home, task), daemon=True)
        worker.start()
        theirs.close()
        ends.append(ours)
        workers.append(worker)
    try:
        return [_result(end, rank, until_s, limit_s) for rank, end in enumerate(ends)]
    finally:
        for worker in workers:
            worker.join(1.0)
            if worker.is_alive():
                worker.kill()
                worker.join()


def _result(end: Connection, rank: int, until_s: float, limit_s: float) -> Any:
    if not end.poll(max(0.0, until_s - time.monotonic())):
        raise RuntimeError(f"rank {rank} has not returned after {limit_s:g} s")
    try:
        failed, value = end.recv()
    except EOFError:
        raise RuntimeError(f"rank {rank} died without a word") from None
    if failed:
        raise RuntimeError(f"rank {rank} failed:\n{value}")
    return value


def _work(
    end: Connection,
    place: tuple[int, int, int, int, float],
    home: tuple[str, str],
    task: bytes,
) -> None:
    rank, size, port, threads, timeout_s = place
    torch.set_num_threads(threads)
    try:
        body, args = _unpacked(home, task)
        limit = timedelta(seconds=timeout_s)
        store = TCPStore("127.0.0.1", port, is_master=False, timeout=limit)
        group = ProcessGroupGloo(PrefixStore("loopback", store), rank, size, limit)
        exchange = TorchExchange(group)
        value = body(exchange, *args)
        exchange.all_reduce(torch.ones(1), label="digest")  # no rank exits early
        end.send((False, value))
    except BaseException:  # noqa: BLE001 - a process's edge: the parent raises it again
        end.send((True, traceback.format_exc()))


def _unpacked(home: tuple[str, str], task: bytes) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Import the function's file under its module name, and unpickle the arguments."""
    name, path = home
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"cannot load {path}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    qualname, args = pickle.loads(task)  # noqa: S301 - written by the parent process just now
    return getattr(sys.modules[name], qualname), args

"""The processes of a run that are Ray actors: who runs, and how each of them ended."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray

from lazarus.runtime.launch.launcher import OnExit


@dataclass(frozen=True, slots=True)
class _Running:
    actor: Any
    life: Any  # object reference that resolves when the process's work ends
    pid: int = 0  # of the controller, which runs on the driver's machine; 0: a worker


class RayProcesses:
    """Actors of ranks and of the controller, by name.

    Args:
        on_exit: Called when a process ends, unless ``closing`` is set.
        closing: Set when the run's processes are about to be ended.
    """

    def __init__(self, on_exit: OnExit, *, closing: threading.Event) -> None:
        self._on_exit, self._closing = on_exit, closing
        self._lock = threading.Lock()
        self._running: dict[str, _Running] = {}

    def add(self, name: str, actor: Any, life: Any, *, pid: int = 0) -> None:
        """Watch over a process that was started.

        Args:
            name: Name of the process.
            actor: The Ray actor.
            life: Object reference that resolves when the process's work ends.
            pid: Process id on this machine; 0: the process may be elsewhere.
        """
        with self._lock:
            self._running[name] = _Running(actor, life, pid)

    def watch(self) -> None:
        """Report the end of every process, until ``closing`` is set."""
        while not self._closing.is_set():
            with self._lock:
                lives = {running.life: name for name, running in self._running.items()}
            if not lives:
                self._closing.wait(0.05)
                continue
            done, _ = ray.wait(list(lives), num_returns=1, timeout=0.2, fetch_local=False)
            for life in done:
                self._ended(lives[life], life)

    def _ended(self, name: str, life: Any) -> None:
        with self._lock:
            running = self._running.pop(name, None)
        if running is None:
            return
        try:
            cause = f"actor ended with {ray.get(life)}"
        except ray.exceptions.RayTaskError as problem:
            own = problem.cause
            print(f"{name}: {problem}", file=sys.stderr, flush=True)
            cause = f"{type(own).__name__}: {own}".splitlines()[0]
        except ray.exceptions.RayError as problem:
            cause = f"ray: {type(problem).__name__}"
        ray.kill(running.actor)
        if not self._closing.is_set():
            self._on_exit(name, cause)

    def kill(self, name: str) -> None:
        """Kill a process; does nothing if there is none of this name."""
        with self._lock:
            running = self._running.get(name)
        if running is None:
            return
        if running.pid:  # ray.kill does not reach a process stopped by SIGSTOP
            with suppress(ProcessLookupError):
                os.kill(running.pid, signal.SIGKILL)
        ray.kill(running.actor)

    def wait(self, *, timeout_s: float) -> None:
        """Wait until all processes have ended, at most ``timeout_s`` seconds."""
        with self._lock:
            lives = [running.life for running in self._running.values()]
        if lives and timeout_s > 0:
            ray.wait(lives, num_returns=len(lives), timeout=timeout_s, fetch_local=False)

    def kill_all(self) -> None:
        """Kill whoever is left; to be called when nobody watches any more."""
        for running in self._running.values():
            ray.kill(running.actor)
        self._running.clear()

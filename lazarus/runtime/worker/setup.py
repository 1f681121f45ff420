"""Process-wide settings of a worker, and its crash and stack reports."""

from __future__ import annotations

import faulthandler
import io
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from dispatcher.memory import keep_freed_memory
from lazarus.runtime.fence.whereabouts import crash_path


def prepare_process(threads: int) -> None:
    """Set thread count and determinism, and ignore Ctrl-C. SIGUSR1 prints all stacks to stderr.

    Args:
        threads: Threads of one torch operation.
    """
    torch.set_num_threads(threads)
    with suppress(RuntimeError):
        torch.set_num_interop_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    keep_freed_memory()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(OSError, ValueError, io.UnsupportedOperation):
        faulthandler.register(signal.SIGUSR1, chain=False)  # stacks of all threads to stderr


@contextmanager
def crashes_noted(folder: Path, local_rank: int) -> Iterator[None]:
    """Context in which a crash of this process writes its stack into the node's folder."""
    with crash_path(folder, local_rank).open("wb", buffering=0) as file:
        faulthandler.enable(file, all_threads=False)
        try:
            yield
        finally:
            faulthandler.disable()


def stacks() -> str:
    """Python stacks of all threads of this process."""
    frames = sys._current_frames()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    out = io.StringIO()
    for ident, frame in frames.items():
        out.write(f"--- {names.get(ident, ident)}\n")
        out.write("".join(traceback.format_stack(frame)))
    return out.getvalue()

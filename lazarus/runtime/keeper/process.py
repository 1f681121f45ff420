"""A node's keeper: the process that holds snapshots in host memory and writes them to storage.

It outlives the trainers of its node, never its owner: it exits when the pipe to the owner closes,
when its parent is gone, or when it is told to (a fenced node). Its memory has no name in any
filesystem, so whatever dies in whatever order, nothing stays behind. It imports no torch.

Started by ``start_keeper``; run as ``python -m lazarus.runtime.keeper.process`` with its settings
as one JSON line on standard input, which also carries the secret (never on the command line).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lazarus.checkpoint.errors import KeeperUnavailableError
from lazarus.checkpoint.files.storage import Probe, no_probe
from lazarus.runtime.rpc.channel import endpoint
from lazarus.runtime.rpc.credentials import Credentials

_PARENT_CHECK_S = 0.5
_STARTS = 4  # times longer than it may be silent later: a start reads a whole Python from disk


@dataclass(frozen=True, kw_only=True, slots=True)
class KeeperConfig:
    """Settings of one keeper.

    ``silent_s`` is for its owner: how long it may leave questions unanswered.
    ``kill_at`` is for crash tests: ``LABEL:N`` kills the process with SIGKILL at the N-th event of
    that label while it persists.
    """

    job: str
    credentials: Credentials
    bind: str = "127.0.0.1:0"
    limit_bytes: int = 1 << 40
    silent_s: float = 30.0
    kill_at: str = ""


@dataclass(frozen=True, slots=True)
class KeeperProcess:
    """A running keeper as its owner sees it. Closing ``process.stdin`` ends it."""

    address: str
    process: subprocess.Popen[str]

    def stop(self, *, timeout_s: float = 5.0) -> None:
        """End it and reap it."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


def start_keeper(config: KeeperConfig, *, host: str = "") -> KeeperProcess:
    """Start a keeper as a child of this process and wait until it listens.

    Args:
        config: Its settings; with port 0 in ``bind`` any free port.
        host: Name under which other nodes reach it, if not that of ``bind``.

    Raises:
        KeeperUnavailableError: It did not start.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "lazarus.runtime.keeper.process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    hung = threading.Timer(_STARTS * config.silent_s, process.kill)
    hung.daemon = True
    hung.start()
    try:
        process.stdin.write(json.dumps(asdict(config)) + "\n")
        process.stdin.flush()
        port = int(json.loads(process.stdout.readline())["port"])
    except (OSError, ValueError, KeyError) as error:
        process.kill()
        process.wait()
        raise KeeperUnavailableError("the node's keeper did not start; see its stderr") from error
    finally:
        hung.cancel()
    address = endpoint(host, port) if host else f"{config.bind.rpartition(':')[0]}:{port}"
    return KeeperProcess(address=address, process=process)


def kill_probe(spec: str, *, kill: Callable[[], None]) -> Probe:
    """A probe that kills at the N-th event of a label (``LABEL:N``); empty: none."""
    if not spec:
        return no_probe
    wanted, _, number = spec.rpartition(":")
    left = [int(number)]

    def probe(label: str) -> None:
        if label == wanted:
            left[0] -= 1
            if left[0] == 0:
                kill()

    return probe


def kill_self() -> None:
    """SIGKILL to this very process."""
    os.kill(os.getpid(), signal.SIGKILL)


def _parse(line: str) -> KeeperConfig:
    data: Mapping[str, Any] = json.loads(line)
    return KeeperConfig(**{**data, "credentials": Credentials(**data["credentials"])})


def main() -> int:
    """Serve until the owner is gone or an order says leave."""
    from lazarus.basics.threads import say_so, spawn
    from lazarus.runtime.keeper.service import KeeperService, serve

    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver; the pipe tells us
    config = _parse(sys.stdin.readline())
    stop = threading.Event()
    probe = kill_probe(config.kill_at, kill=kill_self)

    def thread_died(name: str, problem: BaseException) -> None:
        say_so(name, problem)
        os._exit(1)  # what was in its hands is lost: the owner starts another keeper

    service = KeeperService(config, stop=stop, probe=probe, on_death=thread_died)
    server, port = serve(service, config)
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    print(json.dumps({"port": port}), flush=True)

    def watch_owner() -> None:
        while sys.stdin.readline():
            continue
        stop.set()

    spawn("owner", watch_owner, on_death=thread_died)
    while not stop.wait(_PARENT_CHECK_S) and os.getppid() == parent:
        continue
    server.stop(grace=0.2).wait(0.5)
    # Threads may sit in a write to storage; a checkpoint is whole or absent whenever we go.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())

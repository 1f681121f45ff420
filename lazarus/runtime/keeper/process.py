"""A node's keeper: the process that holds snapshots in host memory and writes them to storage.

The keeper outlives the ranks of its node, but not the process that started it (its owner): it
exits when the pipe to the owner closes, when its parent is gone, or on an order to leave. Its
memory has no name in any filesystem, so nothing stays behind in whatever order processes die. The
keeper imports no torch.

``start_keeper`` runs ``python -m lazarus.runtime.keeper.process`` and writes the settings,
including the job's secret, as one JSON line to its standard input.
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
_STARTS = 4  # a start may take this many times ``silent_s``: it loads Python from disk


@dataclass(frozen=True, kw_only=True, slots=True)
class KeeperConfig:
    """Settings of one keeper.

    Attributes:
        job: Id of the run; messages of other jobs are refused.
        credentials: The job's credentials.
        bind: "host:port" to listen on; port 0: any free port.
        limit_bytes: Most host memory for snapshots; never more than the machine has.
        silent_s: Time without an answer after which the owner takes the keeper for hung.
        kill_at: For crash tests: "LABEL:N" kills the process with SIGKILL at the N-th event of that
            label during a persist.
    """

    job: str
    credentials: Credentials
    bind: str = "127.0.0.1:0"
    limit_bytes: int = 1 << 40
    silent_s: float
    kill_at: str = ""


@dataclass(frozen=True, slots=True)
class KeeperProcess:
    """A running keeper, for its owner. Closing ``process.stdin`` ends the keeper."""

    address: str
    process: subprocess.Popen[str]

    def stop(self, *, timeout_s: float = 5.0) -> None:
        """End the keeper and wait for it; kill it after ``timeout_s``."""
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
        config: The keeper's settings.
        host: Address at which other nodes reach the keeper; empty: the host of ``config.bind``.

    Raises:
        KeeperUnavailableError: The keeper did not start.
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
    """Create a probe that calls ``kill`` at the N-th event of a label.

    Args:
        spec: "LABEL:N"; empty: a probe that does nothing.
        kill: Ends the process.
    """
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
    """Send SIGKILL to this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def _parse(line: str) -> KeeperConfig:
    data: Mapping[str, Any] = json.loads(line)
    return KeeperConfig(**{**data, "credentials": Credentials(**data["credentials"])})


def main() -> int:
    """Serve until the owner is gone or an order to leave arrives. Does not return."""
    from lazarus.basics.threads import say_so, spawn
    from lazarus.runtime.keeper.service import KeeperService, serve

    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver, which closes the pipe
    config = _parse(sys.stdin.readline())
    stop = threading.Event()
    probe = kill_probe(config.kill_at, kill=kill_self)

    def thread_died(name: str, problem: BaseException) -> None:
        say_so(name, problem)
        os._exit(1)  # the state may be inconsistent: the owner starts another keeper

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
    # Threads may be writing to storage; a checkpoint is whole or absent at whatever time we exit.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())

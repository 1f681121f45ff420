"""The real peers of goodput_under_faults.py: DeepSpeed-MoE under torchrun, and torchft.

Each runs in an interpreter of its own that has it. What they commit is in a log of JSON lines.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PACKAGES = {"d": "deepspeed", "e": "torchft"}


def missing(system: str, python: str) -> str:
    """Why a peer cannot be measured with this interpreter; empty if it can."""
    package = PACKAGES.get(system)
    if package is None:
        return ""
    look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec('{package}') is None)"
    if subprocess.run([python, "-c", look], check=False).returncode:
        return f"{package} is not installed for {python} (extra: bench)"
    return ""


@dataclass
class Group:
    """Processes that end together, and the pids of the nodes among them."""

    processes: list[subprocess.Popen[bytes]]
    nodes: Callable[[], list[int]]
    killed: set[int] = field(default_factory=set)

    @property
    def over(self) -> bool:
        """Whether the system's main process has ended."""
        return self.processes[0].poll() is not None

    def tell(self, word: str) -> None:
        """``kill`` ends the lowest node that lives."""
        live = [pid for pid in self.nodes() if pid not in self.killed]
        if word == "kill" and live:
            self.killed.add(live[0])
            os.kill(live[0], signal.SIGKILL)

    def end(self) -> None:
        """End everything, children included."""
        end_all(self.processes)


def end_all(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Kill processes with their children, and wait for them."""
    for process in processes:
        for pid in (*children_of(process.pid), process.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
    for process in processes:
        process.wait()


def children_of(pid: int) -> list[int]:
    """All descendants of a process, deepest first."""
    try:
        own = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [child for word in own for child in (*children_of(int(word)), int(word))]


def deepspeed(python: str, folder: Path, *, nodes: int, spec: Mapping[str, Any]) -> Group:
    """One life of DeepSpeed-MoE; a killed rank ends it, as torchrun ends all others."""
    folder.mkdir(exist_ok=True)
    script = "deepspeed_rank.py"
    command = [python, "-m", "torch.distributed.run", "--nproc-per-node", str(nodes),
               "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--max-restarts", "0",
               str(HERE / "peers" / script), str(folder), json.dumps(spec)]  # fmt: skip
    more = {
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
        "DS_ACCELERATOR": "cpu",
    }
    agent = _started(command, folder, more)
    return Group([agent], lambda: sorted(p for p in children_of(agent.pid) if _runs(p, script)))


def torchft(python: str, folder: Path, *, nodes: int, spec: Mapping[str, Any]) -> Group:
    """All replica groups and their lighthouse, tuned: 1 s heartbeat, 0.5 s join, 10 s time-out."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    lighthouse = [str(Path(python).parent / "torchft_lighthouse"), "--bind", f"127.0.0.1:{port}",
                  "--min_replicas", "1", "--join_timeout_ms", "500",
                  "--heartbeat_timeout_ms", "1000"]  # fmt: skip
    more = {"TORCHFT_LIGHTHOUSE": f"http://127.0.0.1:{port}", "RUST_LOG": "error"}
    processes = [_started(lighthouse, folder, more)]
    for replica in range(nodes):
        words = [str(replica), str(nodes), str(folder / "log"), "10", json.dumps(spec)]
        script = str(HERE / "peers" / "torchft_goodput.py")
        processes.append(_started([python, script, *words], folder, more))
    ranks = processes[1:]
    return Group(processes, lambda: [p.pid for p in ranks if p.poll() is None])


def _started(
    command: Sequence[str], folder: Path, more: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    environment = {**os.environ, **more, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    with (folder / "output").open("a") as out:
        return subprocess.Popen(list(command), env=environment, stdout=out, stderr=out)


def _runs(pid: int, script: str) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(word.decode(errors="replace").endswith(script) for word in words)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines so far; a last line that is still being written is left out."""
    path = folder / "log"
    if not path.exists():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def first_commit(folder: Path, running: Group, *, limit_s: float = 300.0) -> float:
    """When the first step was committed.

    Raises:
        SystemExit: Never; with the end of what the processes said.
    """
    started = time.monotonic()
    while time.monotonic() - started < limit_s and not running.over:
        for line in read_log(folder):
            if "step" in line:
                return float(line["t"])
        time.sleep(0.1)
    running.end()
    said = (folder / "output").read_text(errors="replace")[-6000:]
    raise SystemExit(f"no step was committed within {limit_s} s:\n{said}")


if __name__ == "__main__":
    sys.exit("run goodput_under_faults.py")

"""One kill of a rank under torchft or torchrun, and the way back; for ``recovery_time.py``."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from goodput_peers import end_all

PEERS = Path(__file__).resolve().parent / "peers"


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One loss and the way back, in seconds."""

    system: str
    where: str
    back_s: float
    step_s: float  # of the same system, median of undisturbed steps
    num_ranks: int  # before the kill
    timeline: dict[str, float]


def lines_of(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def recovered(path: Path, *, name: str, where: str, ranks: int) -> Kill | None:
    """From the victim's last word to the first later commit of the killed step or a newer one."""
    lines = lines_of(path)
    killed = next((e for e in lines if e.get("killed")), None)
    if killed is None:
        return None
    done = [e for e in lines if "step" in e and not e.get("killed")]
    after = [e["t"] for e in done if e["t"] > killed["t"] and e["step"] >= killed["step"]]
    if not after:
        return None
    first: dict[int, float] = {}
    for line in done:
        if line["t"] <= killed["t"]:
            first.setdefault(line["step"], line["t"])
    times = [first[s] for s in sorted(first)][2:]
    spans = [b - a for a, b in pairwise(times)]
    return Kill(
        system=name,
        where=where,
        back_s=min(after) - killed["t"],
        step_s=statistics.median(spans) if spans else float("nan"),
        num_ranks=ranks,
        timeline={},
    )


def torchft(
    python: Path, *, tuned: bool, where: str, ranks: int, folder: Path, limit_s: float
) -> Kill | None:
    """One kill of the last of ``ranks`` replica groups."""
    folder.mkdir()
    port = 20000 + os.getpid() % 10000
    lighthouse = [str(python.parent / "torchft_lighthouse"), "--bind", f"127.0.0.1:{port}"]
    lighthouse += ["--min_replicas", "1"]
    if tuned:
        lighthouse += ["--join_timeout_ms", "500", "--heartbeat_timeout_ms", "1000"]
    environment = os.environ | {
        "TORCHFT_LIGHTHOUSE": f"http://127.0.0.1:{port}",
        "OMP_NUM_THREADS": "1",
        "RUST_LOG": "error",
    }
    log = folder / "log"
    kill_step = 12
    output = (folder / "output").open("w")
    with output:
        processes = [subprocess.Popen(lighthouse, env=environment, stdout=output, stderr=output)]
        for rank in range(ranks):
            step = kill_step if rank == ranks - 1 else -1
            words = [str(rank), str(ranks), str(log), "3000", str(step)]
            words.append(where if step >= 0 else "never")
            words.append("10" if tuned else "60")
            command = [str(python), str(PEERS / "torchft_rank.py"), *words]
            processes.append(
                subprocess.Popen(command, env=environment, stdout=output, stderr=output)
            )
    name = f"torchft {'tuned' if tuned else 'default'}"
    found = follow(
        lambda: recovered(log, name=name, where=where, ranks=ranks), processes, limit_s=limit_s
    )
    return found


def torchrun(*, where: str, ranks: int, folder: Path, limit_s: float) -> Kill | None:
    """One kill of the last rank; everybody restarts from the newest checkpoint."""
    folder.mkdir()
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--max-restarts", "3"]
    launch += [str(PEERS / "torchrun_rank.py"), str(folder), "60", "12", where, "5"]
    environment = os.environ | {
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "OMP_NUM_THREADS": "1",
    }
    output = (folder / "output").open("w")
    with output:
        process = subprocess.Popen(
            launch, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    return follow(
        lambda: recovered(folder / "log", name="torchrun + checkpoint", where=where, ranks=ranks),
        [process],
        limit_s=limit_s,
    )


def follow(
    look: Any, processes: Sequence[subprocess.Popen[bytes]], *, limit_s: float
) -> Kill | None:
    """Wait for the answer, then end what was started, with its children."""
    deadline = time.monotonic() + limit_s
    try:
        while time.monotonic() < deadline:
            found: Kill | None = look()
            if found is not None:
                return found
            time.sleep(0.05)
        return None
    finally:
        end_all(processes)

"""How long does a controller that died need to listen again, and how does that grow with the run?

    python benchmarks/controller_restart.py [--quick] [--steps 1000 10000 ...] [--json FILE]

One run's journal and record grow through the product's own ``note``, ``fold`` and record, with
commits of the real size (58 MoE layers x 256 experts on 1,024 ranks: 246 KB a vector). At every
number of steps the controller is opened several times, each in a process of its own: seconds from
"the process has its imports" to "the port answers", its memory, and the bytes on disk. The baseline
of the same run is what a restart did before: replaying every commit, measured over a thousand.

At the last number of steps a real controller is ended with SIGKILL and started again by the
launcher of the product: seconds from the signal until the port accepts a connection, start of the
process and imports included; once from the warm fork server of local runs, once from a bare one, as
on a cluster, where the process imports everything itself.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import queue
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from process_figures import cpu_s, memory_mb, private_mb

from lazarus.control.cluster.state import Control, ControlConfig
from lazarus.control.ports import Publish
from lazarus.control.restart.replay import blank_state, replayed
from lazarus.control.vector import VectorLayout
from lazarus.record.journal_reader import ARCHIVE, appended, numbers_in
from lazarus.runtime.controller.journal import archived_line
from lazarus.runtime.controller.shell import Controller, open_controller
from lazarus.runtime.launch.launcher import ProcessLauncher
from lazarus.runtime.rpc.credentials import Credentials
from lazarus.runtime.spec import ControllerSpec
from placement import PlacementRequest, plan

LAYERS, EXPERTS, NODES, RANKS_PER_NODE = 58, 256, 128, 8
BATCH = 8  # commits of one entry
RESTARTS = 3  # at every number of steps


def spec_of(folder: Path, *, layers: int, experts: int, nodes: int) -> ControllerSpec:
    """A run of that size whose controller listens on this machine."""
    config = ControlConfig(steps=10**9, nodes=nodes, ranks_per_node=RANKS_PER_NODE)
    return ControllerSpec(
        host="127.0.0.1",
        port=0,
        credentials=Credentials(secret="bench"),
        run_dir=folder,
        config=config,
    )


def first_entries(*, layers: int, experts: int, nodes: int) -> Iterator[dict[str, Any]]:
    """What a run journals until its first step."""
    for node in range(nodes):
        yield {"kind": "serial", "term": 1, "node": node, "key": f"node-{node}"}
    yield {"kind": "claim", "term": 1, "generation": 1, "members": list(range(nodes))}
    load = np.arange(1, experts + 1, dtype=np.float64) ** -0.6
    request = PlacementRequest(
        load=np.stack([np.roll(load, layer) for layer in range(layers)]),
        num_nodes=nodes,
        slots_per_node=RANKS_PER_NODE,
        ranks_per_node=RANKS_PER_NODE,
    )
    seats = [f"node-{n}.{r}" for n in range(nodes) for r in range(RANKS_PER_NODE)]
    yield {
        "kind": "resume",
        "term": 1,
        "generation": 1,
        "step": 0,
        "nodes": list(range(nodes)),
        "seats": seats,
        "seat_nodes": [rank // RANKS_PER_NODE for rank in range(len(seats))],
        "speeds": [],
        "plan": plan(request).to_dict(),
        "shape": [layers, experts],
        "record_bytes": [1 << 30, 1 << 26],
        "restores": [],
        "rollback": False,
        "adapted": [],
        "top_k": 8,
        "num_samples": 0,
    }


class Commits:
    """Vectors as the ranks of such a run decide them; the counts differ from step to step."""

    def __init__(self, *, layers: int, experts: int, world: int) -> None:
        self._layout = VectorLayout(world_size=world, num_layers=layers, num_experts=experts)
        self._rng = np.random.default_rng(0)
        self._lanes = self._rng.random(self._layout.num_lanes)

    def of_step(self, step: int) -> dict[str, Any]:
        """One commit as it is journaled."""
        world, lanes = self._layout.world_size, self._lanes
        lanes[:5] = (world, world, world * step, world * 4, world * 4 * 4096)
        counts = lanes[self._layout.counts]
        counts[:] = np.roll(counts, 1)
        packed = base64.b64encode(lanes.astype("<f8").tobytes()).decode()
        return {"generation": 1, "step": step, "lanes": packed, "wall_s": 1.0, "at_s": float(step)}


def grow(controller: Controller, commits: Commits, *, first: int, last: int) -> None:
    """Journal and record the steps from ``first`` to ``last``, as the controller's loop does."""
    for start in range(first, last + 1, BATCH):
        batch = [commits.of_step(step) for step in range(start, min(last, start + BATCH - 1) + 1)]
        controller._chronicle.note({"kind": "commits", "term": 1, "commits": batch})
        for commit in batch:
            say(controller, commit["step"])
        controller._chronicle.tidy()


def hurry(controller: Controller, *, first: int, last: int) -> None:
    """Archive and record as if these steps had been journaled and folded; no vector is written."""
    journal, folding = controller._chronicle._journal, controller._chronicle._folding
    number = journal._next
    with appended(journal._folder / ARCHIVE) as out:
        for start in range(first, last + 1, BATCH):
            steps = range(start, min(last, start + BATCH - 1) + 1)
            commits = [
                {"generation": 1, "step": step, "wall_s": 1.0, "at_s": float(step)}
                for step in steps
            ]
            out.write(archived_line(number, {"kind": "commits", "term": 1, "commits": commits}))
            number += 1
            for step in steps:
                say(controller, step)
    journal._archived, journal._next = number - 1, number
    told = folding._told
    folding._told = replace(told, state=replace(told.state, step=last))
    controller._chronicle.fold()


def say(controller: Controller, step: int) -> None:
    """The record's line of a commit."""
    fields = {"loss": 2.0, "tokens": 4096 * 4096, "num_nodes": NODES, "wall_s": 1.0}
    fields = {"generation": 1, "step": step, **fields}
    controller._publish(Publish(t=float(step), event="step_committed", fields=fields))
    controller._streams._for_driver.clear()  # nobody listens


def restart(spec: ControllerSpec) -> dict[str, float]:
    """Open the controller in this process, as after its death."""
    before_mb, began = memory_mb("VmRSS"), time.perf_counter()
    controller = open_controller(spec)
    controller._server.start()
    listening_s = time.perf_counter() - began
    step = controller._state.step
    return {
        "step": step,
        "listening_s": listening_s,
        "rss_mb": memory_mb("VmRSS"),
        "peak_mb": memory_mb("VmHWM"),
        "imports_mb": before_mb,
    }


def begin(controller: Controller, **size: int) -> None:
    """What a run journals and says until its first step."""
    for entry in first_entries(**size):
        controller._chronicle.note(entry)
    ranks = size["nodes"] * RANKS_PER_NODE
    fields = {"generation": 1, "num_nodes": size["nodes"], "world_size": ranks, "schema": 1}
    controller._publish(Publish(t=0.0, event="run_started", fields=fields))
    controller._chronicle.fold()


def in_a_process(work: str, folder: Path, *numbers: int) -> dict[str, float]:
    """Run ``restart``, ``grow`` or ``from_the_kill`` in a process with a fork server of its own."""
    command = [sys.executable, __file__, "--process", work, str(folder), *map(str, numbers)]
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(told.stdout.splitlines()[-1]))


def process(work: str, folder: Path, *numbers: int) -> None:
    """The other side of ``in_a_process``; ends as at a death: nothing is closed."""
    layers, experts, nodes, *span = numbers
    size = {"layers": layers, "experts": experts, "nodes": nodes}
    spec = spec_of(folder, **size)
    if work == "restart":
        print(json.dumps(restart(spec)), flush=True)
        os._exit(0)
    if work in ("warm", "bare"):
        print(json.dumps(from_the_kill(spec, is_warm=work == "warm")), flush=True)
        sys.exit()
    controller = open_controller(spec)
    first, last, whole = span
    if first == 1:
        begin(controller, **size)
    if whole < last - first:
        controller._chronicle.fold()
        hurry(controller, first=first, last=last - whole)
        first = last - whole + 1
    commits = Commits(layers=layers, experts=experts, world=nodes * RANKS_PER_NODE)
    began = time.perf_counter()
    grow(controller, commits, first=first, last=last)
    grown_s = time.perf_counter() - began
    print(json.dumps({"grown_s": grown_s, "rss_mb": memory_mb("VmRSS")}), flush=True)
    os._exit(0)


def from_the_kill(spec: ControllerSpec, *, is_warm: bool) -> dict[str, float]:
    """End a real controller with SIGKILL, and let the launcher start the next one."""
    gone: queue.SimpleQueue[str] = queue.SimpleQueue()
    launcher = ProcessLauncher(lambda name, cause: gone.put(cause), is_warm=is_warm)
    took, cpu, at_once, private, later = [], [], [], [], []
    try:
        spec = replace(spec, port=launcher.start_controller(spec, timeout_s=600))
        answers(spec)
        for _ in range(RESTARTS):
            pid = launcher.pid_of("controller")
            assert pid is not None
            began = time.perf_counter()
            os.kill(pid, signal.SIGKILL)
            assert gone.get(timeout=60) == "SIGKILL"
            launcher.start_controller(spec, timeout_s=600)
            answers(spec)
            took.append(time.perf_counter() - began)
            pid = launcher.pid_of("controller")
            assert pid is not None
            cpu.append(cpu_s(pid))
            at_once.append(memory_mb("VmRSS", pid))
            private.append(private_mb(pid))
            later.append(memory_when_ready_mb(pid))
    finally:
        launcher.close(grace_s=0.0)
    return {
        "from_kill_s": statistics.median(took),
        "slowest_s": max(took),
        "cpu_s": statistics.median(cpu),
        "rss_mb": max(at_once),
        "private_mb": max(private),
        "rss_ready_mb": max(later),
    }


def answers(spec: ControllerSpec) -> None:
    """Returns when the controller's port accepts a connection."""
    while True:
        with suppress(ConnectionRefusedError):
            socket.create_connection((spec.host, spec.port), timeout=60).close()
            return


def memory_when_ready_mb(pid: int) -> float:
    """Resident memory once what the next groups and plan need is loaded too."""
    until = time.monotonic() + 120
    while b"_lsap" not in Path(f"/proc/{pid}/maps").read_bytes():
        assert time.monotonic() < until, "the controller never loaded what a plan needs"
        time.sleep(0.1)
    return memory_mb("VmRSS", pid)


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def replay_ms(state: Control, commits: Commits, *, steps: int) -> float:
    """Milliseconds a step of reading entries back and replaying them, one commit an entry."""
    texts = [
        json.dumps({"kind": "commits", "commits": [commits.of_step(step)]})
        for step in range(1, steps + 1)
    ]
    began = time.perf_counter()
    for text in texts:
        state = replayed(state, json.loads(text))
    return (time.perf_counter() - began) * 1e3 / steps


def measure(
    folder: Path, steps: list[int], shape: tuple[int, int, int], *, whole: int
) -> dict[str, Any]:
    """The growth table; ``whole`` steps before each row are journaled with their vectors."""
    layers, experts, nodes = shape
    size = {"layers": layers, "experts": experts, "nodes": nodes}
    spec = spec_of(folder, **size)
    rows, done = [], 0
    for last in steps:
        grown = in_a_process("grow", folder, *shape, done + 1, last, whole)
        tries = [in_a_process("restart", folder, *shape) for _ in range(RESTARTS)]
        assert all(t["step"] == last for t in tries), tries
        rows.append(
            {
                "steps": last,
                "listening_s": statistics.median(t["listening_s"] for t in tries),
                "slowest_s": max(t["listening_s"] for t in tries),
                "rss_mb": max(t["rss_mb"] for t in tries),
                "peak_mb": max(t["peak_mb"] for t in tries),
                "imports_mb": tries[0]["imports_mb"],
                "journal_bytes": bytes_in(folder / spec.journal),
                "journal_entries": len(numbers_in(folder / spec.journal)),
                "record_bytes": bytes_in(folder) - bytes_in(folder / spec.journal),
                "writer_mb": grown["rss_mb"],
                "ms_a_step": grown["grown_s"] * 1e3 / min(whole, last - done),
            }
        )
        show(rows[-1])
        done = last
    state = blank_state(spec.config)
    for entry in first_entries(**size):
        state = replayed(state, entry)
    commits = Commits(layers=layers, experts=experts, world=nodes * RANKS_PER_NODE)
    return {
        "rows": rows,
        "whole": whole,
        "from_the_kill": {kind: in_a_process(kind, folder, *shape) for kind in ("warm", "bare")},
        "replay_ms_a_step": replay_ms(state, commits, steps=min(done, 200)),
    }


def show(row: dict[str, Any]) -> None:
    print(
        f"| {row['steps']:,} | {row['listening_s']:.2f} s (slowest {row['slowest_s']:.2f}) "
        f"| {row['rss_mb']:.0f} MB (peak {row['peak_mb']:.0f}, imports {row['imports_mb']:.0f}) "
        f"| {row['journal_bytes'] / 1e6:,.1f} MB, {row['journal_entries']} entries "
        f"| {row['record_bytes'] / 1e6:,.1f} MB "
        f"| {row['ms_a_step']:.2f} ms a step, {row['writer_mb']:.0f} MB |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small model, up to 10,000 steps")
    parser.add_argument("--steps", type=int, nargs="+", help="where to restart")
    parser.add_argument(
        "--whole",
        type=int,
        default=10**9,
        metavar="N",
        help="steps before each row that are journaled whole; earlier ones go straight to archive "
        "and record, where they end anyway (330 GB of vectors for a million steps)",
    )
    parser.add_argument("--folder", type=Path, help="where the run lies; default: a new folder")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--process", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.process:
        work, place, *numbers = args.process
        process(work, Path(place), *map(int, numbers))
    shape = (4, 16, 4) if args.quick else (LAYERS, EXPERTS, NODES)
    steps = args.steps or ([10**3, 10**4] if args.quick else [10**3, 10**4, 10**5, 10**6])
    folder = Path(tempfile.mkdtemp(prefix="restart-", dir=args.folder))
    print("| steps | listening again | memory | journal | record | written in |")
    print("|---|---|---|---|---|---|", flush=True)
    try:
        found = measure(folder, sorted(steps), shape, whole=args.whole)
    finally:
        shutil.rmtree(folder)
    for kind, told in found["from_the_kill"].items():
        print(
            f"from SIGKILL to listening, {kind} fork server: {told['from_kill_s']:.2f} s "
            f"(slowest {told['slowest_s']:.2f}; {told['cpu_s']:.2f} s of CPU), "
            f"{told['rss_mb']:.0f} MB resident ({told['private_mb']:.0f} its own), "
            f"{told['rss_ready_mb']:.0f} MB with torch and SciPy"
        )
    if args.whole < max(steps):
        print(
            f"limit: only the last {args.whole:,} steps before each row were journaled with their "
            "vectors; earlier ones went straight to archive and record, which a restart does not "
            "read as a whole"
        )
    per_step = found["replay_ms_a_step"]
    print(f"baseline, every commit replayed: {per_step:.2f} ms a step, ", end="")
    print(f"{per_step * max(steps) / 1e3:,.0f} s for {max(steps):,}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Draw the controller's states from the machine itself.

    python docs/generate_state_diagram.py            # rewrites docs/control_states.md
    python docs/generate_state_diagram.py --check    # exit code 1 if the page is not current

Seeded random runs of the simulated cluster (tests/support) feed ``decide``; every change of phase
that happens is an arrow, labelled with the events that caused it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "control_states.md"
SEEDS = range(160)

for folder in (ROOT / "tests" / "support", ROOT):
    sys.path.insert(0, str(folder))

import control_play  # noqa: E402
import control_world  # noqa: E402

from lazarus.control import machine  # noqa: E402
from lazarus.control.messages import Body, StopRun  # noqa: E402
from lazarus.control.ports import DriverSaid, WorkerSaid  # noqa: E402
from lazarus.control.state import Control, Phase  # noqa: E402

MEANING = {
    Phase.GATHERING: "waits for the first nodes",
    Phase.RUNNING: "the newest generation trains",
    Phase.FENCING: "a generation is claimed; reports are awaited",
    Phase.ALIGNING: "the verdict is given; applies are awaited",
    Phase.PREPARING: "the plan is sent; groups and transfers are awaited",
    Phase.RECONNECTING: "the controller came back; workers are awaited",
    Phase.HOLDING: "too few nodes; the state is kept in memory",
    Phase.FINALIZING: "last digest and checkpoint",
    Phase.ENDED: "the record is closed",
}

Arrow = tuple[Phase, Phase]


def arrows(seeds: Iterable[int] = SEEDS) -> dict[Arrow, set[str]]:
    """Every change of phase in the seeded runs, and the events that caused it."""
    found: dict[Arrow, set[str]] = {}
    original = machine.decide

    def watching(state: Control, event: Any) -> Any:
        after, commands = original(state, event)
        if after.phase is not state.phase:
            found.setdefault((state.phase, after.phase), set()).add(name_of(event))
        return after, commands

    machine.decide = watching
    try:
        for seed in seeds:
            dense = {"num_faults": 5, "turns": 250, "min_nodes": 1 + seed % 3}
            stopped_early(control_play.play(seed, **dense), seed)
    finally:
        machine.decide = original
    return found


def stopped_early(world: control_world.World, seed: int) -> None:
    """A new run of the same size that the user stops at some point."""
    other = control_world.World(world.rng, world.config)
    for _ in range(20 + 4 * seed):
        other.turn()
    stop = DriverSaid(body=StopRun(now=seed % 2 == 0, reason="user"), at_s=other.now)
    other.feed(stop)


def name_of(event: Any) -> str:
    if isinstance(event, WorkerSaid | DriverSaid):
        body: Body = event.body
        return type(body).__name__
    return type(event).__name__


def page(found: dict[Arrow, set[str]]) -> str:
    order = list(Phase)
    lines = [
        "# States of the controller",
        "",
        "Made by `python docs/generate_state_diagram.py` from the machine itself; do not edit.",
        "Each arrow was seen in seeded runs of the simulated cluster and names the events that",
        "caused it. `decide` has an answer to every event in every state; what is not an arrow",
        "changes counters, or nothing.",
        "",
        "```mermaid",
        "stateDiagram-v2",
        f"    [*] --> {Phase.GATHERING.value}",
        f"    [*] --> {Phase.RECONNECTING.value}",
    ]
    pairs = sorted(found, key=lambda pair: (order.index(pair[0]), order.index(pair[1])))
    for before, after in pairs:
        lines.append(f"    {before.value} --> {after.value}")
    lines += [f"    {Phase.RECONNECTING.value}: reconnecting (after a restart)"]
    lines += [f"    {Phase.ENDED.value} --> [*]", "```", ""]
    lines += ["| State | Meaning |", "|---|---|"]
    lines += [f"| {phase.value} | {MEANING[phase]} |" for phase in order]
    lines += ["", "| From | To | On |", "|---|---|---|"]
    lines += [f"| {a.value} | {b.value} | {on(found[(a, b)])} |" for a, b in pairs]
    return "\n".join(lines) + "\n"


def on(events: Iterable[str]) -> str:
    return ", ".join(sorted(events))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    args = parser.parse_args()
    text = page(arrows())
    if args.check:
        return int(not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

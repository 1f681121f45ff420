"""Draw the controller's states from the machine itself.

    python docs/generate_state_diagram.py            # rewrites docs/control_states.md and .svg
    python docs/generate_state_diagram.py --check    # exit code 1 if they are not current

Seeded random runs of the simulated cluster (tests/support) feed ``decide``. What it answers to
each event in each state is a row of the table; every change of state is an arrow of the picture.
In addition, each kind of state on the way gets an event of every kind once; the answers to these go
into the table, and the runs go on without them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "control_states.md"
PICTURE = ROOT / "docs" / "control_states.svg"
SEEDS = range(160)

for folder in (ROOT / "tests" / "support", ROOT):
    sys.path.insert(0, str(folder))

import control_play  # noqa: E402
import control_probes  # noqa: E402
import control_world  # noqa: E402

from lazarus.control import machine  # noqa: E402
from lazarus.control.cluster.state import Control, Phase  # noqa: E402
from lazarus.control.messages import Body, StopRun  # noqa: E402
from lazarus.control.ports import (  # noqa: E402
    Command,
    DriverSaid,
    Journal,
    Publish,
    Tell,
    TellDriver,
    WorkerSaid,
)

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
Row = tuple[Phase, str, Phase]  # state, event, next state
Table = dict[Row, set[str]]  # with the commands that were seen


def observed(seeds: Iterable[int] = SEEDS) -> Table:
    """Every answer of ``decide`` in the seeded runs: state, event, next state, and the commands."""
    found: Table = {}
    original = machine.decide
    probed: set[tuple[Any, ...]] = set()

    def noted(state: Control, event: Any) -> Any:
        after, commands = original(state, event)
        row = (state.phase, name_of(event), after.phase)
        found.setdefault(row, set()).update(map(name_of_command, commands))
        return after, commands

    def watching(state: Control, event: Any) -> Any:
        if (kind := kind_of(state)) not in probed:
            probed.add(kind)
            for probe in control_probes.probes(state, at_s=event.at_s):
                noted(state, probe)
        return noted(state, event)

    machine.decide = watching
    try:
        for seed in seeds:
            dense = {"num_faults": 5, "turns": 250, "min_nodes": 1 + seed % 3, "flips": seed % 2}
            stopped_early(control_play.play(seed, **dense), seed)
    finally:
        machine.decide = original
    found = {row: found[row] for row in found if row[0] is not Phase.ENDED and row[1] != "Body"}
    return found  # ``Body`` alone is no message that exists


def kind_of(state: Control) -> tuple[Any, ...]:
    """States of the same kind get the probes once."""
    numbers = (len(state.standing.members), len(state.roster.nodes), len(state.roster.workers))
    ends = (bool(state.resumed), bool(state.ending.stopping), bool(state.committed.known))
    return state.phase, *numbers, *ends


def arrows(table: Iterable[Row]) -> set[Arrow]:
    """The changes of state in a table."""
    return {(before, after) for before, _, after in table if after is not before}


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


def name_of_command(command: Command) -> str:
    match command:
        case Tell(body=body):
            return type(body).__name__
        case TellDriver(body=body):
            return f"driver: {type(body).__name__}"
        case Journal(entry=entry):
            return f"journal: {entry['kind']}"
        case Publish(event=event):
            return f"`{event}`"
    return type(command).__name__


def page(table: Table) -> str:
    """The page in Markdown."""
    lines = [
        "# States of the controller",
        "",
        "Made by `python docs/generate_state_diagram.py` from the machine itself; do not edit.",
        "",
        "![States from top to bottom; arrows back are on the left](control_states.svg)",
        "",
        "A run begins in `gathering`; a controller that was restarted begins in `reconnecting`.",
        "",
        "| State | Meaning |",
        "|---|---|",
        *(f"| {phase.value} | {MEANING[phase]} |" for phase in Phase),
        "",
        "## Every answer that was seen",
        "",
        "A row says what an event in a state led to in seeded runs of the simulated cluster: the",
        "next state, and the commands that were seen with it; one event calls for some of them.",
        "Events of every kind were put to every state in addition, since the runs do not have all",
        "of them: errors of user code, evaluations, faults on purpose, notices about machines.",
        "Messages to workers have their names, `names_like_this` are events of the run's record.",
        "The last row of a state has the events that only change what the controller knows.",
        "`ended` answers nothing.",
        "",
        "| State | Event | Next state | Commands |",
        "|---|---|---|---|",
    ]
    for phase in Phase:
        here = sorted((row for row in table if row[0] is phase), key=place)
        loud = [row for row in here if table[row] or row[2] is not phase]
        lines += [line(phase, row[1], row[2], table[row]) for row in loud]
        if quiet := [row[1] for row in here if row not in loud]:
            lines.append(line(phase, ", ".join(quiet), phase, ()))
    return "\n".join(lines) + "\n"


def place(row: Row) -> tuple[bool, int, str]:
    """Where a row stands among those of its state: changes of state first, by next state."""
    before, event, after = row
    return after is before, list(Phase).index(after), event


def line(phase: Phase, events: str, after: Phase, commands: Iterable[str]) -> str:
    return f"| {phase.value} | {events} | {after.value} | {', '.join(sorted(commands))} |"


def rows(text: str) -> Table:
    """The table on the page."""
    found: Table = {}
    for row in text.splitlines():
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        if len(cells) != 4 or cells[0] not in {phase.value for phase in Phase}:
            continue
        commands = set(cells[3].split(", ")) - {""}
        for event in cells[1].split(", "):
            found[(Phase(cells[0]), event, Phase(cells[2]))] = commands
    return found


def in_order(found: Iterable[Arrow]) -> list[Arrow]:
    order = list(Phase)
    return sorted(found, key=lambda pair: (order.index(pair[0]), order.index(pair[1])))


def picture(found: Iterable[Arrow]) -> str:
    """States below each other, as SVG; arrows that lead down bulge to the right, others left."""
    order, high, wide, middle = list(Phase), 56, 130, 250
    height = high * len(order)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * middle} {height}" '
        'font-family="sans-serif" font-size="14">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" '
        'markerHeight="8" orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="#456"/></marker></defs>',
        f'<rect width="{2 * middle}" height="{height}" fill="white"/>',
    ]
    for before, after in in_order(found):
        start, end = order.index(before), order.index(after)
        side = 1 if end > start else -1
        x, bulge = middle + side * wide / 2, middle + side * (wide / 2 + 24 * abs(end - start))
        y1, y2 = high * start + high / 2 + 6 * side, high * end + high / 2 - 6 * side
        lines.append(
            f'<path d="M{x:g},{y1:g} C{bulge:g},{y1:g} {bulge:g},{y2:g} {x:g},{y2:g}" '
            'fill="none" stroke="#456" marker-end="url(#tip)"/>'
        )
    for index, phase in enumerate(order):
        x, y = middle - wide / 2, high * index + 12
        lines += [
            f'<rect x="{x:g}" y="{y}" width="{wide}" height="32" rx="8" fill="#def" '
            'stroke="#456"/>',
            f'<text x="{middle}" y="{y + 21}" text-anchor="middle">{phase.value}</text>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    args = parser.parse_args()
    table = observed()
    for path, text in ((PAGE, page(table)), (PICTURE, picture(arrows(table)))):
        if not args.check:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path}")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

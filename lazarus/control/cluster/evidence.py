"""What is held against nodes, and must outlive the controller that found it out. PURE.

A replica that was outvoted must not become a source because the controller restarted; a node that
is outvoted again and again stays suspect; a process that was ended on purpose says nothing of the
user's code. None of this can be asked of the workers again, so every change is journaled: within
the claim or the RESUME of the same decision, since a suspect is evicted by the one and a repair is
over only with the other; else in an entry of its own, before the commands that follow from it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from lazarus.control.cluster.state import Control, Outvoted
from lazarus.control.ports import Command, Journal

KIND = "evidence"
_CARRIERS = frozenset({"claim", "resume"})
FIELDS = (
    *("outvoted", "outvotes", "suspects", "ties", "undecided", "raised"),
    *("fired", "doomed", "excused"),
)


def journaled(
    before: Control, after: Control, commands: tuple[Command, ...]
) -> tuple[Command, ...]:
    """The commands of one decision, with what it found out put into the journal."""
    found = _changes(before, after)
    if not found:
        return commands
    for place, command in enumerate(commands):
        if isinstance(command, Journal) and command.entry["kind"] in _CARRIERS:
            entry = {**command.entry, KIND: found}
            return (*commands[:place], Journal(entry=entry), *commands[place + 1 :])
    return (Journal(entry={"kind": KIND, "term": after.term, **found}), *commands)


def _changes(before: Control, after: Control) -> dict[str, Any]:
    """What an entry says: of what only grows with faults on purpose the news, else all of it."""
    found: dict[str, Any] = {}
    for name in FIELDS:
        old, new = getattr(before, name), getattr(after, name)
        if new is old or new == old:
            continue
        match name:
            case "outvoted":
                found["outvoted_workers"] = sorted(new.workers)
                found["outvoted_copies"] = [list(copy) for copy in sorted(new.copies)]
            case "outvotes":
                found[name] = [[node, list(steps)] for node, steps in sorted(new.items())]
            case "suspects" | "raised":
                found[name] = [list(pair) for pair in new]
            case "fired":
                news = {node: at_s for node, at_s in new.items() if old.get(node) != at_s}
                found[name] = [list(pair) for pair in sorted(news.items())]
            case "doomed" | "excused":
                found[name] = sorted(new - old)
            case _:
                found[name] = list(new) if isinstance(new, tuple) else new
    return found


def recalled(state: Control, entry: Mapping[str, Any]) -> Control:
    """The state after such an entry; what it does not name is as it was."""
    changes: dict[str, Any] = {}
    if "outvoted_workers" in entry:
        copies = ((str(w), int(layer), int(e)) for w, layer, e in entry["outvoted_copies"])
        workers = frozenset(map(str, entry["outvoted_workers"]))
        changes["outvoted"] = Outvoted(workers=workers, copies=frozenset(copies))
    if "outvotes" in entry:
        changes["outvotes"] = {int(node): _steps(steps) for node, steps in entry["outvotes"]}
    for name in ("suspects", "raised"):
        if name in entry:
            changes[name] = tuple((int(node), int(step)) for node, step in entry[name])
    if "ties" in entry:
        changes["ties"] = _steps(entry["ties"])
    if "undecided" in entry:
        changes["undecided"] = bool(entry["undecided"])
    if "fired" in entry:
        changes["fired"] = {**state.fired, **{int(n): float(at_s) for n, at_s in entry["fired"]}}
    if "doomed" in entry:
        changes["doomed"] = state.doomed | frozenset(map(int, entry["doomed"]))
    if "excused" in entry:
        changes["excused"] = state.excused | frozenset(map(str, entry["excused"]))
    return replace(state, **changes)


def _steps(steps: Collection[Any]) -> tuple[int, ...]:
    return tuple(int(step) for step in steps)

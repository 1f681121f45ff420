"""Journaling of evidence about nodes, so that it survives a restart of the controller. PURE.

Evidence is what the workers cannot be asked again: which replicas were outvoted (they must not
become a source), how often each node was outvoted, which nodes had internal errors, and which
processes were ended on purpose (their deaths do not count against user code). Every change is
journaled. If the same decision journals a claim or a RESUME, the change becomes part of that entry,
because a claim evicts a suspect and only a RESUME completes a repair. Otherwise the change gets its
own entry, ahead of all other commands.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lazarus.control.cluster.state import Control, with_fields
from lazarus.control.parts.agreement import Outvoted
from lazarus.control.ports import Command, Journal

KIND = "evidence"
_CARRIERS = frozenset({"claim", "resume"})
FIELDS = {  # field -> the part of the state that has it
    **dict.fromkeys(("outvoted", "outvotes", "suspects", "ties", "undecided"), "agreement"),
    "raised": "blame",
    **dict.fromkeys(("fired", "doomed"), "injected"),
    "excused": "blame",
}
_PARTS = frozenset(FIELDS.values())


def journaled(
    before: Control, after: Control, commands: tuple[Command, ...]
) -> tuple[Command, ...]:
    """Add the evidence that changed between two states to the journal entries of a decision.

    Args:
        before: The state before the event.
        after: The state after the event.
        commands: The commands of this decision.

    Returns:
        The commands, with the changes in their first claim or RESUME entry or in a new first entry.
    """
    found = _changes(before, after)
    if not found:
        return commands
    for place, command in enumerate(commands):
        if isinstance(command, Journal) and command.entry["kind"] in _CARRIERS:
            entry = {**command.entry, KIND: found}
            return (*commands[:place], Journal(entry=entry), *commands[place + 1 :])
    return (Journal(entry={"kind": KIND, "term": after.term, **found}), *commands)


def _changes(before: Control, after: Control) -> dict[str, Any]:
    """The changed fields: of ``fired``, ``doomed`` and ``excused`` only the new items."""
    found: dict[str, Any] = {}
    if all(getattr(before, part) is getattr(after, part) for part in _PARTS):
        return found
    for name, part in FIELDS.items():
        old, new = getattr(getattr(before, part), name), getattr(getattr(after, part), name)
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
    """Apply a journaled evidence entry; fields that the entry does not name are unchanged."""
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
        changes["fired"] = {
            **state.injected.fired,
            **{int(n): float(at_s) for n, at_s in entry["fired"]},
        }
    if "doomed" in entry:
        changes["doomed"] = state.injected.doomed | frozenset(map(int, entry["doomed"]))
    if "excused" in entry:
        changes["excused"] = state.blame.excused | frozenset(map(str, entry["excused"]))
    return with_fields(state, changes)


def _steps(steps: Collection[Any]) -> tuple[int, ...]:
    return tuple(int(step) for step in steps)

"""Which nodes the driver starts, and where: one frozen value, replaced at every news. PURE.

A machine is whatever a launcher can start a node on: a Ray node, or a place on this computer. The
run wants ``Limits.wanted`` nodes. Whatever is missing is started on a machine that has room, at
once after a first loss, and later and later on a machine where nodes die or do not start again and
again; after ``MOST_TROUBLES`` in a row the machine is left alone.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lazarus.control.cluster.state import without

MOST_TROUBLES = 6  # failed starts and early deaths in a row, on one machine
SUSPECT_AT = 3  # losses on one machine, whatever lies between them


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How many nodes a run wants, and how patient it is with machines. Seconds and counts.

    Attributes:
        wanted: Nodes up to which lost ones are replaced.
        most: Nodes that are never exceeded; None: no limit.
        replaces: False: what is lost stays lost.
        is_fixed: No machine ever comes by itself: one that is gone is not waited for.
        rest_s: How long a machine is left alone after a second trouble in a row; doubles with each.
        settled_s: A node that lived for this long was well: troubles are counted anew.
        start_s: A node that is not up after this long has failed to start.
        salt: Settles ties between machines; differs between runs, so that they choose differently.
    """

    wanted: int
    most: int | None = None
    replaces: bool = True
    is_fixed: bool = False
    rest_s: float = 5.0
    settled_s: float = 30.0
    start_s: float = 300.0
    salt: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """A machine that lives, and how many nodes of the run fit there beside those that are there."""

    id: str
    name: str = ""  # as people know it
    room: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """One node of the run: where it is, since when, and how far."""

    machine: str
    since_s: float
    is_up: bool = False  # its processes have said hello to the controller
    ends_machine: bool = False  # its place goes with it: a drained machine, a fault on purpose


@dataclass(frozen=True, kw_only=True, slots=True)
class History:
    """What a machine did to nodes of this run."""

    troubles: int = 0  # in a row
    losses: int = 0
    rests_until_s: float = -math.inf
    troubled_s: float = -math.inf  # when the last node was lost there, or did not start
    gone: int = 0  # places that are not used again
    banned: str = ""  # why it is left alone


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Something about a machine that belongs into the record."""

    machine: str
    reason: str
    is_banned: bool  # False: it is only suspect


@dataclass(frozen=True, kw_only=True, slots=True)
class Fleet:
    """The run's nodes and what is known of its machines."""

    limits: Limits
    nodes: Mapping[str, Placed] = field(default_factory=dict)
    histories: Mapping[str, History] = field(default_factory=dict)

    @property
    def missing(self) -> int:
        """Nodes that are wanted and neither up nor on their way."""
        return max(0, min(self.limits.wanted - len(self.nodes), self.spare))

    @property
    def spare(self) -> int:
        """Nodes that could still be added without exceeding the most."""
        most = self.limits.most
        return 10**6 if most is None else max(0, most - len(self.nodes))

    def history(self, machine: str) -> History:
        return self.histories.get(machine, History())


Outcome = tuple[Fleet, tuple[Verdict, ...]]


def ordered(fleet: Fleet, key: str, machine: str, *, now_s: float) -> Fleet:
    """A node is being started there."""
    placed = Placed(machine=machine, since_s=now_s)
    return replace(fleet, nodes={**fleet.nodes, key: placed})


def came_up(fleet: Fleet, key: str, *, now_s: float) -> Fleet:
    """The controller has heard of all its processes. Said again after the controller came back."""
    placed = fleet.nodes.get(key)
    if placed is None or placed.is_up:
        return fleet
    placed = replace(placed, is_up=True, since_s=now_s)
    return replace(fleet, nodes={**fleet.nodes, key: placed})


def ends_machine(fleet: Fleet, key: str) -> Fleet:
    """Nothing is started in this node's place once it is gone."""
    placed = fleet.nodes.get(key)
    if placed is None:
        return fleet
    return replace(fleet, nodes={**fleet.nodes, key: replace(placed, ends_machine=True)})


def taken(fleet: Fleet, key: str) -> Fleet:
    """The machine's room went to somebody else before the node had it: no fault of the machine."""
    return replace(fleet, nodes=without(fleet.nodes, (key,)))


def gone(fleet: Fleet, key: str, *, cause: str, now_s: float, is_silent: bool = False) -> Outcome:
    """A node was lost, has left, or did not start. What is not there any more says nothing.

    Args:
        is_silent: Its processes were not seen to end: the machine itself may hang.
    """
    placed = fleet.nodes.get(key)
    if placed is None:
        return fleet, ()
    fleet = replace(fleet, nodes=without(fleet.nodes, (key,)))
    lost_for_good = not fleet.limits.replaces and placed.is_up
    if lost_for_good or (fleet.limits.is_fixed and placed.ends_machine):
        fleet = _wanting(fleet, fleet.limits.wanted - 1)
    before = fleet.history(placed.machine)
    if placed.ends_machine:
        return _with(fleet, placed.machine, replace(before, gone=before.gone + 1)), ()
    settled = placed.is_up and now_s - placed.since_s >= fleet.limits.settled_s
    # Starts that were under way together fail of one cause: one trouble.
    again = not placed.is_up and placed.since_s <= before.troubled_s
    troubles = 1 if settled else before.troubles + (not again)
    history = replace(
        before,
        troubles=troubles,
        losses=before.losses + placed.is_up,
        troubled_s=before.troubled_s if again else now_s,
        rests_until_s=now_s
        + _rest_s(fleet.limits, troubles, at_once=placed.is_up and not is_silent),
    )
    history, verdicts = _judged(placed, history, cause=cause)
    return _with(fleet, placed.machine, history), verdicts


def _rest_s(limits: Limits, troubles: int, *, at_once: bool) -> float:
    """A first death is made good at once; a machine that hangs or starts nothing rests first."""
    doublings = troubles - 2 if at_once else troubles - 1
    return 0.0 if doublings < 0 else limits.rest_s * float(2**doublings)


def _judged(placed: Placed, history: History, *, cause: str) -> tuple[History, tuple[Verdict, ...]]:
    if history.troubles >= MOST_TROUBLES:
        what = "lost soon after their start, or not started"
        reason = f"{history.troubles} nodes in a row were {what}; the last one: {cause}"
        verdict = Verdict(machine=placed.machine, reason=reason, is_banned=True)
        return replace(history, banned=reason), (verdict,)
    if placed.is_up and history.losses % SUSPECT_AT == 0:
        reason = f"{history.losses} nodes were lost there; the last one: {cause}"
        return history, (Verdict(machine=placed.machine, reason=reason, is_banned=False),)
    return history, ()


def held(fleet: Fleet, *, needed: int) -> Fleet:
    """The run holds for want of nodes: a place that went with its node is used again after all."""
    if len(fleet.nodes) >= needed:
        return fleet
    if not fleet.missing:
        fleet = _wanting(fleet, len(fleet.nodes) + 1)
    revived = next((id for id, h in sorted(fleet.histories.items()) if h.gone), None)
    if revived is None:
        return fleet
    history = fleet.history(revived)
    return _with(fleet, revived, replace(history, gone=history.gone - 1))


def enough(fleet: Fleet) -> Fleet:
    """The run is ending: what is lost from now on is not missed."""
    return _wanting(fleet, 0)


def _wanting(fleet: Fleet, wanted: int) -> Fleet:
    return replace(fleet, limits=replace(fleet.limits, wanted=max(0, wanted)))


def _with(fleet: Fleet, machine: str, history: History) -> Fleet:
    return replace(fleet, histories={**fleet.histories, machine: history})


def overdue(fleet: Fleet, *, now_s: float) -> tuple[str, ...]:
    """Nodes whose processes have not come up in time."""
    limit = fleet.limits.start_s
    late = (k for k, p in fleet.nodes.items() if not p.is_up and now_s - p.since_s > limit)
    return tuple(sorted(late))


def starts(
    fleet: Fleet, machines: Iterable[Machine], *, count: int, now_s: float
) -> tuple[str, ...]:
    """The machine of each node to start now: ``count`` of them, or fewer where there is no room.

    First come machines with the fewest nodes of the run, then those that gave no trouble, and last
    the one whose trouble is the newest: its death may not be known yet.
    """
    room = {m.id: _usable(fleet, m, now_s=now_s) for m in machines}
    there = Counter(placed.machine for placed in fleet.nodes.values())
    chosen: list[str] = []
    for _ in range(min(count, fleet.spare)):
        able = [id for id, places in room.items() if places > 0]
        if not able:
            break
        best = min(able, key=lambda id: (there[id], *_trust(fleet, id)))
        chosen.append(best)
        room[best] -= 1
        there[best] += 1
    return tuple(chosen)


def _usable(fleet: Fleet, machine: Machine, *, now_s: float) -> int:
    history = fleet.history(machine.id)
    if history.banned or now_s < history.rests_until_s:
        return 0
    return machine.room - history.gone


def _trust(fleet: Fleet, machine: str) -> tuple[float, int, str]:
    history = fleet.history(machine)
    tie = hashlib.sha256(f"{fleet.limits.salt} {machine}".encode()).hexdigest()
    return history.troubled_s, history.losses, tie


def is_troubled(fleet: Fleet) -> bool:
    """Whether nodes that are not there have machines, on which they do not start."""
    coming = [placed.machine for placed in fleet.nodes.values() if not placed.is_up]
    if fleet.missing:
        coming += list(fleet.histories)
    return any(fleet.history(machine).troubles for machine in coming)


def hopeless(fleet: Fleet, machines: Sequence[Machine]) -> str:
    """Why no node will ever come up on these machines; empty if one may, or is there."""
    if fleet.nodes or not machines or not fleet.limits.is_fixed:
        return ""
    reasons = [fleet.history(machine.id).banned for machine in machines]
    return reasons[-1] if all(reasons) else ""

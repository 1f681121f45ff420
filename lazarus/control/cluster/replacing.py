"""Which nodes the driver starts, and on which machines. PURE.

A machine is whatever a launcher can start a node on: a Ray node, or a place on this computer. The
run wants ``Limits.wanted`` nodes, and missing nodes are started on machines that have room. After a
first loss on a machine its replacement starts at once; each further trouble in a row (a node that
dies early or does not start) doubles the time before the machine is used again, and after
``MOST_TROUBLES`` in a row the machine is banned. All functions take a frozen ``Fleet`` and return a
new one.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lazarus.control.cluster.state import without

MOST_TROUBLES = 6  # failed starts and early deaths in a row, on one machine
SUSPECT_AT = 3  # losses on one machine, in a row or not


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How many nodes a run wants, and how patient it is with machines.

    Attributes:
        wanted: Number of nodes up to which lost nodes are replaced.
        most: Largest number of nodes; None for no limit.
        replaces: Whether lost nodes are replaced.
        is_fixed: Whether the set of machines is fixed: a machine that is gone is not waited for.
        rest_s: Seconds a machine is not used after the second trouble in a row; doubles each time.
        settled_s: Seconds of life after which the loss of a node starts a new count of troubles.
        start_s: Seconds after which a node that is not up has failed to start.
        salt: Breaks ties between machines; differs between runs, so that they choose differently.
    """

    wanted: int
    most: int | None = None
    replaces: bool = True
    is_fixed: bool = False
    rest_s: float
    settled_s: float
    start_s: float
    salt: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """A machine that is alive; ``room`` is how many more nodes of the run fit on the machine."""

    id: str
    name: str = ""  # for messages
    room: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """The machine of one node, and whether the node is up (since ``since_s``) or being started."""

    machine: str
    since_s: float
    is_up: bool = False  # its processes have said hello to the controller
    ends_machine: bool = False  # the place is not used again: a drained machine, an injected fault


@dataclass(frozen=True, kw_only=True, slots=True)
class History:
    """Losses and failed starts of this run's nodes on one machine."""

    troubles: int = 0  # in a row
    losses: int = 0
    rests_until_s: float = -math.inf
    troubled_s: float = -math.inf  # when the last node was lost there, or did not start
    gone: int = 0  # places that are not used again
    banned: str = ""  # why the machine is not used any more; empty: it is used


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """A judgement of a machine for the record: suspect or banned."""

    machine: str
    reason: str
    is_banned: bool  # False: suspect only


@dataclass(frozen=True, kw_only=True, slots=True)
class Fleet:
    """The run's nodes (by key) and the history of its machines (by id)."""

    limits: Limits
    nodes: Mapping[str, Placed] = field(default_factory=dict)
    histories: Mapping[str, History] = field(default_factory=dict)

    @property
    def missing(self) -> int:
        """Number of wanted nodes that are neither up nor being started."""
        return max(0, min(self.limits.wanted - len(self.nodes), self.spare))

    @property
    def spare(self) -> int:
        """Number of nodes that can still be added within ``limits.most``."""
        most = self.limits.most
        return 10**6 if most is None else max(0, most - len(self.nodes))

    def history(self, machine: str) -> History:
        """The history of a machine; blank if none of its nodes is known to have failed."""
        return self.histories.get(machine, History())


Outcome = tuple[Fleet, tuple[Verdict, ...]]


def ordered(fleet: Fleet, key: str, machine: str, *, now_s: float) -> Fleet:
    """Note that a node with this key is being started on the machine."""
    placed = Placed(machine=machine, since_s=now_s)
    return replace(fleet, nodes={**fleet.nodes, key: placed})


def came_up(fleet: Fleet, key: str, *, now_s: float) -> Fleet:
    """Note that all processes of the node have said hello to the controller.

    A controller that comes back reports its nodes again; the repetition changes nothing.
    """
    placed = fleet.nodes.get(key)
    if placed is None or placed.is_up:
        return fleet
    placed = replace(placed, is_up=True, since_s=now_s)
    return replace(fleet, nodes={**fleet.nodes, key: placed})


def ends_machine(fleet: Fleet, key: str) -> Fleet:
    """Note that the node's place on its machine is not used again once the node is gone."""
    placed = fleet.nodes.get(key)
    if placed is None:
        return fleet
    return replace(fleet, nodes={**fleet.nodes, key: replace(placed, ends_machine=True)})


def taken(fleet: Fleet, key: str) -> Fleet:
    """Forget a node whose room on the machine was taken before the node could start.

    This does not count as a trouble of the machine.
    """
    return replace(fleet, nodes=without(fleet.nodes, (key,)))


def gone(fleet: Fleet, key: str, *, cause: str, now_s: float, is_silent: bool = False) -> Outcome:
    """Note that a node was lost, has left, or did not start; unknown keys are ignored.

    Args:
        fleet: The fleet before.
        key: The node's key.
        cause: Why the node is gone, for the record.
        now_s: Current time in seconds.
        is_silent: Whether its processes were not seen to end, so that the machine may hang.

    Returns:
        The fleet without the node, and verdicts on its machine if there are any.
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
    # Starts that were under way together count as one trouble: they fail for one cause.
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
    """Seconds for which a machine is not used after its latest trouble.

    Zero after the first death with ``at_once``; a machine that hangs or on which a node does not
    start rests from the first trouble on.
    """
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
    """Make it possible to start one more node when the run holds with too few nodes.

    Raises the wanted number if nothing is missing, and allows a place to be used again that was
    given up together with its node.

    Args:
        fleet: The fleet before.
        needed: Number of nodes that the run needs to go on.
    """
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
    """Stop wanting nodes, because the run is ending: losses are not replaced any more."""
    return _wanting(fleet, 0)


def _wanting(fleet: Fleet, wanted: int) -> Fleet:
    return replace(fleet, limits=replace(fleet.limits, wanted=max(0, wanted)))


def _with(fleet: Fleet, machine: str, history: History) -> Fleet:
    return replace(fleet, histories={**fleet.histories, machine: history})


def overdue(fleet: Fleet, *, now_s: float) -> tuple[str, ...]:
    """Keys of nodes that are not up ``start_s`` after they were started, sorted."""
    limit = fleet.limits.start_s
    late = (k for k, p in fleet.nodes.items() if not p.is_up and now_s - p.since_s > limit)
    return tuple(sorted(late))


def starts(
    fleet: Fleet, machines: Iterable[Machine], *, count: int, now_s: float
) -> tuple[str, ...]:
    """Choose the machine of each node to start now.

    Machines with the fewest nodes of the run come first. Among these a machine without troubles
    comes first, and the one whose trouble is newest comes last, since it may be dead already.

    Args:
        fleet: The run's nodes and machine histories.
        machines: Machines that are alive, with their room.
        count: Number of nodes to start.
        now_s: Current time in seconds.

    Returns:
        Machine ids, one for each node: ``count`` of them, or fewer if there is not enough room.
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
    """Whether nodes are missing although there are machines, because they do not start there."""
    coming = [placed.machine for placed in fleet.nodes.values() if not placed.is_up]
    if fleet.missing:
        coming += list(fleet.histories)
    return any(fleet.history(machine).troubles for machine in coming)


def hopeless(fleet: Fleet, machines: Sequence[Machine]) -> str:
    """Why no node will ever start on these machines; empty if one may start or is there."""
    if fleet.nodes or not machines or not fleet.limits.is_fixed:
        return ""
    reasons = [fleet.history(machine.id).banned for machine in machines]
    return reasons[-1] if all(reasons) else ""

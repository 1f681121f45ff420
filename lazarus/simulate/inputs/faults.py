"""Fault sources: periodic, Poisson per node or zone, traces, scripts. Seeded, so repeatable."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lazarus.errors import ConfigError
from lazarus.simulate.inputs.traces import FleetEvent, FleetTrace


def names(count: int, *, first: int = 0) -> tuple[str, ...]:
    """Return ``count`` node names in join order, starting with number ``first``."""
    return tuple(f"n{i}" for i in range(first, first + count))


@dataclass(frozen=True, kw_only=True, slots=True)
class Periodic:
    """Removes nodes at a fixed interval until too few are left.

    Attributes:
        every_s: Seconds between faults.
        nodes: Nodes removed per fault.
        until: Fewest nodes that remain.
        pick: "random", or "first" for the oldest nodes. Use "first" to compare systems: a random
            node may be one that fixed expert parallelism leaves idle.
    """

    every_s: float
    nodes: int = 1
    until: int = 1
    pick: str = "random"

    def events(self, *, num_nodes: int, horizon_s: float, seed: int) -> list[FleetEvent]:
        rng = np.random.default_rng(seed)
        live, found, at_s = list(names(num_nodes)), [], self.every_s
        while at_s < horizon_s and len(live) - self.nodes >= self.until:
            chosen = rng.choice(len(live), size=self.nodes, replace=False)
            if self.pick == "first":
                chosen = np.arange(self.nodes)
            gone = tuple(live[i] for i in sorted(chosen))
            live = [n for n in live if n not in gone]
            found.append(FleetEvent(at_s=at_s, kind="remove", nodes=gone))
            at_s += self.every_s
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Poisson:
    """Nodes, and optionally whole zones, fail independently at random times.

    Attributes:
        node_mtbf_s: Mean time between failures of one node, in seconds.
        replace_s: Seconds until a new node replaces a lost one; None: never.
        zones: Number of zones; node i belongs to zone i mod ``zones``.
        zone_mtbf_s: Mean time between failures of one zone, in seconds.
    """

    node_mtbf_s: float
    replace_s: float | None = None
    zones: int = 0
    zone_mtbf_s: float = float("inf")

    def events(self, *, num_nodes: int, horizon_s: float, seed: int) -> list[FleetEvent]:
        if self.node_mtbf_s <= 0 or self.zone_mtbf_s <= 0:
            raise ConfigError("a mean time between failures must be > 0")
        rng = np.random.default_rng(seed)
        places = list(names(num_nodes))  # the node that holds each place now
        free_s = np.zeros(num_nodes)  # when the place is filled again
        serial, at_s, found = num_nodes, 0.0, []
        rate = num_nodes / self.node_mtbf_s + self.zones / self.zone_mtbf_s
        while (at_s := at_s + rng.exponential(1 / rate)) < horizon_s:
            struck = self._struck(rng, num_nodes, rate)
            struck = [p for p in struck if free_s[p] <= at_s]
            if not struck:
                continue
            gone = tuple(places[p] for p in struck)
            found.append(FleetEvent(at_s=at_s, kind="remove", nodes=gone))
            back_s = at_s + self.replace_s if self.replace_s is not None else float("inf")
            for place in struck:
                places[place], free_s[place] = f"n{serial}", back_s
                serial += 1
            if back_s < horizon_s:
                new = tuple(places[p] for p in struck)
                found.append(FleetEvent(at_s=back_s, kind="add", nodes=new))
        return sorted(found, key=lambda e: e.at_s)

    def _struck(self, rng: np.random.Generator, num_nodes: int, rate: float) -> list[int]:
        pick = rng.random() * rate
        if pick < num_nodes / self.node_mtbf_s:
            return [int(rng.integers(num_nodes))]
        zone = int(rng.integers(self.zones))
        return list(range(zone, num_nodes, self.zones))


@dataclass(frozen=True, kw_only=True, slots=True)
class FromTrace:
    """Replays a fleet trace. The run starts with the trace's nodes at time 0."""

    trace: FleetTrace

    def events(self, *, num_nodes: int, horizon_s: float, seed: int) -> list[FleetEvent]:
        del num_nodes, seed  # given by the trace
        return [e for e in self.trace.events if 0 < e.at_s < horizon_s]

    @property
    def start(self) -> tuple[str, ...]:
        """Nodes of the trace at time 0."""
        return tuple(sorted(self.trace.nodes_at(0.0)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Scripted:
    """Replays given events, such as the faults of a real run."""

    script: tuple[FleetEvent, ...]

    def events(self, *, num_nodes: int, horizon_s: float, seed: int) -> list[FleetEvent]:
        del num_nodes, seed
        return [e for e in self.script if e.at_s < horizon_s]


FaultSource = Periodic | Poisson | FromTrace | Scripted


def fleet_of(source: FaultSource, num_nodes: int) -> tuple[str, ...]:
    """Return the names of the nodes that start the run."""
    return source.start if isinstance(source, FromTrace) else names(num_nodes)


def node_hours(source: FaultSource, *, num_nodes: int, length_s: float, seed: int) -> float:
    """Return the hours of presence summed over all nodes, the basis of a fleet's price."""
    fleet = fleet_of(source, num_nodes)
    live, since_s, total_s = set(fleet), 0.0, 0.0
    for event in source.events(num_nodes=len(fleet), horizon_s=length_s, seed=seed):
        total_s += len(live) * (event.at_s - since_s)
        since_s = event.at_s
        (live.update if event.kind == "add" else live.difference_update)(event.nodes)
    return (total_s + len(live) * (length_s - since_s)) / 3600.0


def by_number(name: str) -> tuple[int, str]:
    """Sort key that orders node names by join order."""
    digits = "".join(c for c in name if c in "0123456789")[:18]
    return (int(digits) if digits else 0, name)

"""The generation that trains: its members and its plan, and the size of its model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from placement import Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """What the newest RESUME put in force; ``reconfiguration/resuming.py`` replaces it.

    Between two RESUMEs only ``members`` shrinks, as nodes are lost, and ``base_plan`` follows the
    first commit of the generation.
    """

    members: tuple[int, ...] = ()  # living nodes of the newest RESUMEd generation
    seats: tuple[str, ...] = ()  # workers of that generation in rank order, dead ones included
    seat_nodes: tuple[int, ...] = ()  # the node of each seat
    past_seats: Mapping[int, tuple[str, ...]] = field(default_factory=dict)  # by generation
    plan: Plan | None = None  # of the newest RESUMEd generation
    base_plan: Plan | None = None  # of the last committed step (rule 22)
    lineage: tuple[tuple[int, int], ...] = ()
    rolled: tuple[int, int] = (0, 0)  # generation and step of the last RESUME that rolled back
    shape: tuple[int, int] = (0, 0)  # MoE layers, experts
    record_bytes: tuple[int, int] = (0, 0)  # dense state, one expert's image
    top_k: int = 1
    num_samples: int = 0  # size of the data; 0: endless numbering; -1: a stream of shards

"""The machines and processes that the controller knows, members of the run or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lazarus.control.messages import NodeNotice


@dataclass(frozen=True, kw_only=True, slots=True)
class Worker:
    """One worker process (one rank), as its messages describe it."""

    node: int
    local_rank: int
    host: str
    keeper: str = ""
    connected: bool = True
    heard_s: float = 0.0
    progress: int = 0
    progress_s: float = 0.0
    waiting: bool = False
    step: int = 0
    undisturbed: bool = True  # at hello it was computing in the newest generation, unfenced


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One machine; its serial, the key in ``Roster.nodes``, is its number in join order."""

    key: str
    workers: tuple[str, ...]  # by local rank; "" where the process has not said hello yet
    joined_s: float = 0.0
    leaving: str = ""  # cause; empty: the node stays
    zone: str = ""  # failure domain; empty: not known
    memory_bytes: int = 0  # available to experts; 0: not known

    @property
    def complete(self) -> bool:
        """Whether all processes of the node have said hello."""
        return "" not in self.workers


@dataclass(frozen=True, kw_only=True, slots=True)
class Roster:
    """Who is there. ``membership/members.py`` admits nodes and removes lost ones."""

    next_serial: int = 0
    nodes: Mapping[int, Node] = field(default_factory=dict)
    notices: Mapping[str, NodeNotice] = field(default_factory=dict)  # by key, of unknown nodes
    workers: Mapping[str, Worker] = field(default_factory=dict)

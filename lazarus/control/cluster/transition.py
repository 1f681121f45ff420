"""A transition to the next generation, and how long its recovery takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lazarus.control.cluster.remembered import remembered
from lazarus.control.messages import Aligned, Move, Ready, Report, Restore, Seat
from placement import Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class Transition:
    """One attempt to reach the RESUME of a generation; the loss of a node in it discards it."""

    generation: int
    voters: tuple[int, ...]  # nodes whose state counts
    joiners: tuple[int, ...]
    leavers: tuple[int, ...]
    phase_s: float  # when the current phase began
    reason: str = ""
    restarts: bool = False  # no member is left: new nodes take all state from a checkpoint
    reports: Mapping[str, Report] = field(default_factory=dict)
    step: int = -1
    aligned: Mapping[str, Aligned] = field(default_factory=dict)
    plan: Plan | None = None
    seats: tuple[Seat, ...] = ()
    feeders: tuple[Seat, ...] = ()
    moves: tuple[Move, ...] = ()
    moves_behind: tuple[Move, ...] = ()
    restores: tuple[Restore, ...] = ()
    outvoted: frozenset[str] = frozenset()  # workers that take the dense state of the others
    goes_back: bool = False  # the dense state differs without a majority: back to a checkpoint
    is_tied: bool = False  # the dense state or an expert differs without a majority
    rollback: bool = False
    refused: str = ""  # why the user's recovery policy was not followed
    awaits: bool = False  # waits for a checkpoint that may restore the lost experts
    awaits_word: bool = False  # all are ready, but a launcher's report may show a poisoned step
    held_until_s: float = 0.0  # when to ask the recovery policy again; 0: it does not hold
    moved_bytes: int = 0
    ready: Mapping[str, Ready] = field(default_factory=dict)

    @property
    def next_nodes(self) -> tuple[int, ...]:
        """Members after this transition: voters and joiners without leavers, ascending."""
        stay = _less(self.voters, self.leavers) if self.leavers else self.voters
        return _together(stay, self.joiners) if self.joiners else stay


@remembered
def _less(voters: tuple[int, ...], leavers: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(set(voters) - set(leavers)))


@remembered
def _together(stay: tuple[int, ...], joiners: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted((*stay, *joiners)))  # no node is both voter and joiner


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    """Seconds of one recovery, from the trigger to the next commit, over all its attempts."""

    reason: str
    trigger_s: float
    marks: Mapping[str, float] = field(default_factory=dict)
    moves: int = 0
    behind: int = 0  # replicas that are transferred after RESUME
    bytes_moved: int = 0
    lost: tuple[int, ...] = ()
    joined: tuple[int, ...] = ()
    attempts: int = 1

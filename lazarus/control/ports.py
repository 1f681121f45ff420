"""The machine's two ports: events go in, commands come out. Every event carries its time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lazarus.control.messages import Body, StorageProblem

# ---- events: what decide() is fed with ---------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSaid:
    worker: str
    body: Body
    at_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamClosed:
    worker: str
    at_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class DriverSaid:
    body: Body
    at_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class DriverGone:
    at_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Garbled:
    """A stream brought bytes that are no message; ``worker`` is empty where nobody knows whose."""

    worker: str
    reason: str
    at_s: float
    message: str = "bytes"


@dataclass(frozen=True, kw_only=True, slots=True)
class Tick:
    at_s: float
    slept_s: float = 0.0  # for so long the controller itself could not hear anybody


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """One expert's newest version in a checkpoint on storage."""

    layer: int
    expert: int
    generation: int
    step: int
    routed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ManifestDone:
    """The shell wrote a manifest, or says why it could not."""

    generation: int
    step: int
    at_s: float
    kind: str = "full"
    num_bytes: int = 0
    wall_s: float = 0.0
    stored: tuple[Stored, ...] = ()
    standing: tuple[tuple[int, int, bool], ...] = ()  # (generation, step, full) after retention
    final: bool = False
    error: str = ""
    problem: StorageProblem | None = None  # what storage refused
    is_rootless: bool = False  # it points to files of older ones, and none of those stands


Event = ManifestDone | WorkerSaid | StreamClosed | DriverSaid | DriverGone | Garbled | Tick


# ---- commands: what the shell must do, in this order -------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Tell:
    worker: str
    body: Body


@dataclass(frozen=True, kw_only=True, slots=True)
class TellAll:
    """The same for many workers, in this order; ``each`` spells it out."""

    workers: tuple[str, ...]
    body: Body


@dataclass(frozen=True, kw_only=True, slots=True)
class TellDriver:
    body: Body


@dataclass(frozen=True, kw_only=True, slots=True)
class Journal:
    """Append, durably, before the next command is carried out; a conflict ends the process."""

    entry: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Publish:
    """One line of the run's record; ``t`` is the time it happened."""

    t: float
    event: str
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class WriteManifest:
    """Write the manifest of a checkpoint whose files are durable; answered by ManifestDone.

    ``parts`` are the ranks' reports (JSON); ``final`` ends the run with it. Without ``url`` it goes
    where the run's checkpoints are.
    """

    step: int
    generation: int
    parts: tuple[str, ...]
    meta: Mapping[str, Any]
    final: bool = False
    url: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class DropFiles:
    """Delete files of a checkpoint that will not become true; nobody waits for it."""

    paths: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Disconnect:
    worker: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Exit:
    """The controller's work is done."""


Command = (
    Tell | TellAll | TellDriver | Journal | Publish | WriteManifest | DropFiles | Disconnect | Exit
)


def each(commands: Iterable[Command]) -> tuple[Command, ...]:
    """The same commands with one ``Tell`` for every worker that a ``TellAll`` names."""
    spelled: list[Command] = []
    for command in commands:
        if isinstance(command, TellAll):
            spelled += [Tell(worker=worker, body=command.body) for worker in command.workers]
        else:
            spelled.append(command)
    return tuple(spelled)

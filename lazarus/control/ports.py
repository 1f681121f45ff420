"""Events, the input of ``machine.decide``, and commands, its output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lazarus.control.messages import Body, StorageProblem

# ---- events: each carries its time -------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSaid:
    """A worker sent a message."""

    worker: str
    body: Body
    at_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamClosed:
    """The stream of a worker has closed."""

    worker: str
    at_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class DriverSaid:
    """The driver sent a message."""

    body: Body
    at_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class DriverGone:
    """The driver is gone: its process or its stream has ended."""

    at_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Garbled:
    """A stream delivered bytes that are not a message; ``worker`` is empty if not known."""

    worker: str
    reason: str
    at_s: float
    message: str = "bytes"


@dataclass(frozen=True, kw_only=True, slots=True)
class Tick:
    """Time has passed; sent regularly."""

    at_s: float
    slept_s: float = 0.0  # how long the controller's process stood still before


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
    """The shell has written a manifest, or failed to (``error`` says why)."""

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
    problem: StorageProblem | None = None  # the refusal, if storage failed
    is_rootless: bool = False  # points to files of older checkpoints, and none of these stands


Event = ManifestDone | WorkerSaid | StreamClosed | DriverSaid | DriverGone | Garbled | Tick


# ---- commands: what the shell must do, in this order -------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Tell:
    """Send a message to one worker."""

    worker: str
    body: Body


@dataclass(frozen=True, kw_only=True, slots=True)
class TellAll:
    """Send one message to many workers, in this order; ``each`` expands it to single ``Tell``s."""

    workers: tuple[str, ...]
    body: Body


@dataclass(frozen=True, kw_only=True, slots=True)
class TellDriver:
    """Send a message to the driver."""

    body: Body


@dataclass(frozen=True, kw_only=True, slots=True)
class Journal:
    """Append an entry to the journal, durably, before the next command is carried out.

    A conflict with another controller ends the process.
    """

    entry: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Publish:
    """Write one event to the run's record; ``t`` is the time of the event in seconds."""

    t: float
    event: str
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class WriteManifest:
    """Write the manifest of a checkpoint whose files are durable; answered by ManifestDone.

    ``parts`` are the ranks' reports (JSON); ``final`` marks the last checkpoint of the run. An
    empty ``url`` stands for the run's checkpoint place.
    """

    step: int
    generation: int
    parts: tuple[str, ...]
    meta: Mapping[str, Any]
    final: bool = False
    url: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class DropFiles:
    """Delete files of a checkpoint that will not be completed; there is no answer."""

    paths: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Disconnect:
    """Close the stream of a worker."""

    worker: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Exit:
    """End the controller's process: the run is over."""


Command = (
    Tell | TellAll | TellDriver | Journal | Publish | WriteManifest | DropFiles | Disconnect | Exit
)


def each(commands: Iterable[Command]) -> tuple[Command, ...]:
    """Expand every ``TellAll`` to one ``Tell`` per worker; other commands are unchanged."""
    spelled: list[Command] = []
    for command in commands:
        if isinstance(command, TellAll):
            spelled += [Tell(worker=worker, body=command.body) for worker in command.workers]
        else:
            spelled.append(command)
    return tuple(spelled)

"""The exceptions that Lazarus raises. Messages say what happened, the numbers, and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class LazarusError(Exception):
    """Base class of all exceptions of Lazarus. Pickling keeps the fields, as Ray and gRPC need."""

    exit_code: int = 1  # exit code of the command line for this error

    def __reduce__(self) -> tuple[object, ...]:
        return BaseException.__new__, (type(self), *self.args), self.__dict__


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem of the user's input: the message, and where the input came from."""

    message: str
    where: str = ""  # "configs/a.toml:14", "--set placement.min_replicas=0", or unknown
    key: str = ""  # the dotted key concerned, if any

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message


class ConfigError(LazarusError, ValueError):
    """The user's input is invalid; nothing was started. ``problems`` holds all problems found."""

    exit_code = 2

    def __init__(self, problems: str | Problem | Iterable[Problem]) -> None:
        if isinstance(problems, str):
            problems = Problem(problems)
        found = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(str(problem) for problem in found))
        self.problems: tuple[Problem, ...] = found


class FencedError(LazarusError):
    """The generation in which this process computes was fenced. Unwind and wait; report nothing."""

    def __init__(self, *, generation: int, fence: int) -> None:
        super().__init__(f"generation {generation} is fenced by generation {fence}")
        self.generation, self.fence = generation, fence


class CollectiveError(LazarusError):
    """A collective failed on this rank. A peer may be gone, but that is not certain."""

    def __init__(self, *, label: str, generation: int, reason: str) -> None:
        super().__init__(f"collective {label} of generation {generation} failed: {reason}")
        self.label, self.generation, self.reason = label, generation, reason


class TransferError(LazarusError):
    """A piece of state did not arrive completely from a peer."""

    def __init__(self, *, what: str, source: str, reason: str) -> None:
        super().__init__(f"transfer of {what} from {source} failed: {reason}")
        self.what, self.source, self.reason = what, source, reason


class BadSourceError(TransferError):
    """The copy of state chosen for a restore cannot be used; another copy will be chosen.

    ``url`` and ``operation`` name what storage refused; both are empty if the copy is damaged.
    """

    def __init__(
        self, *, name: str, what: str, source: str, reason: str, url: str = "", operation: str = ""
    ) -> None:
        super().__init__(what=what, source=source, reason=reason)
        self.name, self.url, self.operation = name, url, operation


class QuorumTimeoutError(LazarusError):
    """Too few nodes were alive for too long. The run ended early and can be resumed."""

    exit_code = 3

    def __init__(self, *, live: int, needed: int, waited_s: float, awaited: str = "") -> None:
        lacking = f" ({awaited})" if awaited else ""
        super().__init__(
            f"{live} live nodes, {needed} needed, waited {waited_s:.0f} s{lacking}; resume the run "
            f"when nodes are back, or lower cluster.min_nodes"
        )
        self.live, self.needed, self.waited_s = live, needed, waited_s


class LostExpertError(LazarusError):
    """The last live replica of an expert is gone, and the recovery policy ended the run."""

    exit_code = 3

    def __init__(self, *, experts: Sequence[tuple[int, int]], reason: str) -> None:
        shown = ", ".join(f"L{layer}/E{expert}" for layer, expert in experts[:8])
        more = f" and {len(experts) - 8} more" if len(experts) > 8 else ""
        super().__init__(f"no live replica of {shown}{more}: {reason}")
        self.experts, self.reason = tuple(experts), reason


class StoppedError(LazarusError):
    """The run ended before its last step, by a request or for lack of nodes; it can be resumed."""

    exit_code = 3


class UserCodeError(LazarusError):
    """The user's model, loss, data, optimizer, schedule or hook raised, or returned bad values.

    Attributes:
        where: The user's innermost line, with node, rank, step and samples; may be empty.
        summary: The exception, or the problem, in one line.
        traceback_text: Traceback with the user's frames only; also added as a note.
        rank, step, phase: Where the error happened; -1 and empty if unknown.
        sample_ids: Ids of the samples in the micro-batch.
    """

    def __init__(
        self,
        *,
        where: str,
        summary: str,
        traceback_text: str,
        rank: int = -1,
        step: int = -1,
        phase: str = "",
        sample_ids: Sequence[int] = (),
    ) -> None:
        super().__init__(f"{where}: {summary}" if where else summary)
        self.where, self.summary, self.traceback_text = where, summary, traceback_text
        self.rank, self.step, self.phase = rank, step, phase
        self.sample_ids = tuple(sample_ids)
        if traceback_text:
            self.add_note(traceback_text)


class PoisonedStepError(UserCodeError):
    """A step kills every process that computes it, one node after the other."""


class UserMistakeError(LazarusError, ValueError):
    """A user's function returned a value that cannot be used. Raised in the worker."""


class InternalError(LazarusError):
    """Lazarus itself failed. ``report`` is the path of a file to attach to a bug report."""

    def __init__(self, message: str, *, report: str = "") -> None:
        super().__init__(message)
        self.report = report


class BrokenInvariantError(LazarusError):
    """An invariant of the protocol was violated. The state is kept as it is."""


class StartupError(LazarusError):
    """A worker, a node or the cluster did not start."""


class RoomTakenError(StartupError):
    """The machine or room chosen for a new node is gone, or was taken before the node started."""


class ControllerDiedError(StartupError):
    """The controller's process ended before it accepted connections.

    ``failure`` is a ``lazarus.failure.Failure`` as JSON that the controller left; may be empty.
    """

    def __init__(self, message: str, *, failure: str = "") -> None:
        super().__init__(message)
        self.failure = failure


class DataError(LazarusError):
    """The data does not have the expected form."""


class CheckpointError(LazarusError):
    """A checkpoint cannot be used; the message names what is missing or damaged."""


class StorageError(CheckpointError):
    """A disk or an object store refused ``operation`` on ``url``, or did not answer."""

    def __init__(self, *, url: str, operation: str, reason: str, is_full: bool = False) -> None:
        super().__init__(f"{operation} {url}: {reason}")
        self.url, self.operation, self.reason = url, operation, reason
        self.is_full = is_full  # the disk or quota is full


class JournalError(LazarusError):
    """A run's journal is damaged or cannot be read; ``path`` is the file."""

    exit_code = 2

    def __init__(self, *, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason


class RecordError(LazarusError, ValueError):
    """A run's record is damaged or cannot be read; ``line`` is 0 if the whole file is meant."""

    exit_code = 2

    def __init__(self, *, path: str, line: int, reason: str) -> None:
        super().__init__(f"{path}:{line}: {reason}" if line else f"{path}: {reason}")
        self.path, self.line, self.reason = path, line, reason

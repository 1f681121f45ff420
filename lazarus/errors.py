"""Every deliberate error of Lazarus: what happened, the numbers, and the way out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class LazarusError(Exception):
    """Base of all deliberate errors. It crosses Ray and gRPC, so pickling keeps its fields."""

    exit_code: int = 1  # what the command line returns when nothing handled it

    def __reduce__(self) -> tuple[object, ...]:
        return BaseException.__new__, (type(self), *self.args), self.__dict__


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with the input: where it was said, and what is wrong with it."""

    message: str
    where: str = ""  # "configs/a.toml:14", "--set placement.min_replicas=0", or unknown
    key: str = ""  # the dotted key it is about, if it is about one

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message


class ConfigError(LazarusError, ValueError):
    """The user's input cannot work; nothing was started. Holds every problem found, one a line."""

    exit_code = 2

    def __init__(self, problems: str | Problem | Iterable[Problem]) -> None:
        if isinstance(problems, str):
            problems = Problem(problems)
        found = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(str(problem) for problem in found))
        self.problems: tuple[Problem, ...] = found


class StaleGenerationError(LazarusError):
    """A peer spoke for a generation that is over. Drop the message; do not retry it."""

    def __init__(self, *, got: int, current: int) -> None:
        super().__init__(f"message for generation {got}, but the cluster is at {current}")
        self.got, self.current = got, current


class FencedError(LazarusError):
    """This process computes in a generation that has been fenced: unwind, report nothing, wait."""

    def __init__(self, *, generation: int, fence: int) -> None:
        super().__init__(f"generation {generation} is fenced by generation {fence}")
        self.generation, self.fence = generation, fence


class CollectiveError(LazarusError):
    """A collective failed under this rank: a suspicion that a peer is gone, never a verdict."""

    def __init__(self, *, label: str, generation: int, reason: str) -> None:
        super().__init__(f"collective {label} of generation {generation} failed: {reason}")
        self.label, self.generation, self.reason = label, generation, reason


class TransferError(LazarusError):
    """A piece of state did not arrive whole from a peer."""

    def __init__(self, *, what: str, source: str, reason: str) -> None:
        super().__init__(f"transfer of {what} from {source} failed: {reason}")
        self.what, self.source, self.reason = what, source, reason


class BadSourceError(TransferError):
    """A copy of state that was chosen for a restore cannot be used; another one is chosen.

    ``url`` and ``operation`` say what storage refused; empty: it was read, and is no good.
    """

    def __init__(
        self, *, name: str, what: str, source: str, reason: str, url: str = "", operation: str = ""
    ) -> None:
        super().__init__(what=what, source=source, reason=reason)
        self.name, self.url, self.operation = name, url, operation


class QuorumTimeoutError(LazarusError):
    """Too few nodes for too long. The run ended short, and can be resumed."""

    exit_code = 3

    def __init__(self, *, live: int, needed: int, waited_s: float, awaited: str = "") -> None:
        lacking = f" ({awaited})" if awaited else ""
        super().__init__(
            f"{live} live nodes, {needed} needed, waited {waited_s:.0f} s{lacking}; resume the run "
            f"when nodes are back, or lower cluster.min_nodes"
        )
        self.live, self.needed, self.waited_s = live, needed, waited_s


class LostExpertError(LazarusError):
    """The last live replica of an expert is gone and the policy says to stop there."""

    exit_code = 3

    def __init__(self, *, experts: Sequence[tuple[int, int]], reason: str) -> None:
        shown = ", ".join(f"L{layer}/E{expert}" for layer, expert in experts[:8])
        more = f" and {len(experts) - 8} more" if len(experts) > 8 else ""
        super().__init__(f"no live replica of {shown}{more}: {reason}")
        self.experts, self.reason = tuple(experts), reason


class StoppedError(LazarusError):
    """The driver was told to end; the run is short but can be resumed."""

    exit_code = 3


class UserCodeError(LazarusError):
    """The user's model, loss, data, optimizer, schedule or hook is to blame.

    Attributes:
        where: The user's innermost line, and who was computing what; empty where ``summary`` says.
        summary: The exception, or what is wrong, in one line.
        traceback_text: From the user's first frame to the last; also shown as a note.
        rank, step, phase: Where it happened; -1 and empty where that is not known.
        sample_ids: Samples of the micro-batch.
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
    """A step that ends the process of whoever computes it, one node after the other."""


class UserMistakeError(LazarusError, ValueError):
    """What a function of the user's returned cannot be trained with. Raised in the worker."""


class InternalError(LazarusError):
    """Lazarus itself failed. ``report`` is a file with what a bug report needs."""

    def __init__(self, message: str, *, report: str = "") -> None:
        super().__init__(message)
        self.report = report


class BrokenInvariantError(LazarusError):
    """The protocol says this cannot happen. The state is held; nothing is guessed."""


class StartupError(LazarusError):
    """A worker, a node or the cluster did not come up."""


class RoomTakenError(StartupError):
    """The room for a node went to somebody else before the node had it."""


class ControllerDiedError(StartupError):
    """The controller's process ended before it listened; the launcher reports its exit too.

    ``failure`` is its last word, a ``lazarus.failure.Failure`` as JSON; empty: it had none.
    """

    def __init__(self, message: str, *, failure: str = "") -> None:
        super().__init__(message)
        self.failure = failure


class DataError(LazarusError):
    """The data does not have the form that was promised."""


class CheckpointError(LazarusError):
    """A checkpoint cannot be used: what is missing or damaged, by name."""


class StorageError(CheckpointError):
    """A disk or an object store refused an operation, or did not answer; with its URL."""

    def __init__(self, *, url: str, operation: str, reason: str, is_full: bool = False) -> None:
        super().__init__(f"{operation} {url}: {reason}")
        self.url, self.operation, self.reason = url, operation, reason
        self.is_full = is_full  # no room: another place on the same disk has none either


class JournalError(LazarusError):
    """A run's journal cannot be taken for true: the file, and what is wrong with it."""

    exit_code = 2

    def __init__(self, *, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason


class RecordError(LazarusError, ValueError):
    """A run's record cannot be read: file, line (0: the file itself) and what is wrong with it."""

    exit_code = 2

    def __init__(self, *, path: str, line: int, reason: str) -> None:
        super().__init__(f"{path}:{line}: {reason}" if line else f"{path}: {reason}")
        self.path, self.line, self.reason = path, line, reason

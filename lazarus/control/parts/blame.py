"""What is held against nodes and against the user's code."""

from __future__ import annotations

from dataclasses import dataclass

# Signals that a process brings upon itself; SIGKILL, SIGTERM and the like come from elsewhere.
OWN_SIGNALS = frozenset({"SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGTRAP", "SIGSYS"})
EXITED = "exit code "  # how the signature of a process that exited begins


@dataclass(frozen=True, kw_only=True, slots=True)
class Death:
    """A process that died inside a user function."""

    worker: str
    node: str  # node key
    generation: int
    step: int
    phase: str
    signature: str  # "exit code 3", "SIGSEGV"; empty: not known
    sample_ids: tuple[int, ...] = ()
    place: str = ""  # line of the user's code
    crash: str = ""  # what the process wrote while it crashed
    shown: str = ""  # the part of ``crash`` that is user code

    @property
    def is_own(self) -> bool:
        """Whether the process ended by itself: by an exit code or a signal it raised."""
        return self.signature.startswith(EXITED) or self.signature in OWN_SIGNALS


@dataclass(frozen=True, kw_only=True, slots=True)
class Gone:
    """A process whose stream has closed and whose launcher has not yet reported how it ended."""

    worker: str
    generation: int  # in which the process computed
    step: int  # that the process computed, or waited to compute
    at_s: float

    @property
    def node(self) -> str:
        """Key of the process's node."""
        return self.worker.rpartition(".")[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Blame:
    """Evidence on who causes failures.

    ``membership/suspicion.py`` judges failed collectives, ``membership/blame.py`` deaths inside
    user functions and errors, and ``membership/members.py`` notes which losses never count.
    """

    suspicion_s: float | None = None
    complaints: tuple[int, ...] = ()  # nodes whose collectives failed in this generation, in order
    errors: tuple[tuple[int, ...], ...] = ()  # first complaints of generations without a commit
    deaths: tuple[Death, ...] = ()  # inside user functions, at steps not yet committed
    unexplained: tuple[Gone, ...] = ()  # lost members; the launcher has not reported how they ended
    excused: frozenset[str] = frozenset()  # keys of lost nodes whose deaths never count
    hung: frozenset[str] = frozenset()  # keys of nodes lost because a thread made no progress
    raised: tuple[tuple[int, int], ...] = ()  # (node, step) of errors of Lazarus itself

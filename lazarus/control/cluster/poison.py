"""Steps that end processes: when deaths are no news of machines but of the user's code. Pure.

A process that ends inside one of the user's functions cannot say why. One death is a loss like any
other. The rule for more of them, at the same step in the same function, the step being uncommitted:

* Two nodes whose processes *ended by themselves* in the same way (the same exit code; the same
  signal that a process brings upon itself, such as SIGSEGV) have met a bug, at the first attempt
  or at the redo.
* A death that may have come from outside (SIGKILL, a machine that is gone) shows a bug only where
  it happens for the third time, each time in another attempt: three machines may well fail at
  once, but not each new attempt at one step just there.

* A thread that stood still there, so that its node was given up, shows a bug where it happens on a
  second node, in another attempt: a machine may hang, but not two of them one after the other.

Faults on purpose never count. A commit of the step forgets its deaths.

A stream ends before the launcher tells how its process did. Where that word may be the one that
shows a bug, the step is not tried again before it has come (``awaited``), within a bound.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# Signals that a process brings upon itself; SIGKILL, SIGTERM and the like come from elsewhere.
OWN_SIGNALS = frozenset({"SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGTRAP", "SIGSYS"})
ATTEMPTS = 3  # after which deaths from outside are no chance any more
HUNG_ATTEMPTS = 2  # the same for threads that stood still
HUNG = "no progress"  # signature of a process that was ended because its thread stood still
_EXITED = "exit code "
_AFTER_COMMIT = frozenset({"on_commit", "evaluate"})  # phases in which their step is committed


@dataclass(frozen=True, kw_only=True, slots=True)
class Death:
    """A process that ended inside a function of the user's."""

    worker: str
    node: str  # its key
    generation: int
    step: int
    phase: str
    signature: str  # "exit code 3", "SIGSEGV"; empty: not known
    sample_ids: tuple[int, ...] = ()
    place: str = ""  # of the user's code
    crash: str = ""  # what the process wrote while it crashed
    shown: str = ""  # the user's part of it

    @property
    def is_own(self) -> bool:
        """Whether the process ended itself."""
        return self.signature.startswith(_EXITED) or self.signature in OWN_SIGNALS


@dataclass(frozen=True, kw_only=True, slots=True)
class Gone:
    """A process whose stream has ended, and of which the launcher has not said how it ended."""

    worker: str
    generation: int  # in which it computed
    step: int  # that it computed, or waited to
    at_s: float

    @property
    def node(self) -> str:
        return self.worker.rpartition(".")[0]


def signature_of(cause: str, crash: str) -> str:
    """How a process ended, of what its launcher says and what it wrote while it crashed."""
    if cause in OWN_SIGNALS:
        return cause
    if cause.startswith(f"process {_EXITED}"):
        return cause.removeprefix("process ")
    for words, name in _CRASHES:
        if words in crash:
            return name
    return cause if cause.startswith("SIG") else ""


_CRASHES = (  # first lines of faulthandler
    ("Segmentation fault", "SIGSEGV"),
    ("Aborted", "SIGABRT"),
    ("Bus error", "SIGBUS"),
    ("Floating point exception", "SIGFPE"),
    ("Illegal instruction", "SIGILL"),
)


def poisoned(deaths: tuple[Death, ...]) -> tuple[Death, ...]:
    """Those deaths that together show a bug of the user's code; empty: nothing is shown."""
    if not deaths:
        return ()
    last = deaths[-1]
    alike = [d for d in deaths if d.step == last.step and _same_code(d, last)]
    own = [d for d in alike if d.is_own and d.signature == last.signature]
    if last.is_own and len({d.node for d in own}) > 1:
        return tuple(own)
    attempts = {d.generation: d for d in alike}
    hung = [d for d in attempts.values() if d.signature == HUNG]
    if len({d.node for d in hung}) >= HUNG_ATTEMPTS:
        return tuple(hung)
    nodes = {d.node for d in attempts.values()}
    return tuple(attempts.values()) if min(len(attempts), len(nodes)) >= ATTEMPTS else ()


def awaited(deaths: tuple[Death, ...], gone: tuple[Gone, ...], *, step: int) -> tuple[Gone, ...]:
    """Those of the gone whose launcher's word may show a bug; empty: no word would.

    Args:
        step: The last one that is committed.
    """
    known = still_open(deaths, step=step)
    unsure = tuple(g for g in gone if g.step > step)
    if not unsure:
        return ()
    nodes = {d.node for d in known} | {g.node for g in unsure}
    attempts = {d.generation for d in known} | {g.generation for g in unsure}
    may_show = min(len(nodes), len(attempts)) >= ATTEMPTS
    if any(death.is_own for death in known):
        may_show = len(nodes) > 1
    return unsure if may_show else ()


def _same_code(one: Death, other: Death) -> bool:
    """The same function, or the same line: what reads ahead dies in whatever phase others are."""
    return one.phase == other.phase or bool(one.crash and one.place and one.place == other.place)


def still_open(deaths: Iterable[Death], *, step: int) -> tuple[Death, ...]:
    """Deaths that the commit of ``step`` does not forget."""
    return tuple(d for d in deaths if d.step + (d.phase in _AFTER_COMMIT) > step)


def common_samples(deaths: Iterable[Death]) -> tuple[int, ...]:
    """Samples that every one of the dead was computing; of any, where they had none in common."""
    ids = [set(d.sample_ids) for d in deaths if d.sample_ids]
    if not ids:
        return ()
    return tuple(sorted(set.intersection(*ids) or set.union(*ids)))

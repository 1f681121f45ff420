"""Poisoned steps: deciding whether process deaths are caused by user code. Pure.

A process that dies inside a user function cannot report why. A single death is treated like any
other node loss. Several deaths at the same uncommitted step, in the same user function, are blamed
on the user's code as follows:

* Processes of two nodes that *ended by themselves* in the same way (the same exit code, or the same
  signal that a process raises itself, such as SIGSEGV) show a bug, even in one attempt.
* A death that may have an outside cause (SIGKILL, a lost machine) shows a bug only at the third
  node, each in another attempt at the step: three machines may fail together, but hardly one in
  each attempt at the same place.
* A thread that stopped making progress, so that its node was given up, shows a bug at the second
  node, in another attempt.

Injected faults never count. Once the step is committed its deaths are dropped.

The stream of a dead process closes before its launcher reports how the process ended. If that
report could show a bug, the step is not retried until the report arrives (``awaited``); the caller
limits this wait.
"""

from __future__ import annotations

from collections.abc import Iterable

from lazarus.control.parts.blame import EXITED, OWN_SIGNALS, Death, Gone

ATTEMPTS = 3  # deaths with an outside cause that show a bug
HUNG_ATTEMPTS = 2  # the same for threads without progress
HUNG = "no progress"  # signature of a process that was ended because its thread made no progress
_AFTER_COMMIT = frozenset({"on_commit", "evaluate"})  # phases after the commit of their step


def signature_of(cause: str, crash: str) -> str:
    """How a process ended: "exit code N", a signal name, or empty if unknown.

    Args:
        cause: What the launcher reported.
        crash: What the process wrote while it crashed (faulthandler's text).
    """
    if cause in OWN_SIGNALS:
        return cause
    if cause.startswith(f"process {EXITED}"):
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
    """The deaths that together show a bug in user code; empty if they show none.

    Only deaths at the step and in the code of the last death are considered.
    """
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
    """The processes in ``gone`` whose launcher report is worth waiting for.

    Args:
        deaths: Deaths known so far.
        gone: Processes whose launcher has not reported yet.
        step: The last committed step.

    Returns:
        The processes of uncommitted steps; empty if no report could show a bug in user code.
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
    """Whether two deaths happened in the same user function, or at the same line of a crash.

    A prefetching thread crashes at its own line, in whichever phase the training thread is.
    """
    return one.phase == other.phase or bool(one.crash and one.place and one.place == other.place)


def still_open(deaths: Iterable[Death], *, step: int) -> tuple[Death, ...]:
    """The deaths that still count once ``step`` is committed."""
    return tuple(d for d in deaths if d.step + (d.phase in _AFTER_COMMIT) > step)


def common_samples(deaths: Iterable[Death]) -> tuple[int, ...]:
    """Sample ids that all dead processes were computing; if they share none, the ids of any."""
    ids = [set(d.sample_ids) for d in deaths if d.sample_ids]
    if not ids:
        return ()
    return tuple(sorted(set.intersection(*ids) or set.union(*ids)))

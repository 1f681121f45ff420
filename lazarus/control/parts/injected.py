"""The faults that a run injects on purpose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class InjectedFaults:
    """The injected faults so far, which ``machine.py`` records and nobody is blamed for."""

    fired: Mapping[int, float] = field(default_factory=dict)  # node -> time of its injected fault
    struck: frozenset[tuple[str, int]] = frozenset()  # (worker, number) of the faults on record
    fired_specs: frozenset[str] = frozenset()  # specs of the scripted faults among them
    doomed: frozenset[int] = frozenset()  # nodes that got an injected crash

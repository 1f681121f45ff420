"""Policies of somebody else: what they answer is checked, and used only if it holds."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from lazarus.checkpoint.restoring.policy import (
    ClusterView,
    Hold,
    RecoveryPolicy,
    decided_by_setting,
    decision_of,
    on_history,
)
from lazarus.checkpoint.restoring.restore_choice import Loss, RecoveryDecision
from placement import PlacementPolicy, PlacementRequest, Plan, replan
from placement.testing import assert_valid

T = TypeVar("T")


class CheckedPlacement:
    """Asks a placement policy; takes the library's greedy plan where its answer cannot be used.

    That is: an exception, no answer in time, something that is no plan, or a plan that does not
    answer the request. ``Plan.fallback`` of the plan that is used instead says which.
    """

    def __init__(self, policy: PlacementPolicy, *, limit_s: float | None) -> None:
        """``limit_s`` bounds the wait for a plan; None waits as long as it takes."""
        self._policy, self._stranger = policy, _Stranger(limit_s)

    def __call__(
        self, request: PlacementRequest, *, previous: Plan | None, lost: frozenset[int]
    ) -> Plan:
        """A plan that answers the request.

        Raises:
            InfeasiblePlacementError: There is none.
        """

        def ask() -> Plan:
            plan = self._policy(request, previous=previous, lost=lost)
            if not isinstance(plan, Plan):
                raise TypeError(f"it returned {type(plan).__name__}, not a placement.Plan")
            assert_valid(plan, request)
            return plan

        plan, refused = self._stranger.answer(ask)
        if plan is None:
            plan = replan(replace(request, solver="greedy"), previous=previous, lost=lost)
        return replace(plan, fallback=refused)


class CheckedRecovery:
    """Asks a recovery policy; ``on_lost_expert`` decides where its answer cannot be carried out."""

    def __init__(
        self, policy: RecoveryPolicy, *, limit_s: float | None, on_lost_expert: str
    ) -> None:
        """``limit_s`` as in ``CheckedPlacement``."""
        self._policy, self._stranger = policy, _Stranger(limit_s)
        self._on_lost_expert = on_lost_expert

    def __call__(
        self, losses: Sequence[Loss], view: ClusterView, *, now_s: float
    ) -> RecoveryDecision | Hold:
        """A decision that can be carried out."""
        asked, seen = on_history(losses, view)
        decision, refused = self._stranger.answer(
            lambda: decision_of(self._policy(asked, seen, now_s=now_s), asked, seen)
        )
        if decision is not None:
            return decision
        return replace(decided_by_setting(losses, view, self._on_lost_expert), refused=refused)


class _Stranger:
    """Calls a stranger's code in a thread that can be left behind."""

    def __init__(self, limit_s: float | None) -> None:
        self._limit_s = limit_s
        self._late: threading.Thread | None = None  # still at an answer that came too late

    def __reduce__(self) -> tuple[object, ...]:
        return _Stranger, (self._limit_s,)

    def answer(self, ask: Callable[[], T]) -> tuple[T | None, str]:
        """The answer, or None and why there is none."""

        def safely() -> tuple[T | None, str]:
            try:
                return ask(), ""
            except Exception as problem:  # noqa: BLE001 - a stranger's code may raise anything
                return None, f"{type(problem).__name__}: {problem}"

        if self._limit_s is None:
            return safely()
        if self._late is not None and self._late.is_alive():
            return None, "it is still at an earlier answer"
        answers: queue.SimpleQueue[tuple[T | None, str]] = queue.SimpleQueue()
        thread = threading.Thread(target=lambda: answers.put(safely()), name="policy", daemon=True)
        thread.start()
        try:
            return answers.get(timeout=self._limit_s)
        except queue.Empty:
            self._late = thread
            return None, f"no answer within {1000 * self._limit_s:g} ms (placement.max_plan_ms)"

"""Call users' policies with a time limit, and use their answers only if they are valid."""

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
    """Calls a user's placement policy; uses the built-in greedy plan if the answer is unusable.

    An answer is unusable if the policy raises, takes too long, or returns something that is not a
    plan or does not satisfy the request. ``Plan.fallback`` of the greedy plan gives the reason.
    """

    def __init__(self, policy: PlacementPolicy, *, limit_s: float | None) -> None:
        """Wait at most ``limit_s`` seconds for a plan; None waits without limit."""
        self._policy, self._stranger = policy, _Stranger(limit_s)

    def __call__(
        self, request: PlacementRequest, *, previous: Plan | None, lost: frozenset[int]
    ) -> Plan:
        """A plan that satisfies the request.

        Raises:
            InfeasiblePlacementError: There is no such plan.
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
    """Calls a user's recovery policy; ``on_lost_expert`` decides if the answer is unusable."""

    def __init__(
        self, policy: RecoveryPolicy, *, limit_s: float | None, on_lost_expert: str
    ) -> None:
        """Wait at most ``limit_s`` seconds for an answer; None waits without limit."""
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
    """Calls a user's code in a thread that is abandoned after a time limit."""

    def __init__(self, limit_s: float | None) -> None:
        self._limit_s = limit_s
        self._late: threading.Thread | None = None  # an abandoned call that may still be running

    def __reduce__(self) -> tuple[object, ...]:
        return _Stranger, (self._limit_s,)

    def answer(self, ask: Callable[[], T]) -> tuple[T | None, str]:
        """The answer and an empty string, or None and the reason why there is no answer."""

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

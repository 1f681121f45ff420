"""Policies as a user writes them, found by dotted path."""

from __future__ import annotations

from collections.abc import Sequence

from lazarus.recovery import Answer, ClusterView, ExpertLoss, Hold, Rollback, Stop
from placement import PlacementRequest, Plan, replan


class GivesUp:
    """Good for the first plan; the replan after a loss raises."""

    def __call__(
        self, request: PlacementRequest, *, previous: Plan | None, lost: frozenset[int]
    ) -> Plan:
        if lost:
            raise RuntimeError(f"lost {sorted(lost)}, and no idea")
        return replan(request, previous=previous, lost=lost)


class Oldest:
    """Every lost expert from its oldest copy: from the seed."""

    def __call__(self, losses: Sequence[ExpertLoss], view: ClusterView, *, now_s: float) -> Answer:
        return {(x.layer, x.expert): min(x.copies, key=lambda copy: copy.step) for x in losses}


def stop(losses: Sequence[ExpertLoss], view: ClusterView, *, now_s: float) -> Answer:
    return Stop(reason=f"{len(losses)} experts at step {view.step}")


class Patient(Oldest):
    """The same, a minute later."""

    def __call__(self, losses: Sequence[ExpertLoss], view: ClusterView, *, now_s: float) -> Answer:
        return (
            Hold(for_s=60.0) if view.waited_s < 60 else super().__call__(losses, view, now_s=now_s)
        )


class FromTheStart:
    """All state back to the start of the run."""

    def __call__(self, losses: Sequence[ExpertLoss], view: ClusterView, *, now_s: float) -> Answer:
        return Rollback(step=view.start_step)


class ToTheNewest:
    """All state back to the newest checkpoint there is."""

    def __call__(self, losses: Sequence[ExpertLoss], view: ClusterView, *, now_s: float) -> Answer:
        return Rollback(step=max([view.start_step, *(c.step for c in view.checkpoints)]))

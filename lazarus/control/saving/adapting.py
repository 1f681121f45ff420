"""Adapts the schedule of saves to measured copy and write rates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from lazarus.checkpoint.selection.adaptive import Adapted, Measured, adapt, busiest_rank, default_of
from lazarus.control.cluster.state import Control
from lazarus.control.ports import Publish
from placement import Plan

WANTED = "checkpoint schedule"  # reason of a pause for a new schedule


def on_measured(state: Control, worker: str, record: Mapping[str, Any]) -> Control:
    """Note the rates that a rank measured while it wrote its share of a checkpoint.

    Once all ranks have reported, a pause is requested if the adapted schedule differs much from the
    default. Later changes take effect at the next RESUME, without a pause of their own.
    """
    figures = record.get("measured")
    if figures is None or not state.config.saves.is_adaptive:
        return state
    found = Measured(**{name: float(value) for name, value in figures.items()})
    state = replace(
        state, saving=replace(state.saving, measured={**state.saving.measured, worker: found})
    )
    if (
        state.saving.adapted is not None
        or not set(state.saving.measured) >= set(state.standing.seats)
        or state.pausing.wants
    ):
        return state
    plan = state.standing.plan
    assert plan is not None
    chosen = chosen_for(state, plan)
    layers, experts = state.standing.shape
    default = default_of(state.config.saves, num_layers=layers, num_experts=experts)
    if chosen is not None and chosen.is_far_from(default):
        return replace(state, pausing=replace(state.pausing, wants=WANTED))
    return replace(state, saving=replace(state.saving, adapted=default))


def chosen_for(state: Control, plan: Plan) -> Adapted | None:
    """The adapted schedule under a plan; None if not adaptive or nothing is measured yet."""
    known = [
        state.saving.measured[worker]
        for worker in state.standing.seats
        if worker in state.saving.measured
    ]
    if not known or not state.config.saves.is_adaptive or state.committed.step_s <= 0:
        return None
    layers, experts = state.standing.shape
    busiest = partial(
        busiest_rank,
        ranks_of=plan.ranks_of,
        num_ranks=plan.num_nodes * state.config.ranks_per_node,
        num_layers=layers,
        num_experts=experts,
        expert_bytes=state.standing.record_bytes[1],
        dense_bytes=state.standing.record_bytes[0],
    )
    return adapt(
        state.config.saves,
        known,
        num_layers=layers,
        num_experts=experts,
        step_s=state.committed.step_s,
        busiest=busiest,
    )


def at_resume(state: Control, plan: Plan) -> Adapted | None:
    """The schedule in force from the RESUME of ``plan`` on; None: as configured."""
    return chosen_for(state, plan) or state.saving.adapted


def adapted_events(state: Control, before: Adapted | None, *, at_s: float) -> tuple[Publish, ...]:
    """An event if the schedule changed, with the rates it is based on."""
    now = state.saving.adapted
    if now is None or now == before:
        return ()
    known = [m for worker, m in state.saving.measured.items() if worker in state.standing.seats]
    fields = {
        "generation": state.resumed,
        "step": state.step,
        "k_snapshot": now.k_snapshot,
        "snapshot_every": now.snapshot_every,
        "persist_every": now.persist_every,
        "copy_rate": min((m.copy_rate for m in known), default=0.0),
        "write_rate": min((m.write_rate for m in known), default=0.0),
        "window_s": min((m.window_s for m in known), default=0.0),
    }
    return (Publish(t=at_s, event="checkpoint_adapted", fields=fields),)

"""Experts without a live replica: where they come back from, and the bill (rules 27 and 29)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from msgspec.structs import replace as changed

from lazarus.checkpoint.plt import portion_lost
from lazarus.checkpoint.policy import ClusterView, Hold, decided_by_setting
from lazarus.checkpoint.recovery import (
    Copy,
    Fail,
    Loss,
    RecoveryDecision,
    RestoredExpert,
    Rollback,
    Source,
)
from lazarus.checkpoint.recovery import Restore as CheckpointRestore
from lazarus.control.messages import Restore
from lazarus.control.ports import Publish
from lazarus.control.saves import in_flight, worth_waiting
from lazarus.control.state import Control, Transition
from placement import Plan

Expert = tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class WayBack:
    """What brings lost experts back.

    Attributes:
        restores: Where each comes from.
        step: To roll all state back to; None: go on where we stand.
        refused: Why the user's policy did not decide this; empty if it did or there is none.
    """

    restores: tuple[Restore, ...] = ()
    step: int | None = None
    refused: str = ""


def restores_for(
    state: Control, transition: Transition, plan: Plan, lost: Sequence[Expert], *, at_s: float
) -> WayBack | Fail | Hold:
    """What brings back the experts that nobody holds."""
    if not lost:
        return WayBack()
    if not state.resumed:
        return WayBack(restores=tuple(_at_start(state, transition, e) for e in lost))
    decision = _decide(state, transition, plan, lost, at_s=at_s)
    if isinstance(decision, Fail | Hold):
        return decision
    if isinstance(decision, Rollback):
        if (place := place_of_checkpoint(state, decision.step)) in state.bad_sources:
            reason = f"{decision.reason}; but it cannot be read: {place}"
            return Fail(reason=reason, experts=tuple(lost))
        everything = _everything_from(state, decision.step)
        return WayBack(restores=everything, step=decision.step, refused=decision.refused)
    restores = tuple(_restore(state, choice) for choice in decision.experts)
    return WayBack(restores=restores, refused=decision.refused)


def _decide(
    state: Control, transition: Transition, plan: Plan, lost: Sequence[Expert], *, at_s: float
) -> RecoveryDecision | Hold:
    """The user's policy decides if there is one, unless it has held everything up too long."""
    config = state.config
    losses = [_loss(state, transition, plan, expert) for expert in lost]
    view = _view(state, transition, at_s=at_s)
    if config.recovery is not None and view.waited_s <= config.start_timeout_s:
        return config.recovery(losses, view, now_s=at_s)
    return decided_by_setting(losses, view, config.on_lost_expert)


def _view(state: Control, transition: Transition, *, at_s: float) -> ClusterView:
    readable = (
        c for c in state.checkpoints if place_of_checkpoint(state, c.step) not in state.bad_sources
    )
    return ClusterView(
        step=transition.step,
        nodes=transition.next_nodes,
        lineage=state.lineage,
        checkpoints=tuple(readable),
        start_step=state.config.start_step,
        in_flight=in_flight(state, upto=transition.step),
        plt=plt_of(state),
        plt_budget=state.config.plt_budget,
        waited_s=at_s - transition.phase_s,
    )


def checkpoint_awaited(
    state: Control, transition: Transition, plan: Plan, lost: Sequence[Expert], *, at_s: float
) -> bool:
    """Whether lost experts come back better from a checkpoint that the survivors still write.

    A rollback waits for any newer one; a restore only where it would start an expert afresh.
    """
    config = state.config
    if config.recovery is not None or config.on_lost_expert == "fail":
        return False  # a policy of the user's knows what is in flight, and may hold
    if not lost or not worth_waiting(state, transition, at_s=at_s):
        return False
    decision = _decide(state, transition, plan, lost, at_s=at_s)
    if isinstance(decision, Rollback):
        return True
    found = decision.experts if isinstance(decision, CheckpointRestore) else ()
    return any(choice.source is Source.INITIAL for choice in found)


def place_of_checkpoint(state: Control, step: int) -> str:
    """Where the state of a step is read: "url step", or "init" for a fresh start from the seed."""
    config = state.config
    if config.resume is not None and step <= config.start_step:
        return f"{config.resume} {step}"
    return f"{config.checkpoint_url} {step}" if step > 0 else "init"


def bad_source_of(restore: Restore) -> str:
    """How a copy that could not be read is named, so that it is not chosen again."""
    kind = restore.source.partition(":")[0]
    expert = f"L{restore.layer}/E{restore.expert}"
    if kind == "storage":
        return f"storage {expert}"
    return f"{restore.source} {expert} g{restore.generation} t{restore.step}"


def _at_start(state: Control, transition: Transition, expert: Expert) -> Restore:
    """The first generation: from the seed, or from the checkpoint that the run starts from."""
    layer, name = expert
    if state.config.resume is None:
        source = "init"
    else:
        source = f"storage:{state.config.resume} {state.config.start_step}"
    return Restore(layer=layer, expert=name, source=source, generation=0, step=transition.step)


def _everything_from(state: Control, step: int) -> tuple[Restore, ...]:
    layers, experts = state.shape
    place = place_of_checkpoint(state, step)
    source = place if place == "init" else f"storage:{place}"
    return tuple(
        Restore(layer=layer, expert=expert, source=source, generation=0, step=step)
        for layer in range(layers)
        for expert in range(experts)
    )


def _loss(state: Control, transition: Transition, plan: Plan, expert: Expert) -> Loss:
    layer, name = expert
    known = [*_in_memory(state, transition, expert), *_on_storage(state, expert)]
    copies = [c for c in known if bad_source_of(_restore_from(state, c)) not in state.bad_sources]
    first = Copy(layer=layer, expert=name, generation=0, step=0, source=Source.INITIAL)
    if not state.config.resume:
        copies.append(first)
    per_node = state.config.ranks_per_node
    targets = {plan.node_ids[rank // per_node] for rank in plan.ranks_of(layer, name)}
    return Loss(
        layer=layer,
        expert=name,
        targets=tuple(sorted(targets)),
        routed=int(state.routed[layer, name]),
        copies=tuple(copies),
    )


def _in_memory(state: Control, transition: Transition, expert: Expert) -> list[Copy]:
    found = []
    for worker, body in transition.aligned.items():
        node = state.workers[worker].node
        for snap in body.snapshots:
            if (snap.layer, snap.expert) == expert:
                found.append(
                    Copy(
                        layer=snap.layer,
                        expert=snap.expert,
                        generation=snap.generation,
                        step=snap.step,
                        source=Source.OTHER_NODE,
                        node=node,
                        routed=snap.routed,
                        num_bytes=snap.num_bytes,
                    )
                )
    return found


def _on_storage(state: Control, expert: Expert) -> list[Copy]:
    return [
        Copy(
            layer=stored.layer,
            expert=stored.expert,
            generation=stored.generation,
            step=stored.step,
            source=Source.STORAGE,
            routed=stored.routed,
        )
        for stored in state.stored
        if (stored.layer, stored.expert) == expert
    ]


def _restore(state: Control, choice: RestoredExpert) -> Restore:
    detail = f"{choice.source.label},{choice.behind_steps},{choice.copy.routed}"
    return changed(_restore_from(state, choice.copy), detail=detail)


def _restore_from(state: Control, copy: Copy) -> Restore:
    if copy.source in (Source.OWN_NODE, Source.OTHER_NODE):
        worker = state.nodes[copy.node].workers[0]
        place = f"keeper:{state.workers[worker].keeper}"
    elif copy.source is Source.STORAGE:
        place = f"storage:{place_of_checkpoint(state, max(copy.step, 1))}"
    else:
        place = "init"
    return Restore(
        layer=copy.layer,
        expert=copy.expert,
        source=place,
        generation=copy.generation,
        step=copy.step,
    )


def restored_entry(restore: Restore) -> dict[str, Any]:
    """What the journal keeps of a choice."""
    return {
        "layer": restore.layer,
        "expert": restore.expert,
        "source": restore.source,
        "generation": restore.generation,
        "step": restore.step,
        "detail": restore.detail,
    }


def _really(restore: Restore, transition: Transition) -> tuple[str, int, int]:
    """Source, steps behind and count of the version that came back.

    A damaged file on storage is passed over for the next older version; the ranks say so.
    """
    label, behind, version = restore.detail.split(",")
    for body in transition.ready.values():
        for read in body.restored:
            if (read.layer, read.expert) == (restore.layer, restore.expert):
                return label, transition.step - read.step, read.routed
    return label, int(behind), int(version)


def over_budget(state: Control) -> bool:
    """Whether the tokens lost since K was last doubled exceed the budget (Dynamic-K)."""
    return plt_of(state) - state.plt_spent > state.config.plt_budget


def plt_of(state: Control) -> float:
    """The paper's PLT of the run so far."""
    return portion_lost(state.plt.lost_by_expert(), routed=state.routed.tolist())


def bill_restores(
    state: Control, transition: Transition, *, at_s: float
) -> tuple[tuple[Publish, ...], Control]:
    """One event per restored expert, and the portion of lost tokens so far."""
    events: list[Publish] = []
    if transition.rollback:
        state = replace(state, plt=state.plt.rolled_back(state.routed.tolist()))
        fields: dict[str, Any] = {"generation": transition.generation, "step": transition.step}
        return (Publish(t=at_s, event="rolled_back", fields=fields),), state
    for restore in transition.restores:
        if not restore.detail:
            continue  # the start of a run loses nothing
        label, behind, version = _really(restore, transition)
        ledger, lost = state.plt.restored(
            layer=restore.layer,
            expert=restore.expert,
            version_routed=version,
            routed=int(state.routed[restore.layer, restore.expert]),
        )
        state = replace(state, plt=ledger)
        fields = {
            "generation": transition.generation,
            "layer": restore.layer,
            "expert": restore.expert,
            "source": label,
            "behind_steps": behind,
            "lost_copies": lost,
            "step": transition.step,
        }
        events.append(Publish(t=at_s, event="expert_restored", fields=fields))
    return tuple(events), state

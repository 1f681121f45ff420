"""Lost experts: the copies to restore them from, and the tokens lost (rules 27 and 29)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from msgspec.structs import replace as changed

from lazarus.checkpoint.format.lineage import is_valid
from lazarus.checkpoint.restoring.plt import portion_lost
from lazarus.checkpoint.restoring.policy import ClusterView, Hold, decided_by_setting
from lazarus.checkpoint.restoring.restore_choice import (
    Copy,
    Fail,
    Loss,
    RecoveryDecision,
    RestoredExpert,
    Rollback,
    Source,
)
from lazarus.checkpoint.restoring.restore_choice import Restore as CheckpointRestore
from lazarus.control.cluster.state import Control
from lazarus.control.cluster.transition import Transition
from lazarus.control.messages import Ready, Restore, SnapshotHeld
from lazarus.control.ports import Publish
from lazarus.control.saving.saves import in_flight, worth_waiting
from placement import Plan

Expert = tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class WayBack:
    """How lost experts are restored.

    Attributes:
        restores: The copy for each expert.
        step: Step to which all state is rolled back; None: go on at the present step.
        refused: Why the user's policy was not followed; empty if it was or there is none.
    """

    restores: tuple[Restore, ...] = ()
    step: int | None = None
    refused: str = ""


def restores_for(
    state: Control, transition: Transition, plan: Plan, lost: Sequence[Expert], *, at_s: float
) -> WayBack | Fail | Hold:
    """Choose how to restore lost experts, or all state if it must be rolled back.

    Returns:
        The way back, ``Fail`` if there is none, or ``Hold`` if the user's policy wants to wait.
    """
    if transition.restarts:
        return restart(state, transition)
    if transition.goes_back and not lost:
        lost = ((0, 0),)
    if not lost:
        return WayBack()
    if not state.resumed:
        return WayBack(restores=tuple(_at_start(state, transition, e) for e in lost))
    decision = _decide(state, transition, plan, lost, at_s=at_s)
    if isinstance(decision, Fail | Hold):
        return decision
    if isinstance(decision, Rollback):
        if (place := place_of_checkpoint(state, decision.step)) in state.storage.bad_sources:
            reason = f"{decision.reason}; but it cannot be read: {place}"
            return Fail(reason=reason, experts=tuple(lost))
        everything = _everything_from(state, decision.step, is_exact=True)
        return WayBack(restores=everything, step=decision.step, refused=decision.refused)
    restores = tuple(_restore(state, choice) for choice in decision.experts)
    return WayBack(restores=restores, refused=decision.refused)


def _decide(
    state: Control, transition: Transition, plan: Plan, lost: Sequence[Expert], *, at_s: float
) -> RecoveryDecision | Hold:
    """Ask the user's policy, or decide by the settings if there is none or it has held too long."""
    config = state.config
    losses = [_loss(state, transition, plan, expert) for expert in lost]
    view = _view(state, transition, at_s=at_s)
    if transition.goes_back:
        return decided_by_setting(losses, view, "rollback")
    if config.recovery is not None and view.waited_s <= config.timeouts.startup_s:
        return config.recovery(losses, view, now_s=at_s)
    return decided_by_setting(losses, view, config.on_lost_expert)


def _view(state: Control, transition: Transition, *, at_s: float) -> ClusterView:
    readable = (
        c
        for c in state.storage.checkpoints
        if place_of_checkpoint(state, c.step) not in state.storage.bad_sources
    )
    return ClusterView(
        step=transition.step,
        nodes=transition.next_nodes,
        lineage=state.standing.lineage,
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
    """Whether to wait for a checkpoint in flight before lost experts are restored.

    A rollback waits for any newer checkpoint; a restore only if an expert would otherwise start
    from its initial weights.
    """
    config = state.config
    if config.recovery is not None or config.on_lost_expert == "fail":
        return False  # a user's policy sees what is in flight, and may hold
    if not lost or not worth_waiting(state, transition, at_s=at_s):
        return False
    decision = _decide(state, transition, plan, lost, at_s=at_s)
    if isinstance(decision, Rollback):
        return True
    found = decision.experts if isinstance(decision, CheckpointRestore) else ()
    return any(choice.source is Source.INITIAL for choice in found)


def place_of_checkpoint(state: Control, step: int) -> str:
    """The place of a step's checkpoint: "url step", or "init" for initial state from the seed."""
    config = state.config
    if config.resume is not None and step <= config.start_step:
        return f"{config.resume} {step}"
    return f"{config.checkpoint_url} {step}" if step > 0 else "init"


def bad_source_of(restore: Restore) -> str:
    """The name of a copy in ``bad_sources``, as a rank reports it if the copy cannot be read."""
    kind = restore.source.partition(":")[0]
    expert = f"L{restore.layer}/E{restore.expert}"
    if kind == "storage":
        return f"storage {expert}"
    return f"{restore.source} {expert} g{restore.generation} t{restore.step}"


def _at_start(state: Control, transition: Transition, expert: Expert) -> Restore:
    """A restore at the start of the run: from the seed, or from the starting checkpoint."""
    config = state.config
    place = "init" if config.resume is None else f"{config.resume} {config.start_step}"
    return _from_checkpoint(state, expert, place, step=transition.step, is_exact=False)


def _everything_from(state: Control, step: int, *, is_exact: bool) -> tuple[Restore, ...]:
    """Restores of all experts from a checkpoint; see ``_from_checkpoint``."""
    layers, experts = state.standing.shape
    place = place_of_checkpoint(state, step)
    return tuple(
        _from_checkpoint(state, (layer, expert), place, step=step, is_exact=is_exact)
        for layer in range(layers)
        for expert in range(experts)
    )


def _from_checkpoint(
    state: Control, expert: Expert, place: str, *, step: int, is_exact: bool
) -> Restore:
    """A restore of one expert from a checkpoint.

    If the expert's file is damaged or cannot be read, an exact restore fails as a whole. Otherwise
    the expert is read from its next older version (source "newest:").
    """
    layer, name = expert
    kind = "storage" if is_exact else "newest"
    source = place if place == "init" else f"{kind}:{place}"
    upto = min(step, state.storage.readable.get(expert, step))
    return Restore(layer=layer, expert=name, source=source, generation=0, step=upto)


def restart(state: Control, transition: Transition) -> WayBack:
    """Restore all state from the checkpoint at ``transition.step``, after all nodes were lost."""
    is_exact = state.config.on_lost_expert != "partial"
    step = transition.step
    return WayBack(restores=_everything_from(state, step, is_exact=is_exact), step=step)


def restart_step(state: Control) -> int | None:
    """The step from which a run restarts after all its nodes were lost.

    Returns:
        The step of the newest valid, readable checkpoint, full ones first unless ``on_lost_expert``
        is "partial"; else the step at which the run started. None if that cannot be read either.
    """
    wants_full = state.config.on_lost_expert != "partial"
    lineage = state.standing.lineage
    standing = [
        c
        for c in state.storage.checkpoints
        if is_valid(generation=c.generation, step=c.step, lineage=lineage, resume_step=state.step)
        and place_of_checkpoint(state, c.step) not in state.storage.bad_sources
    ]
    best = max(standing, key=lambda c: (c.is_full and wants_full, c.step), default=None)
    if best is not None:
        return best.step
    first = place_of_checkpoint(state, state.config.start_step)
    return None if first in state.storage.bad_sources else state.config.start_step


def _loss(state: Control, transition: Transition, plan: Plan, expert: Expert) -> Loss:
    layer, name = expert
    known = [*_in_memory(state, transition, expert), *_on_storage(state, expert)]
    bad = state.storage.bad_sources
    copies = [c for c in known if bad_source_of(_restore_from(state, c)) not in bad]
    first = Copy(layer=layer, expert=name, generation=0, step=0, source=Source.INITIAL)
    # No initial weights while storage holds a copy that it refuses to read for now.
    if not state.config.resume and not any(_is_refused(state, copy) for copy in known):
        copies.append(first)
    per_node = state.config.ranks_per_node
    targets = {plan.node_ids[rank // per_node] for rank in plan.ranks_of(layer, name)}
    return Loss(
        layer=layer,
        expert=name,
        targets=tuple(sorted(targets)),
        routed=int(state.committed.routed[layer, name]),
        copies=tuple(copies),
    )


def _is_refused(state: Control, copy: Copy) -> bool:
    return bad_source_of(_restore_from(state, copy)) in state.storage.refused


def _in_memory(state: Control, transition: Transition, expert: Expert) -> list[Copy]:
    found = []
    for worker, body in transition.aligned.items():
        node = state.roster.workers[worker].node
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
            step=min(stored.step, state.storage.readable.get(expert, stored.step)),
            source=Source.STORAGE,
            routed=stored.routed,
        )
        for stored in state.storage.stored
        if (stored.layer, stored.expert) == expert
    ]


def _restore(state: Control, choice: RestoredExpert) -> Restore:
    detail = f"{choice.source.label},{choice.behind_steps},{choice.copy.routed}"
    return changed(_restore_from(state, choice.copy), detail=detail)


def _restore_from(state: Control, copy: Copy) -> Restore:
    if copy.source in (Source.OWN_NODE, Source.OTHER_NODE):
        worker = state.roster.nodes[copy.node].workers[0]
        place = f"keeper:{state.roster.workers[worker].keeper}"
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
    """The journal's form of a restore."""
    return {
        "layer": restore.layer,
        "expert": restore.expert,
        "source": restore.source,
        "generation": restore.generation,
        "step": restore.step,
        "detail": restore.detail,
    }


def with_versions_read(transition: Transition) -> Transition:
    """The transition with the versions that its ranks actually read from storage.

    They may be older than ordered, because a rank skips a file that is damaged or cannot be read.
    """
    read = {
        (version.layer, version.expert): version
        for body in transition.ready.values()
        for version in body.restored
    }
    if not read:
        return transition
    restores = tuple(
        _as_read(transition, restore, read.get((restore.layer, restore.expert)))
        for restore in transition.restores
    )
    return replace(transition, restores=restores)


def _as_read(transition: Transition, restore: Restore, version: SnapshotHeld | None) -> Restore:
    if version is None:
        return restore
    label = restore.detail.partition(",")[0] or Source.STORAGE.label
    detail = f"{label},{transition.step - version.step},{version.routed}"
    return changed(restore, detail=detail)


def differently_read(transition: Transition) -> Mapping[Expert, int]:
    """Experts of which ranks read different versions, each with the step of the oldest one.

    All replicas must come from the same copy (rule 27), so the oldest version is read again.
    """
    if not any(body.restored for body in transition.ready.values()):
        return {}
    plan, odd = transition.plan, dict[Expert, int]()
    assert plan is not None
    for restore in transition.restores:
        expert = (restore.layer, restore.expert)
        holders = [transition.seats[r].worker for r in plan.ranks_of(*expert)]
        versions = {_version_of(transition.ready[w], expert) for w in holders}
        if len(versions) > 1:
            odd[expert] = min(v[1] for v in versions if v is not None)
    return odd


def _version_of(body: Ready, expert: Expert) -> tuple[int, int, int] | None:
    found = (v for v in body.restored if (v.layer, v.expert) == expert)
    return next(((v.generation, v.step, v.routed) for v in found), None)


def over_budget(state: Control) -> bool:
    """Whether PLT has grown by more than the budget since K was last doubled (Dynamic-K)."""
    return plt_of(state) - state.saving.plt_spent > state.config.plt_budget


def plt_of(state: Control) -> float:
    """The portion of lost tokens (PLT) of the run so far, as the paper defines it."""
    return portion_lost(state.saving.plt.lost_by_expert(), routed=state.committed.routed.tolist())


def bill_restores(
    state: Control, transition: Transition, *, at_s: float
) -> tuple[tuple[Publish, ...], Control]:
    """Add the lost tokens of a RESUME to the ledger; one event per rollback and restored expert."""
    events: list[Publish] = []
    if transition.rollback:
        ledger = state.saving.plt.rolled_back(state.committed.routed.tolist())
        state = replace(state, saving=replace(state.saving, plt=ledger))
        fields: dict[str, Any] = {"generation": transition.generation, "step": transition.step}
        events.append(Publish(t=at_s, event="rolled_back", fields=fields))
    for restore in transition.restores:
        if not restore.detail:
            continue  # the start of a run loses nothing
        label, behind, version = restore.detail.split(",")
        routed = int(state.committed.routed[restore.layer, restore.expert])
        ledger, lost = state.saving.plt.restored(
            layer=restore.layer,
            expert=restore.expert,
            version_routed=min(int(version), routed),
            routed=routed,
        )
        state = replace(state, saving=replace(state.saving, plt=ledger))
        fields = {
            "generation": transition.generation,
            "layer": restore.layer,
            "expert": restore.expert,
            "source": label,
            "behind_steps": int(behind),
            "lost_copies": lost,
            "step": transition.step,
        }
        events.append(Publish(t=at_s, event="expert_restored", fields=fields))
    return tuple(events), state

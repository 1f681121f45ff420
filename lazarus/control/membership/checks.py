"""Validation of incoming messages, one function for each kind. PURE.

The wire format has checked the types already. The functions here compare numbers, lengths and texts
with the state of the run, so that the handler of a message can rely on them. A message of an older
attempt passes; its handler drops and counts it.

Every check returns the reason why a message is refused, or an empty string.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from typing import Any, get_args, get_type_hints

import msgspec
import numpy as np

from lazarus.checkpoint.selection.adaptive import Measured
from lazarus.control import messages as m
from lazarus.control.cluster.roster import node_of
from lazarus.control.cluster.state import Control, ControlConfig, Phase, attempt_in
from lazarus.control.commit.measures import measures_of
from lazarus.control.membership.json_text import parsed
from lazarus.control.vector import VectorLayout, decode
from lazarus.errors import BrokenInvariantError

MOST = 1 << 53  # largest count: float64 is exact up to here
_LARGEST_SHAPE = 1 << 24  # layers times experts
_AHEAD = 1 << 16  # steps above the last commit whose vectors are accepted
_NAME_CHARS = 1 << 14
_SOURCE_CHARS = 1 << 16
_MOST_STARTED = 1024  # nodes that one injected fault may add
# Fields, of any message, that count something; other numbers (checksums, losses) may be any.
_COUNTS = frozenset(
    {
        *("generation", "step", "term", "fence", "committed", "prepared", "entered", "acked"),
        *("progress", "pid", "layer", "expert", "routed", "num_bytes", "bytes_received", "pending"),
        *("number", "local_rank", "ranks_per_node", "memory_bytes", "dense_bytes", "expert_bytes"),
        *("num_layers", "num_experts", "top_k", "rank", "nodes"),
    }
)
_AMOUNTS = frozenset({"wall_s", "step_s", "groups_s", "transfer_s", "notice_s", "count"})
FAULT_KINDS = frozenset(  # see ``lazarus.faults`` for their options
    {"kill", "stop", "stall", "slow", "leave", "join", "crash", "controller", "cut"}
)
_OF_WORKERS = frozenset(get_args(get_type_hints(m.FromWorker)["body"]))
_OF_DRIVERS = frozenset(get_args(get_type_hints(m.FromDriver)["body"]))
_NAMES = frozenset({"worker", "node_key", "host", "keeper", "zone", "kind", "spec", "phase"})


def wrong_with(state: Control, worker: str, body: m.Body) -> str:
    """Check a message from a worker.

    Args:
        state: The controller's state.
        worker: Name of the sender.
        body: The message.

    Returns:
        Why the message is refused; empty if it is sound, or belongs to another attempt.
    """
    if type(body) not in _OF_WORKERS:
        return "no worker says this"
    if reason := _odd_fields(body):
        return reason
    match body:
        case m.Vector():
            return _vector(state, body)
        case m.Report():
            return _report(state, body)
        case m.Aligned():
            return _aligned(state, worker, body)
        case m.Ready():
            return _ready(state, worker, body)
        case m.Suspicion(bad_source=source) if len(source) > _SOURCE_CHARS:
            return f"a source of {len(source)} characters"
        case m.Paused() | m.Evaluated() | m.DigestPart():
            return _step(state, body.step) if body.generation == state.resumed else ""
        case m.FaultFired():
            return _fault(body)
        case m.Finalized():
            return _finalized(state, body)
        case m.ShareReported():
            return _snapshotted(body)
        case m.ReplicaMismatch():
            return _odd(body)
    return ""


def wrong_with_drivers(body: m.Body) -> str:
    """Check a message from the driver; returns why it is refused, or an empty string."""
    if type(body) not in _OF_DRIVERS:
        return "no driver says this"
    if reason := _odd_fields(body):
        return reason
    if isinstance(body, m.Injected) and body.kind not in FAULT_KINDS:
        return f"no such fault: {body.kind!r}"
    return ""


# ---- every message -----------------------------------------------------------------------------


def _odd_fields(value: Any) -> str:
    """Look for a number or name out of range, at any depth of the message."""
    if not isinstance(value, msgspec.Struct):
        return ""
    for name in value.__struct_fields__:
        item = getattr(value, name)
        if reason := _odd_field(name, item):
            return f"{type(value).__name__}.{name} is {reason}"
        if isinstance(item, tuple):
            for one in item:
                if reason := _odd_field(name, one) or _odd_fields(one):
                    return f"{type(value).__name__}.{name} holds {reason}"
        elif reason := _odd_fields(item):
            return reason
    return ""


def _odd_field(name: str, item: Any) -> str:
    match item:
        case bool():
            return ""
        case int() if name in _COUNTS:
            return "" if -1 <= item <= MOST else str(item)
        case float() if name in _AMOUNTS:
            return "" if 0 <= item <= MOST else str(item)
        case str() if name in _NAMES and len(item) > _NAME_CHARS:
            return f"a text of {len(item)} characters"
    return ""


def _step(state: Control, step: int) -> str:
    return "" if 0 <= step <= state.config.steps else f"step {step} of {state.config.steps}"


# ---- hellos ------------------------------------------------------------------------------------


def wrong_hello(config: ControlConfig, body: m.Hello) -> str:
    """Why a run with this configuration refuses the hello, whoever else is in the run; or empty."""
    if reason := _odd_fields(body):
        return reason
    if not body.worker or not body.node_key:
        return "a hello without a name"
    if body.ranks_per_node == config.ranks_per_node and not (
        0 <= body.local_rank < config.ranks_per_node
    ):
        return f"local rank {body.local_rank} of {config.ranks_per_node}"
    negative = min(body.term, body.generation, body.fence, body.committed, body.memory_bytes)
    return f"a number below 0: {negative}" if negative < 0 else ""


def misplaced_hello(state: Control, body: m.Hello) -> str:
    """Why the hello is refused, also because another worker has its name or place; or empty."""
    if reason := wrong_hello(state.config, body):
        return reason
    found = node_of(state, body.node_key)
    known = state.roster.workers.get(body.worker)
    if known is not None and (found is None or known.node != found[0]):
        return f"{body.worker} belongs to another node"
    if known is not None and known.local_rank != body.local_rank:
        return f"{body.worker} has local rank {known.local_rank}, not {body.local_rank}"
    if found is not None and body.local_rank < len(found[1].workers):
        seated = found[1].workers[body.local_rank]
        if seated not in ("", body.worker) and seated in state.roster.workers:
            return f"local rank {body.local_rank} of {body.node_key} is {seated}"
    return ""


# ---- steps -------------------------------------------------------------------------------------


def _vector(state: Control, body: m.Vector) -> str:
    if body.generation != state.resumed or body.step <= state.step:
        return ""
    if reason := _step(state, body.step):
        return reason
    if body.step > state.step + _AHEAD:
        return f"step {body.step}, but step {state.step + 1} has not come yet"
    return wrong_lanes(state, body)


def wrong_lanes(state: Control, body: m.Vector) -> str:
    """Why a vector does not belong to the newest RESUMEd generation; empty if it does."""
    layers, experts = state.standing.shape
    world = len(state.standing.seats)
    layout = VectorLayout(world_size=world, num_layers=layers, num_experts=experts)
    if len(body.lanes) % 8 or len(body.lanes) < 8 * layout.num_lanes or not layout.world_size:
        return f"a vector of {len(body.lanes)} bytes, not {8 * layout.num_lanes}"
    lanes = np.frombuffer(body.lanes, dtype="<f8")
    if reason := _lanes_that_are_no_counts(layout, lanes):
        return reason
    try:
        sums = decode(layout, lanes)
        measures_of(layout, lanes)
    except (BrokenInvariantError, ValueError, OverflowError) as problem:
        return str(problem)
    world = layout.world_size
    stands_for = (int(lanes[layout.lane("generation")]) // world, sums.step)
    if stands_for != (body.generation, body.step):
        return f"a vector of (generation, step) {stands_for}"
    return ""


def _lanes_that_are_no_counts(layout: VectorLayout, lanes: np.ndarray[Any, Any]) -> str:
    """Check the lanes that must be counts or times: all but losses, squares and measures."""
    for name in ("members", "generation", "step", "samples", "count", "sample_hash", "pause"):
        value = lanes[layout.lane(name)]
        if not 0 <= value <= MOST:
            return f"lane {name} is {value}"
    for name, part in (("times", lanes[layout.times]), ("counts", lanes[layout.counts])):
        if not bool(((part >= 0) & (part <= MOST)).all()):
            return f"the {name} of a vector are no numbers from 0 to 2**53"
    return ""


def _report(state: Control, body: m.Report) -> str:
    transition = state.transition
    if transition is None or body.generation != transition.generation:
        return ""
    if reason := _step(state, body.committed):
        return reason
    for vector in body.vectors:
        if reason := _vector(state, vector):
            return reason
    return ""


def _finalized(state: Control, body: m.Finalized) -> str:
    if state.phase is not Phase.FINALIZING or body.generation != state.resumed:
        return ""
    if body.step != state.step:
        return f"step {body.step} is not {state.step}, the last one"
    found, reason = parsed(body.files, what="files")
    return reason or _files(found)


# ---- recoveries --------------------------------------------------------------------------------


def _aligned(state: Control, worker: str, body: m.Aligned) -> str:
    transition = attempt_in(state, Phase.ALIGNING, generation=body.generation)
    if transition is None:
        return ""
    known = state.roster.workers.get(worker)
    if known is not None and known.node not in transition.voters:
        return "its node has no vote"
    layers, experts = body.num_layers, body.num_experts
    if not (0 < layers <= _LARGEST_SHAPE and 0 < experts <= _LARGEST_SHAPE // layers):
        return f"{layers} layers of {experts} experts"
    if state.resumed and state.standing.shape not in ((0, 0), (layers, experts)):
        return f"{layers} layers of {experts} experts, not {state.standing.shape}"
    if not 0 <= body.top_k <= experts:
        return f"top {body.top_k} of {experts} experts"
    if min(body.dense_bytes, body.expert_bytes) < 0:
        return "a size below 0"
    if reason := _scalars(body.scalars) or wrong_history(body.history, (layers, experts)):
        return reason
    return _places(body, layers, experts)


def _scalars(text: str) -> str:
    found, reason = parsed(text, what="scalars")
    if reason:
        return reason
    data = found.get("data") or {}
    if not isinstance(data, dict):
        return "scalars.data is no JSON object"
    count = data.get("num_samples", 0)
    good = isinstance(count, int) and not isinstance(count, bool) and -1 <= count <= MOST
    return "" if good else "scalars.data.num_samples is no count"


def wrong_history(data: bytes, shape: tuple[int, int]) -> str:
    """Why the bytes are not a load history, float64 [3, L, E]; empty if they are."""
    wanted = 3 * shape[0] * shape[1] * 8
    if len(data) != wanted:
        return f"a load history of {len(data)} bytes, not {wanted}"
    history = np.frombuffer(data, dtype="<f8")
    good = bool(((history >= 0) & (history <= MOST)).all())
    return "" if good else "a load history with numbers that count nothing"


def _places(body: m.Aligned, layers: int, experts: int) -> str:
    held = [(one.layer, expert) for one in body.held for expert in one.experts]
    if len(set(held)) != len(held):
        return "an expert held twice"
    if reason := _outside(held, layers, experts):
        return reason
    return _snaps(body.snapshots, layers, experts)


def _snaps(snaps: Collection[m.SnapshotHeld], layers: int, experts: int) -> str:
    if any(min(s.generation, s.step, s.routed, s.num_bytes) < 0 for s in snaps):
        return "a snapshot with a number below 0"
    return _outside(((s.layer, s.expert) for s in snaps), layers, experts)


def _outside(names: Iterable[tuple[int, int]], layers: int, experts: int) -> str:
    for layer, expert in names:
        if not (0 <= layer < layers and 0 <= expert < experts):
            return f"L{layer}/E{expert} of {layers} layers of {experts} experts"
    return ""


def _ready(state: Control, worker: str, body: m.Ready) -> str:
    transition = attempt_in(state, Phase.PREPARING, generation=body.generation)
    if transition is None:
        return ""
    if worker not in {seat.worker for seat in transition.feeders}:
        return "it was not asked"
    layers, experts = state.standing.shape
    if body.history and (reason := wrong_history(body.history, state.standing.shape)):
        return reason
    if transition.rollback and not transition.restarts and not body.history:
        return "no load history, though all state came from a checkpoint"
    return _snaps(body.restored, layers, experts)


# ---- events ------------------------------------------------------------------------------------


def _fault(body: m.FaultFired) -> str:
    if body.kind not in FAULT_KINDS:
        return f"no such fault: {body.kind!r}"
    return "" if 0 <= body.count <= _MOST_STARTED else f"a fault that brings {body.count} nodes"


def _files(found: Mapping[str, Any]) -> str:
    files = found.get("files", [])
    named = isinstance(files, list) and all(
        isinstance(one, dict) and isinstance(one.get("path"), str) for one in files
    )
    return "" if named else "files that have no path"


def _snapshotted(body: m.ShareReported) -> str:
    record, reason = parsed(body.record, what="record")
    if reason:
        return reason
    if not isinstance(record.get("kind"), str) or not isinstance(record.get("ok"), bool):
        return "record without kind or outcome"
    if reason := _files(record):
        return reason
    figures = record.get("measured")
    if figures is None:
        return ""
    names = {field.name for field in fields(Measured)}
    if not isinstance(figures, dict) or set(figures) != names:
        return f"measured is not {sorted(names)}"
    good = all(isinstance(x, int | float) and 0 <= x <= MOST for x in figures.values())
    moving = good and min(figures["copy_rate"], figures["write_rate"]) > 0
    return "" if moving else "measured holds what is no rate"


def _odd(body: m.ReplicaMismatch) -> str:
    what, reason = parsed(body.what, what="what")
    if reason:
        return reason
    named = all(isinstance(what.get(name), int) for name in ("layer", "expert"))
    if not named or {"t", "m", "event", "generation"} & set(what):
        return "what names no expert"
    return ""

"""Turn events of a run into lines of text for people. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from lazarus.basics.format import bytes_text, loss_text, plural

Event = Mapping[str, Any]
_PHASES = ("detect", "release", "align", "plan", "groups", "transfer", "redo")


class Narrator:
    """Turns events into lines. A node's loss and its reconfiguration are told in one line."""

    def __init__(self) -> None:
        self._pending: dict[int, Event] = {}
        self._committed = 0  # the last step that was seen committed
        self._committed_at_loss = 0

    def tell(self, event: Event) -> list[str]:
        """The lines to print for an event; none for most events."""
        name = event["event"]
        if name == "step_committed":
            self._committed = int(event["step"])
        elif name == "node_lost":
            self._committed_at_loss = self._committed
            self._pending[int(event["node"])] = event
        elif name == "reconfigured":
            lost, self._pending = self._pending, {}
            undone = max(0, self._committed_at_loss - int(event.get("step", self._committed)))
            return _reconfigured(event, lost, undone if lost else 0)
        elif name == "run_finished":
            return _finished(event)
        elif name in _SENTENCES:
            return [_SENTENCES[name](event)]
        return []


def _reconfigured(event: Event, lost: Mapping[int, Event], undone: int) -> list[str]:
    back = f"back in {event['wall_s']:.2f} s"
    nodes = plural(int(event["num_nodes"]), "node")
    details = _details(event)
    if not lost:
        return [f"~ {event['reason']}: {back}, {nodes}", *details]
    names = " and ".join(str(node) for node in lost)
    causes = ", ".join(sorted({str(e["cause"]) for e in lost.values()}))
    where = f" in step {int(event['step']) + 1:,}" if "step" in event else ""
    head = f"x node {names} lost ({causes}){where}: {back}, {plural(undone, 'step')} lost, {nodes}"
    if "survives" in event:
        head += f", survives {event['survives']}"
    return [head, *details]


def _details(event: Event) -> list[str]:
    phases = {p: event["phases"][p] for p in _PHASES if p in event["phases"]} | event["phases"]
    parts = [f"{name} {float(value):.2f}" for name, value in phases.items()]
    if event["bytes_moved"]:
        moved = plural(int(event["moves"]), "expert")
        parts.append(f"moved {bytes_text(int(event['bytes_moved']))}, {moved}")
    return ["    " + "  ".join(parts)] if parts else []


def _fault(event: Event) -> str:
    where = "" if event["node"] is None else f" of node {event['node']}"
    return f"! fault on purpose: {event['kind']}{where} in step {event['step']:,}"


def _joined(event: Event) -> str:
    at = f" at step {event['step']:,}" if "step" in event else ""
    return f"+ node {event['node']} joined{at}"


def _draining(event: Event) -> str:
    within = f" in {event['notice_s']:.0f} s" if event.get("notice_s") else ""
    return f"! node {event['node']} will leave{within}"


def _restarted(event: Event) -> str:
    again = plural(int(event["from_step"]) - int(event["step"]), "step")
    place = f"the checkpoint of step {event['step']:,}" if event["checkpoint"] else "its beginning"
    return f"+ run restarted from {place}, {again} to do again"


def _restored(event: Event) -> str:
    behind = plural(int(event["behind_steps"]), "step")
    place = f"L{event['layer']}/E{event['expert']}"
    return f"! expert {place} restored from {event['source']}, {behind} behind"


def _user_error(event: Event) -> str:
    where = f" at {event['where']}" if event.get("where") else ""
    return f"! user code raised{where} in step {event['step']:,}: {event['error']}"


def _worker_died(event: Event) -> str:
    where = f" at {event['where']}" if event.get("where") else ""
    what = f"{event['phase']}{where} in step {event['step']:,}".strip()
    return f"! the process {event['worker']} ended itself ({event['cause']}) in {what}"


def _finished(event: Event) -> list[str]:
    """A line for a run that did not end well; none for a good end."""
    status, cause = event.get("status", "finished"), event.get("cause", "")
    if not cause:
        return []
    return [f"! the run ended {status} ({cause}): {event.get('error') or 'as asked'}"]


def _stalled(event: Event) -> str:
    nodes = [str(node) for node in event["nodes"]]
    link = f"; links of node {' and '.join(nodes)} carry nothing" if nodes else ""
    return f"! all ranks waited at {event['where']}{link}: groups are built anew"


def _mismatch(event: Event) -> str:
    return f"! {event['what']}" if "what" in event else f"! replicas of {_place(event)} differ"


def _repaired(event: Event) -> str:
    source = "a checkpoint" if event.get("source") == "checkpoint" else "the majority"
    return f"+ {event['what']} of node {event['node']} repaired from {source}"


def _place(event: Event) -> str:
    return "the dense state" if event["layer"] < 0 else f"L{event['layer']}/E{event['expert']}"


_SENTENCES: Mapping[str, Callable[[Event], str]] = MappingProxyType(
    {
        "fault_injected": _fault,
        "fault_not_fired": lambda e: f"! fault {e['spec']} never happened: {e['reason']}",
        "node_joined": _joined,
        "node_left": lambda e: f"- node {e['node']} left as announced",
        "drain_notice": _draining,
        "nodes_awaited": lambda e: (
            f"! {plural(int(e['missing']), 'node')} without a machine: {e['reason']}"
        ),
        "machine_suspect": lambda e: f"! {e['machine']} is suspect: {e['reason']}",
        "node_banned": lambda e: f"! {e['machine']} is left alone: {e['reason']}",
        "quorum_lost": lambda e: f"! holding the state: {e.get('reason', 'below quorum')}",
        "quorum_regained": lambda e: "+ enough nodes again",
        "run_restarted": _restarted,
        "expert_restored": _restored,
        "rank_slow": lambda e: (
            f"! rank {e['rank']} is {e['slowdown']:.1f}x slower, keeps its place"
        ),
        "checkpoint_adapted": lambda e: (
            f"* snapshots of {e['k_snapshot']} experts a layer every {e['snapshot_every']:,} "
            f"steps, on storage every {e['persist_every']:,}"
        ),
        "checkpoint_failed": lambda e: f"! checkpoint of step {e['step']:,} failed: {e['reason']}",
        "plan_fallback": lambda e: f"! plan of the policy not used: {e['reason']}",
        "message_refused": lambda e: (
            f"! {e['message']} of {e['worker'] or 'a stranger'} refused: {e['reason']}"
        ),
        "user_error": _user_error,
        "internal_error": lambda e: f"! Lazarus failed on node {e['node']}: {e['error']}",
        "worker_died": _worker_died,
        "step_skipped": lambda e: f"! step {e['step']:,} changed nothing: {e['reason']}",
        "collective_stalled": _stalled,
        "replica_mismatch": _mismatch,
        "replica_repaired": _repaired,
        "node_suspect": lambda e: f"! node {e['node']} is suspect and leaves: {e['reason']}",
        "callback_failed": lambda e: f"! callback {e['callback']} is off: {e['error']}",
        "evaluated": lambda e: f"  held-out loss {loss_text(e['loss'])} at step {e['step']:,}",
    }
)

"""Nodes that join, are lost, or fall silent. Start reading at ``on_hello``."""

from __future__ import annotations

from dataclasses import replace

from lazarus.control.cluster.poison import HUNG
from lazarus.control.cluster.roster import node_of
from lazarus.control.cluster.state import TRANSITION_PHASES, Control, Decision, Phase, without
from lazarus.control.commit import commits
from lazarus.control.membership import checks, notices
from lazarus.control.messages import (
    Fenced,
    Hello,
    KillNode,
    NodeUp,
    Welcome,
    WorkerDied,
)
from lazarus.control.parts.blame import Gone
from lazarus.control.parts.roster import Node, Worker
from lazarus.control.ports import Command, Disconnect, Journal, Publish, Tell, TellDriver
from lazarus.control.reconfiguration import reconfigure as change

STREAM_CLOSED = "stream closed"


def on_hello(state: Control, body: Hello, *, at_s: float) -> Decision:
    """Admit a worker process, or refuse it and close its stream.

    The first process of a node gives the node the next serial, journaled before Welcome (rule 1).
    """
    if refusal := _refusal(state, body):
        if body.worker in state.standing.seats and body.worker not in state.roster.workers:
            dropped = {**state.rejected.dropped, body.worker: ("Hello", refusal)}
            state = replace(state, rejected=replace(state.rejected, dropped=dropped))
        return replace(
            state, rejected=replace(state.rejected, num_refused=state.rejected.num_refused + 1)
        ), (
            Tell(worker=body.worker, body=Fenced(reason=refusal)),
            Disconnect(worker=body.worker),
        )
    commands: tuple[Command, ...] = ()
    found = node_of(state, body.node_key)
    if found is None:
        serial = state.roster.next_serial
        node = Node(key=body.node_key, workers=("",) * body.ranks_per_node)
        entry = {"kind": "serial", "term": state.term, "node": serial, "key": body.node_key}
        commands = (Journal(entry=entry),)
        state = replace(state, roster=replace(state.roster, next_serial=serial + 1))
    else:
        serial, node = found
    workers = list(node.workers)
    workers[body.local_rank] = body.worker
    node = replace(
        node, workers=tuple(workers), joined_s=at_s, zone=body.zone, memory_bytes=body.memory_bytes
    )
    known = Worker(
        node=serial,
        local_rank=body.local_rank,
        host=body.host,
        keeper=body.keeper,
        heard_s=at_s,
        progress_s=at_s,
        undisturbed=body.generation == body.fence == state.resumed,
    )
    state = replace(
        state,
        roster=replace(
            state.roster,
            nodes={**state.roster.nodes, serial: node},
            workers={**state.roster.workers, body.worker: known},
        ),
    )
    commands = (*commands, Tell(worker=body.worker, body=Welcome(node=serial)))
    if node.complete:
        commands = (*commands, TellDriver(body=NodeUp(node_key=body.node_key)))
    if (early := state.roster.notices.get(body.node_key)) is None:
        return state, commands
    state, more = notices.on_notice(state, early, at_s=at_s)
    return state, (*commands, *more)


def _refusal(state: Control, body: Hello) -> str:
    if body.version != state.config.version:
        return f"worker runs version {body.version}, the controller {state.config.version}"
    if body.ranks_per_node != state.config.ranks_per_node:
        return (
            f"node {body.node_key} has {body.ranks_per_node} ranks, "
            f"the run {state.config.ranks_per_node} a node"
        )
    if state.phase is Phase.ENDED or (state.ending.stopping and not body.generation):
        return "the run is ending"
    there = node_of(state, body.node_key) is not None
    expected = state.phase is Phase.RECONNECTING and body.worker in state.standing.seats and there
    if body.generation and body.worker not in state.roster.workers and not expected:
        return f"worker {body.worker} is not a member of generation {state.generation}"
    return checks.misplaced_hello(state, body)


def on_died(state: Control, body: WorkerDied, *, at_s: float) -> Decision:
    """Handle a process end that the driver reports.

    The driver always gets an order to kill the rest of the node, even if the node is unknown here.
    """
    known = state.roster.workers.get(body.worker)
    state, commands = on_closed(state, body.worker, at_s=at_s, cause=body.cause)
    if known is not None or commands:
        return state, commands
    order = KillNode(node_key=_key_of(body.worker), cause=body.cause)
    return state, (TellDriver(body=order),)


def on_closed(state: Control, worker: str, *, at_s: float, cause: str) -> Decision:
    """Handle the end of a stream or process: its node is lost."""
    known = state.roster.workers.get(worker)
    if known is None:
        if state.phase is not Phase.RECONNECTING:
            return state, ()
        if worker in state.rejected.dropped:  # a refused worker ends its process
            cause = f"Lazarus failed: its hello was refused: {state.rejected.dropped[worker][1]}"
        nodes = state.roster.nodes
        missing = tuple(n for n in state.standing.members if _key_of(worker) == nodes[n].key)
        return lose(state, missing, cause=cause, at_s=at_s)
    if cause == STREAM_CLOSED and known.node in state.standing.members:
        state = _unexplained(state, known, at_s=at_s)
    return lose(state, (known.node,), cause=cause, at_s=at_s)


def _unexplained(state: Control, known: Worker, *, at_s: float) -> Control:
    """Note that the launcher still has to report how the process ended, unless a fault ended it."""
    key = state.roster.nodes[known.node].key
    struck = any(_key_of(worker) == key for worker, _ in state.injected.struck)
    if struck or known.node in state.injected.fired or known.node in state.injected.doomed:
        return state
    gone = Gone(
        worker=f"{key}.{known.local_rank}",
        generation=state.resumed,
        step=state.step + 1,
        at_s=at_s,
    )
    kept = (one for one in state.blame.unexplained if one.step > state.step)
    return replace(state, blame=replace(state.blame, unexplained=(*kept, gone)))


def _key_of(worker: str) -> str:
    """The node key in a worker's name, ``<node key>.<local rank>``."""
    return worker.rpartition(".")[0]


def lose(
    state: Control,
    serials: tuple[int, ...],
    *,
    cause: str,
    at_s: float,
    is_silent: bool = False,
    is_excused: bool = False,
) -> Decision:
    """Remove lost nodes from the run, and recover if they took part in training.

    Their remaining processes are told to exit, and the driver is told to kill the nodes.

    Args:
        state: The controller's state.
        serials: The lost nodes; unknown ones are ignored.
        cause: Why they are lost, for the record.
        at_s: Time of the event in seconds.
        is_silent: Whether the nodes were not seen to end, but are silent or make no progress.
        is_excused: True if user code must not be blamed for the deaths of their processes.
    """
    serials = tuple(serial for serial in serials if serial in state.roster.nodes)
    if not serials:
        return state, ()
    taking_part = _taking_part(state)
    state, flushed = commits.flush(state, at_s=at_s)
    commands: list[Command] = [*flushed]
    for serial in serials:
        node = state.roster.nodes[serial]
        for worker in node.workers:
            if worker:
                commands.append(Tell(worker=worker, body=Fenced(reason=f"node lost: {cause}")))
        order = KillNode(node_key=node.key, cause=cause, is_silent=is_silent)
        commands.append(TellDriver(body=order))
        if serial in taking_part:
            fields = {"generation": state.generation, "node": serial, "cause": cause}
            commands.append(Publish(t=at_s, event="node_lost", fields=fields))
    gone = {worker for serial in serials for worker in state.roster.nodes[serial].workers}
    matters = taking_part & set(serials)
    on_purpose = {
        state.roster.nodes[n].key
        for n in serials
        if is_excused or n in state.injected.fired or n in state.injected.doomed
    }
    hung = {state.roster.nodes[n].key for n in serials} if cause == HUNG else set()
    state = replace(
        state,
        blame=replace(
            state.blame,
            excused=state.blame.excused | on_purpose,
            hung=state.blame.hung | hung,
            errors=(),
        ),
        roster=replace(
            state.roster,
            nodes=without(state.roster.nodes, serials),
            workers=without(state.roster.workers, gone),
        ),
        standing=replace(
            state.standing, members=tuple(n for n in state.standing.members if n not in serials)
        ),
        pausing=replace(
            state.pausing,
            paused={w: step for w, step in state.pausing.paused.items() if w not in gone},
        ),
    )
    if matters:
        state, more = _recover(state, tuple(sorted(matters)), at_s=at_s)
        commands.extend(more)
    return state, tuple(commands)


def _taking_part(state: Control) -> set[int]:
    """Members, and nodes that take part in the transition under way."""
    part = set(state.standing.members)
    if state.transition is not None:
        part |= set(state.transition.voters) | set(state.transition.joiners)
    return part


def _recover(state: Control, lost: tuple[int, ...], *, at_s: float) -> Decision:
    active = {Phase.RUNNING, Phase.FINALIZING} | TRANSITION_PHASES
    if state.phase not in active:
        return state, ()
    if state.resumed and not state.standing.members:  # the last member is lost
        return replace(state, transition=None), ()
    if not state.resumed:
        return replace(state, phase=Phase.GATHERING, phase_s=at_s, transition=None), ()
    fired = [state.injected.fired[node] for node in lost if node in state.injected.fired]
    state, commands = change.begin(state, reason="node_lost", at_s=at_s)
    line = state.timeline
    assert line is not None
    trigger = min([line.trigger_s, *fired])
    marks = {**line.marks, "detect": max(line.marks.get("detect", 0.0), at_s - trigger)}
    line = replace(line, trigger_s=trigger, marks=marks, lost=line.lost + lost, reason="node_lost")
    return replace(state, timeline=line), commands


def settle_reconnecting(state: Control, *, at_s: float) -> Decision:
    """Continue after a restart of the controller, once all members are back or overdue (rule 38).

    If every worker of the newest generation is back and undisturbed, training goes on as it is.
    Otherwise a new generation is claimed.
    """
    missing = tuple(n for n in state.standing.members if not state.roster.nodes[n].complete)
    if missing:
        if at_s <= _back_by_s(state, missing):
            return state, ()
        return lose(state, missing, cause="did not come back to the controller", at_s=at_s)
    nodes = list(state.standing.members)
    fields = {"generation": state.resumed, "term": state.term, "nodes": nodes}
    event = Publish(t=at_s, event="controller_restarted", fields=fields)
    whole = all(worker in state.roster.workers for worker in state.standing.seats)
    if whole and all(state.roster.workers[worker].undisturbed for worker in state.standing.seats):
        return replace(state, phase=Phase.RUNNING, phase_s=at_s), (event,)
    state, commands = change.begin(state, reason="controller", at_s=at_s)
    return state, (event, *commands)


def _back_by_s(state: Control, missing: tuple[int, ...]) -> float:
    """The time until which members that are missing after a restart may come back, in seconds.

    The time limit of ``reconnect_s`` starts when the first member is back, because what keeps all
    members away (for example a machine busy with starting the controller) is not their fault. The
    first one has ``comeback_s``.
    """
    timeouts = state.config.timeouts
    back = [state.roster.nodes[n].joined_s for n in state.standing.members if n not in missing]
    if not back:
        return state.phase_s + timeouts.comeback_s
    first_s = min(min(back), state.phase_s + timeouts.comeback_s)
    return max(state.phase_s, first_s) + timeouts.reconnect_s


def excuse(state: Control, *, slept_s: float) -> Control:
    """Shift all deadlines by ``slept_s`` seconds, in which the controller itself stood still."""
    workers = {
        name: replace(w, heard_s=w.heard_s + slept_s, progress_s=w.progress_s + slept_s)
        for name, w in state.roster.workers.items()
    }
    transition = state.transition
    if transition is not None:
        transition = replace(transition, phase_s=transition.phase_s + slept_s)
    return replace(
        state,
        roster=replace(state.roster, workers=workers),
        transition=transition,
        phase_s=state.phase_s + slept_s,
    )


def silent(state: Control, *, at_s: float) -> tuple[int, ...]:
    """Nodes with a worker that sent nothing for ``heartbeat_timeout_s``, by serial."""
    limit_s = state.config.timeouts.heartbeat_timeout_s
    late = {known.node for known in state.roster.workers.values() if at_s - known.heard_s > limit_s}
    return tuple(sorted(late))


def stuck(state: Control, *, at_s: float) -> tuple[int, ...]:
    """Nodes whose training thread makes no progress outside any collective, by serial.

    The limit is ``no_progress_s`` while another rank waits or has paused, and the much longer
    ``standstill_s`` otherwise: all ranks may be compiling at once. A slow rank is not stuck, since
    it still passes from phase to phase. Time before RESUME does not count, because ranks that were
    ready had to wait for the others.
    """
    if state.phase is not Phase.RUNNING:
        return ()
    workers, paused = state.roster.workers, state.pausing.paused
    seated = [w for w in state.standing.seats if w in workers and w not in paused]
    awaited = paused or any(workers[w].waiting for w in seated)
    timeouts = state.config.timeouts
    limit = timeouts.no_progress_s if awaited else timeouts.standstill_s
    late = {
        state.roster.workers[w].node
        for w in seated
        if not state.roster.workers[w].waiting
        and at_s - max(state.phase_s, state.roster.workers[w].progress_s) > limit
    }
    return tuple(sorted(late))

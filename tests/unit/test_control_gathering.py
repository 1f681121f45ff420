"""How long the first nodes wait for the others, and what the driver hears of nodes that go."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lazarus.config.timeouts import Timeouts, derive_timeouts
from lazarus.control.cluster.state import ControlConfig, Phase
from lazarus.control.machine import decide
from lazarus.control.messages import (
    Body,
    FaultFired,
    Heartbeat,
    Hello,
    KillNode,
    LeaveRequest,
    MachineJudged,
    NodeEndsMachine,
    NodesAwaited,
    NodeUp,
    RunOver,
    WorkerDied,
)
from lazarus.control.ports import Command, DriverSaid, Event, Publish, TellDriver, Tick, WorkerSaid
from lazarus.control.restart.replay import initial_state

BUSY = "a node needs 1 CPU; the cluster has 1 Ray node with 0 CPUs free"


def starting(startup_s: float) -> Timeouts:
    return replace(derive_timeouts(10.0), startup_s=startup_s)


class Start:
    """A run that wants four nodes; some have said hello."""

    def __init__(self, *, there: int, **config: Any) -> None:
        settings = {"steps": 10, "nodes": 4, "timeouts": starting(120.0)} | config
        self.state = initial_state(ControlConfig(**settings), term=1, now_s=0.0)
        self.now_s = 0.0
        self.log: list[Command] = []
        self.there = [f"n{i}.0" for i in range(there)]
        for worker in self.there:
            self.say(worker, Hello(worker=worker, node_key=worker.removesuffix(".0")))

    def feed(self, event: Event) -> None:
        self.state, commands = decide(self.state, event)
        self.log += commands

    def say(self, worker: str, body: Body) -> None:
        self.feed(WorkerSaid(worker=worker, body=body, at_s=self.now_s))

    def hear(self, **awaited: Any) -> None:
        self.feed(DriverSaid(body=NodesAwaited(**awaited), at_s=self.now_s))

    def wait(self, seconds: float) -> Phase:
        for _ in range(int(seconds)):
            self.now_s += 1.0
            for worker in self.there:
                self.say(worker, Heartbeat(generation=0, step=0))
            self.feed(Tick(at_s=self.now_s))
        return self.state.phase

    def told(self, kind: type[Body]) -> list[Any]:
        return [c.body for c in self.log if isinstance(c, TellDriver) and isinstance(c.body, kind)]

    def published(self, name: str) -> list[dict[str, Any]]:
        return [dict(c.fields) for c in self.log if isinstance(c, Publish) and c.event == name]


def test_machines_that_are_still_to_come_have_until_the_start_timeout() -> None:
    run = Start(there=3, timeouts=starting(120.0), quorum_timeout_s=3.0)
    run.hear(missing=1, reason=BUSY)
    assert run.wait(119) is Phase.GATHERING
    assert run.wait(2) is Phase.FENCING
    assert run.published("nodes_awaited") == [{"generation": 0, "missing": 1, "reason": BUSY}]


def test_a_machine_on_which_nothing_starts_holds_the_others_up_for_three_stalls() -> None:
    """R8."""
    run = Start(there=3, timeouts=starting(300.0))
    run.hear(coming=1)
    assert run.wait(60) is Phase.GATHERING
    run.hear(missing=1, reason=BUSY, is_troubled=True)
    assert run.wait(29) is Phase.GATHERING
    assert run.wait(2) is Phase.FENCING


def test_too_few_machines_are_waited_for_up_to_the_quorum_timeout_and_the_end_says_for_what() -> (
    None
):
    """R6: exit code 3, resumable, as soon as nothing is coming for that long."""
    run = Start(there=1, min_nodes=2, timeouts=starting(300.0), quorum_timeout_s=20.0)
    run.hear(missing=2, coming=1, reason=BUSY)
    assert run.wait(30) is Phase.GATHERING, "a node is coming up"
    run.hear(missing=3, reason=BUSY)
    assert run.wait(19) is Phase.GATHERING
    assert run.wait(2) is Phase.ENDED
    (over,) = run.told(RunOver)
    assert over.status == "short" and over.failure is not None
    assert over.failure.error == "QuorumTimeoutError"
    assert over.failure.details["awaited"] == BUSY


def test_where_no_node_will_ever_start_the_run_ends_at_once() -> None:
    run = Start(there=0)
    run.hear(reason="6 nodes in a row were not started", is_hopeless=True)
    assert run.state.phase is Phase.ENDED
    (over,) = run.told(RunOver)
    assert over.status == "failed" and "6 nodes in a row" in over.failure.message


def test_the_driver_hears_who_is_up_and_every_death_is_answered() -> None:
    run = Start(there=2)
    assert [body.node_key for body in run.told(NodeUp)] == ["n0", "n1"]
    for worker in ("n1.0", "never-seen.0"):
        run.feed(DriverSaid(body=WorkerDied(worker=worker, cause="SIGKILL"), at_s=0.0))
    killed = run.told(KillNode)
    assert [(body.node_key, body.is_silent) for body in killed] == [
        ("n1", False),
        ("never-seen", False),
    ]
    run.there = []
    run.now_s = 30.0
    run.feed(Tick(at_s=30.0))
    assert [(b.node_key, b.is_silent) for b in run.told(KillNode)[2:]] == [("n0", True)]


def test_the_driver_hears_whose_machine_goes_with_it_before_the_fault_strikes() -> None:
    run = Start(there=4)
    fault = FaultFired(
        generation=0, step=1, kind="kill", phase="forward", spec="kill:0@1", number=1
    )
    run.say("n0.0", fault)
    kinds = [type(getattr(c, "body", None)).__name__ for c in run.log]
    assert kinds.index("NodeEndsMachine") < kinds.index("Go")
    passing = FaultFired(
        generation=0, step=1, kind="stop", phase="forward", spec="stop:1@1,for=2s", number=1
    )
    run.say("n1.0", passing)
    run.say("n2.0", LeaveRequest(generation=0, cause="leave"))
    assert [body.node_key for body in run.told(NodeEndsMachine)] == ["n0", "n2"]


def test_judged_machines_are_on_record() -> None:
    run = Start(there=1)
    for is_banned in (False, True):
        body = MachineJudged(machine="10.0.0.7", reason="x", is_banned=is_banned)
        run.feed(DriverSaid(body=body, at_s=0.0))
    assert run.published("machine_suspect") and run.published("node_banned") == [
        {"generation": 0, "machine": "10.0.0.7", "reason": "x"}
    ]

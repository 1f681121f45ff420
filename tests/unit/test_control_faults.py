"""Scripted faults: on record before they strike, once each; the end names those that never did."""

from __future__ import annotations

import json
from typing import Any

import pytest
from control_desk import Desk, running
from control_journal import resumed_state

from lazarus.control.messages import (
    FaultFired,
    Go,
    Injected,
    InjectFault,
    KillController,
    StartNode,
    StopRun,
)
from lazarus.control.ports import DriverSaid, Journal, Publish, Tell, TellDriver


def fired(desk: Desk, worker: str, spec: str, *, number: int = 1, **more: Any) -> list[Any]:
    """A worker asks to be struck; what the controller does about it."""
    before = len(desk.log)
    kind = spec.partition("@")[0].partition(":")[0]
    place: dict[str, Any] = {"generation": 1, "step": 9, "phase": "forward"}
    desk.say(worker, FaultFired(kind=kind, spec=spec, number=number, **place, **more))
    return desk.log[before:]


def driver_says(desk: Desk, body: Any) -> list[Any]:
    before = len(desk.log)
    desk.feed(DriverSaid(body=body, at_s=desk.now_s))
    return desk.log[before:]


def orders(commands: list[Any], kind: type) -> list[Any]:
    return [c.body for c in commands if isinstance(c, TellDriver) and isinstance(c.body, kind)]


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("kill:1@20", "the run ended after step 8"),
        ("kill:1@9", "the run ended after step 8"),
        ("leave:7@9", "there never was a node 7"),
        ("leave:1@9", "nobody came by phase forward of step 9"),
        ("kill:3@8", "there never was a node 3"),
        ("kill:7@8", "there never was a node 7"),
        ("kill:2@8", "node 2 was gone before"),
        ("kill:0@8", "nobody came by phase forward of step 8"),
        ("kill@5", "nobody came by phase forward of step 5"),
        ("kill:1@5/backward", "nobody came by phase backward of step 5"),
        ("kill:1@5/transfer", "no transfer came after step 5"),
        ("kill@5/reconfigure", "no reconfigure came after step 5"),
        ("nonsense", "it is no scripted fault"),
    ],
)
def test_a_fault_that_never_struck_is_named_at_the_end_with_its_reason(spec: str, why: str) -> None:
    desk = running(faults=(spec,), slots_per_node=2, min_replicas=2)
    desk.lose("w2")
    driver_says(desk, StopRun(now=True, reason="enough"))
    (event,) = desk.events("fault_not_fired")
    assert (event["spec"], event["reason"]) == (spec, why)


def test_a_fault_that_struck_is_not_named_at_the_end() -> None:
    desk = running(faults=("slow:1@9",))
    fired(desk, "w1", "slow:1@9")
    driver_says(desk, StopRun(now=True))
    assert not desk.events("fault_not_fired")


def test_a_fault_is_journaled_and_on_record_before_it_may_strike() -> None:
    desk = running()
    commands = fired(desk, "w1", "kill:1@9")
    kept = [c for c in commands if isinstance(c, Journal | Publish | Tell)]
    evidence, fault, event, go = kept
    assert isinstance(evidence, Journal) and isinstance(fault, Journal)
    assert isinstance(event, Publish) and isinstance(go, Tell)
    assert evidence.entry["fired"][0][0] == 1
    assert (fault.entry["worker"], fault.entry["spec"]) == ("w1", "kill:1@9")
    fields = event.fields
    assert (fields["node"], fields["kind"], fields["step"], fields["phase"]) == (
        1, "kill", 9, "forward",
    )  # fmt: skip
    assert go.body == Go(spec="kill:1@9")


def test_a_fault_said_again_to_a_restarted_controller_is_one_fault() -> None:
    desk = running()
    fired(desk, "w1", "slow:1@9")
    entries = [json.loads(json.dumps(c.entry)) for c in desk.of(Journal)]
    again = resumed_state(entries, desk.state.config, now_s=0.0)
    assert again.injected.struck == desk.state.injected.struck and again.injected.fired_specs == {
        "slow:1@9"
    }
    commands = fired(desk, "w1", "slow:1@9")
    assert [type(c) for c in commands] == [Tell] and commands[0].body == Go(spec="slow:1@9")
    assert len(desk.events("fault_injected")) == 1


def test_a_fault_for_whoever_comes_first_strikes_one_rank() -> None:
    desk = running()
    fired(desk, "w1", "slow@9")
    (command,) = fired(desk, "w2", "slow@9")
    assert command.body == Go(spec="slow@9", is_done=True)
    assert len(desk.events("fault_injected")) == 1


def test_a_fault_for_one_node_strikes_each_of_its_ranks() -> None:
    desk = running()
    fired(desk, "w1", "slow:1@9")
    fired(desk, "w1", "slow:1@9", number=2)
    assert len(desk.events("fault_injected")) == 2


def test_a_scripted_join_asks_for_as_many_nodes_as_it_says() -> None:
    desk = running()
    started = orders(fired(desk, "w0", "join@9", count=3), StartNode)
    assert [body.is_extra for body in started] == [True] * 3
    assert len(orders(fired(desk, "w0", "join@10", number=2, count=0), StartNode)) == 1


def test_a_scripted_controller_fault_asks_the_driver_for_it() -> None:
    desk = running()
    assert len(orders(fired(desk, "w0", "controller@9"), KillController)) == 1


@pytest.mark.parametrize(
    ("kind", "is_timed"),
    [("kill", True), ("stop", True), ("cut", True), ("slow", False), ("leave", False)],
)
def test_the_time_to_detect_counts_from_a_fault_that_takes_a_node(
    kind: str, is_timed: bool
) -> None:
    desk = running(slots_per_node=2, min_replicas=2)
    driver_says(desk, Injected(kind=kind, node_key="n2", spec=f"chaos:{kind}"))
    line = desk.now_s
    desk.now_s += 3.0
    desk.lose("w2")
    assert desk.state.timeline is not None
    assert desk.state.timeline.trigger_s == (line if is_timed else desk.now_s)


@pytest.mark.parametrize(
    ("kind", "is_told"),
    [("kill", False), ("cut", False), ("stop", True), ("stall", True), ("slow", True)],
)
def test_a_random_fault_that_only_the_process_can_show_is_passed_on_to_it(
    kind: str, is_told: bool
) -> None:
    desk = running()
    commands = driver_says(desk, Injected(kind=kind, node_key="n1", spec=f"chaos:{kind}"))
    told = [(c.worker, c.body) for c in commands if isinstance(c, Tell)]
    assert told == ([("w1", InjectFault(kind=kind))] if is_told else [])
    (event,) = desk.events("fault_injected")
    assert (event["node"], event["kind"], event["step"]) == (1, kind, 9)


def test_a_random_fault_of_a_node_that_is_gone_is_on_record_and_strikes_nobody() -> None:
    desk = running(slots_per_node=2, min_replicas=2)
    desk.lose("w2")
    commands = driver_says(desk, Injected(kind="stall", node_key="n2", spec="chaos:stall"))
    assert not [c for c in commands if isinstance(c, Tell)]
    assert desk.events("fault_injected")[-1]["node"] is None

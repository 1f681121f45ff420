"""Who counts as there, coming or leaving; and what a record lacks after a restart."""

from __future__ import annotations

from dataclasses import replace

import pytest
from control_desk import journal_of, running
from fleet_limits import limits

from lazarus.control.cluster.replacing import Fleet, History, came_up, is_troubled, ordered
from lazarus.control.cluster.roster import candidates, leaving, node_of, staying
from lazarus.control.cluster.state import Phase
from lazarus.control.membership import checks, members
from lazarus.control.messages import Finalized, StopRun
from lazarus.control.parts.roster import Node
from lazarus.control.ports import DriverSaid
from lazarus.control.restart.replay import blank_state, missing_commits

REPLICATED = {"slots_per_node": 2, "min_replicas": 2}


def test_only_whole_nodes_that_stay_are_candidates() -> None:
    state = running(**REPLICATED).state
    more = {
        7: Node(key="whole", workers=("a", "b")),
        5: Node(key="too", workers=("c",)),
        8: Node(key="half", workers=("d", "")),
        9: Node(key="going", workers=("e",), leaving="drain"),
    }
    nodes = {**state.roster.nodes, **more}
    nodes[1] = replace(nodes[1], leaving="leave")
    state = replace(state, roster=replace(state.roster, nodes=nodes))
    assert candidates(state) == (5, 7)
    assert staying(state) == (0, 2, 5, 7)
    assert leaving(state, (9, 1, 0)) == (9, 1)
    assert node_of(state, "half") == (8, nodes[8]) and node_of(state, "nobody") is None
    assert candidates(running(**REPLICATED).state) == ()


def test_machines_on_which_all_is_up_are_no_trouble_any_more() -> None:
    fleet = came_up(ordered(Fleet(limits=limits(wanted=1)), "n0", "a", now_s=0.0), "n0", now_s=1.0)
    bad = {"a": History(troubles=2), "b": History(troubles=1)}
    fleet = replace(fleet, histories=bad)
    assert not is_troubled(fleet)
    assert is_troubled(replace(fleet, limits=limits(wanted=2)))
    coming = ordered(replace(fleet, limits=limits(wanted=2)), "n1", "c", now_s=2.0)
    assert not is_troubled(coming)
    assert is_troubled(replace(coming, histories={**bad, "c": History(troubles=1)}))


@pytest.mark.parametrize(
    ("said", "missing"),
    [
        ((), {"step_committed", "ledger_mismatch"}),
        (("step_committed",), {"ledger_mismatch"}),
        (("step_committed", "ledger"), set()),
        (("step_committed", "ledger_mismatch"), set()),
        (("ledger_mismatch",), {"step_committed", "ledger_mismatch"}),
        (("ledger",), {"step_committed", "ledger_mismatch"}),
    ],
)
def test_each_commit_has_its_ledger_or_a_mismatch(said: tuple[str, ...], missing: set[str]) -> None:
    desk = running(ledger=True, **REPLICATED)  # whose samples are no real ones
    found = missing_commits(
        journal_of(desk), blank_state(desk.state.config), said=lambda name, *_: name in said
    )
    assert {event.event for event in found} == missing


def test_a_last_share_is_of_the_last_step_and_has_files() -> None:
    state = replace(running(**REPLICATED).state, phase=Phase.FINALIZING)
    body = Finalized(generation=1, step=8, files="{}")
    for step, files, reason in (
        (8, "{}", ""), (7, "{}", "step 7 is not 8, the last one"), (8, "[]", "files is no JSON"),
        (8, '{"files": [{}]}', "files that have no path"),
    ):  # fmt: skip
        odd = Finalized(generation=1, step=step, files=files)
        assert checks.wrong_with(state, "w0", odd).startswith(reason)
        assert bool(checks.wrong_with(state, "w0", odd)) == bool(reason)
    assert checks.wrong_with(state, "w0", body) == ""


def test_a_nap_of_the_controller_is_nobodys_delay() -> None:
    desk = running(**REPLICATED)
    desk.deaf = {"Fence"}
    desk.lose("w2")
    slept = members.excuse(desk.state, slept_s=5.0)
    assert slept.transition is not None and desk.state.transition is not None
    assert slept.transition.phase_s == desk.state.transition.phase_s + 5.0


@pytest.mark.parametrize(("reason", "told"), [("", "stopped"), ("enough", "enough")])
def test_a_stop_without_a_reason_has_one(reason: str, told: str) -> None:
    desk = running(**REPLICATED)
    desk.feed(DriverSaid(body=StopRun(reason=reason), at_s=0.0))
    assert desk.state.ending.stopping == told
    desk.feed(DriverSaid(body=StopRun(now=True, reason=reason), at_s=0.0))
    assert desk.events("run_finished")[0]["error"] == told

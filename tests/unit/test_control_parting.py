"""Ranks that part ways, models that differ, and collectives in which all wait: event scripts."""

from __future__ import annotations

from typing import Any

import pytest
from control_desk import Desk, running
from msgspec.structs import replace as changed

from lazarus.config.timeouts import derive_timeouts
from lazarus.control.cluster.state import Phase
from lazarus.control.membership.suspicion import AGAIN, MAX_ATTEMPTS, MAX_ERRORS
from lazarus.control.messages import (
    Aligned,
    Body,
    Fence,
    Heartbeat,
    Report,
    RunOver,
    Suspicion,
    Tail,
    TensorSum,
)
from lazarus.control.ports import TellDriver
from lazarus.control.reconfiguration.parting import broken_pair
from lazarus.failure import Cause

STALL_S = 10.0


class Telling(Desk):
    """Workers whose reports say where they were, and whose first alignment says what they built."""

    tails: dict[str, Tail]
    tensors: dict[str, tuple[TensorSum, ...]]

    def __init__(self, **config: Any) -> None:
        self.tails, self.tensors = {}, config.pop("tensors", {})
        super().__init__(**config)

    def _answer(self, worker: str, body: Body) -> None:
        if isinstance(body, Fence) and worker in self.tails:
            at, entered = self.committed[worker], self.entered[worker]
            report = Report(
                generation=body.generation, committed=at, prepared=at, entered=entered,
                tail=self.tails[worker],
            )  # fmt: skip
            self.say(worker, report)
        else:
            super()._answer(worker, body)

    def aligned(self, worker: str, generation: int) -> Aligned:
        found = super().aligned(worker, generation)
        return changed(found, tensors=self.tensors.get(worker, ()))

    def wait(self, seconds: float, *, moving: str = "") -> None:
        """Every training thread sits in a collective and its heartbeats go on."""
        for _ in range(round(seconds)):
            self.now_s += 1.0
            for worker in self.state.standing.seats:
                progress = int(self.now_s) if worker == moving else 7
                beat = Heartbeat(generation=1, step=9, progress=progress, waiting=True)
                self.say(worker, beat)
            self.tick(0.0)

    @property
    def over(self) -> RunOver:
        (over,) = [c.body for c in self.of(TellDriver) if isinstance(c.body, RunOver)]
        return over


def begun() -> Telling:
    desk = Telling(timeouts=derive_timeouts(STALL_S))
    for step in range(1, 9):
        desk.commit(step)
    return desk


def tail(rank: int, *labels: str, last: int, **more: Any) -> Tail:
    return Tail(group="train of generation 1", last=last, labels=labels, rank=rank, step=9, **more)


def test_all_that_wait_are_fenced_after_the_stall_and_nobody_is_lost() -> None:
    """A7: equal labels, so it is the data path."""
    desk = begun()
    for rank in range(3):
        desk.tails[f"w{rank}"] = tail(rank, "layer 1 forward (counts) #4", last=4)
    desk.wait(STALL_S - 1)
    assert desk.state.phase is Phase.RUNNING and desk.state.generation == 1
    desk.wait(3)
    assert desk.state.phase is Phase.RUNNING and desk.state.resumed == 2
    assert not desk.events("node_lost")
    (stalled,) = desk.events("collective_stalled")
    assert stalled["where"] == "layer 1 forward (counts)" and stalled["nodes"] == []


def test_one_that_moves_keeps_the_others_waiting() -> None:
    desk = begun()
    desk.wait(5 * STALL_S, moving="w1")
    assert desk.state.resumed == 1 and not desk.events("collective_stalled")


def test_all_that_wait_at_different_labels_end_the_run_as_user_error() -> None:
    """C2: the first exchange that differs counts, however far the ranks are from it."""
    desk = begun()
    both = "layer 0 forward (combine) #3"
    desk.tails = {
        "w0": tail(0, both, "layer 2 forward (counts) #4", last=4, place="net.py:9 in forward"),
        "w1": tail(1, both, "layer 1 forward (counts) #4", "layer 1 forward (dispatch) #5", last=5),
        "w2": tail(2, "layer 1 forward (counts) #4", "layer 1 forward (dispatch) #5", last=5),
    }
    desk.wait(STALL_S + 2)
    failure = desk.over.failure
    assert desk.over.status == "failed" and failure is not None
    assert failure.cause is Cause.USER_CODE and failure.error == "UserCodeError"
    assert failure.message == (
        "ranks do not run the same layers: rank 0 at layer 2 forward (counts) (net.py:9 in "
        "forward); ranks 1, 2 at layer 1 forward (counts)"
    )
    assert (failure.rank, failure.step) == (0, 9)
    assert not desk.events("node_lost")


def test_a_label_that_differs_is_told_with_the_line_that_led_to_it() -> None:
    """C2: where a rank stands by now is told only for a label that no user's line led to."""
    desk = begun()
    late = ("", "", "net.py:9 in f")
    desk.tails = {
        "w0": tail(0, "a #3", "b #4", last=4, places=("net.py:3 in f", "net.py:4 in f")),
        "w1": tail(1, "a #3", "c #4", "d #5", last=5, places=late, place="x:1"),
        "w2": tail(2, "b #4", last=4, places=("net.py:4 in f",), place="net.py:7 in f"),
    }
    desk.wait(STALL_S + 2)
    failure = desk.over.failure
    assert failure is not None and failure.place == "x:1"
    assert "ranks 0, 2 at b (net.py:4 in f); rank 1 at c (x:1)" in failure.message


def test_a_lag_is_no_parting_and_an_older_group_says_nothing() -> None:
    desk = begun()
    first, second = "layer 0 forward (counts) #3", "layer 0 forward (dispatch) #4"
    desk.tails = {
        "w0": tail(0, first, second, last=4),
        "w1": tail(1, first, last=3),
        "w2": Tail(group="train of generation 0", last=3, labels=("commit #3",), rank=2),
    }
    desk.say("w0", Suspicion(generation=1, step=9))
    desk.tick()
    assert desk.state.resumed == 2 and not desk.events("node_lost")


def test_a_link_that_carries_nothing_again_and_again_costs_its_higher_serial() -> None:
    desk = begun()
    for rank, mute in ((0, (2,)), (1, ()), (2, (0,))):
        desk.tails[f"w{rank}"] = tail(rank, "commit #4", last=4, mute=mute)
    for number in range(1, MAX_ERRORS + 1):
        desk.wait(STALL_S + 2)
        assert [e["nodes"] for e in desk.events("collective_stalled")] == [[0, 2]] * number
        assert not desk.events("node_lost")
    desk.wait(STALL_S + 2)
    (lost,) = desk.events("node_lost")
    assert (lost["node"], lost["cause"]) == (2, AGAIN)
    assert len(desk.state.blame.excused) == 1, (
        "the death of its process says nothing of the user's code"
    )


@pytest.mark.parametrize(
    ("mute", "nodes"),
    [
        ({0: (1,), 1: (0,), 2: ()}, (0, 1)),
        ({0: (), 1: (), 2: (1,)}, (1, 2)),
        ({0: (1,), 1: (), 2: (1,)}, (1,)),
        ({0: (), 1: (0, 2), 2: ()}, (1,)),
        ({0: (), 1: (), 2: ()}, ()),
    ],
)
def test_the_broken_link_or_the_node_that_has_several_is_found(
    mute: dict[int, tuple[int, ...]], nodes: tuple[int, ...]
) -> None:
    reports = {
        f"w{rank}": Report(generation=2, committed=8, prepared=8, tail=Tail(rank=rank, mute=found))
        for rank, found in mute.items()
    }
    assert broken_pair(reports, (0, 1, 2)) == nodes


def test_a_store_that_does_not_answer_costs_nobody_and_has_an_end() -> None:
    """A8: tried again with the same members, then the run ends resumable."""
    desk = begun()
    desk.deaf.add("Prepare")
    desk.say("w1", Suspicion(generation=1, step=9))
    for number in range(MAX_ATTEMPTS + 1):
        desk.tick()
        if desk.state.phase is Phase.ENDED:
            break
        assert desk.state.phase is Phase.PREPARING
        assert desk.state.transition is not None
        assert desk.state.transition.voters == (0, 1, 2)
        generation = desk.state.generation
        assert generation == number + 2
        desk.say("w1", Suspicion(generation=generation, step=9, store=True))
    assert not desk.events("node_lost")
    assert desk.over.status == "short" and desk.over.failure is not None
    assert desk.over.failure.cause is Cause.INTERNAL


def built(*sums: tuple[str, str, int]) -> tuple[TensorSum, ...]:
    return tuple(TensorSum(name=name, kind=kind, sum=number) for name, kind, number in sums)


SAME = ("embedding", "float32 [8, 4]", 5)


@pytest.mark.parametrize(
    ("odd", "text"),
    [
        (built(SAME, ("norm", "float32 [4]", 7)), "norm has other values on rank 1 than on ranks"),
        (built(SAME, ("norm", "float32 [3]", 6)), "norm is float32 [4] on ranks 0, 2, float32 [3]"),
        (built(SAME), "norm is float32 [4] on ranks 0, 2, missing on rank 1"),
    ],
)
def test_models_that_differ_at_the_start_end_the_run_as_user_error(
    odd: tuple[TensorSum, ...], text: str
) -> None:
    """C4: the first tensor that differs, and on whom."""
    usual = built(SAME, ("norm", "float32 [4]", 6))
    desk = Telling(tensors={"w0": usual, "w1": odd, "w2": usual})
    failure = desk.over.failure
    assert failure is not None and failure.cause is Cause.USER_CODE
    assert f"the model differs between ranks at the start: {text}" in failure.message
    assert desk.over.status == "failed"
    assert not desk.state.resumed and not desk.events("node_lost")


def test_equal_models_begin() -> None:
    usual = built(SAME)
    desk = Telling(tensors=dict.fromkeys(("w0", "w1", "w2"), usual))
    assert desk.state.phase is Phase.RUNNING
    assert running().state.phase is Phase.RUNNING

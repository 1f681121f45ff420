"""Who is outvoted where ranks differ, and what the controller makes of it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from control_desk import EXPERTS, Flipped, running

from lazarus.control.cluster.state import Phase, with_fields
from lazarus.control.messages import Aligned, Prepare, Repaired, ReplicaMismatch
from lazarus.control.parts.agreement import Outvoted
from lazarus.control.ports import TellDriver
from lazarus.control.reconfiguration.repair import APART_STEPS, compare, on_suspect, suspect
from lazarus.runtime.state.checksums import checksum_of, device_sum


def desk(*, nodes: int = 4, **config: object) -> Flipped:
    made = Flipped(nodes=nodes, slots_per_node=EXPERTS, **config)  # type: ignore[arg-type]
    assert made.state.phase is Phase.RUNNING
    for step in range(1, 9):
        made.commit(step)
    made.log.clear()
    return made


def prepared(made: Flipped) -> Prepare:
    return made.told(Prepare)[-1]


def test_a_majority_is_more_than_half_and_what_is_known_to_be_bad_has_no_vote() -> None:
    def body(digest: str) -> Aligned:
        return Aligned(generation=1, step=1, dense_digest=digest)

    votes = {"a": body("x"), "b": body("x"), "c": body("y")}
    assert compare(votes, Outvoted()).outvoted.workers == {"c"}
    assert compare({"a": body("x"), "c": body("y")}, Outvoted()).is_tied
    known = Outvoted(workers=frozenset({"c"}))
    assert compare({"a": body("x"), "c": body("y")}, known).outvoted.workers == {"c"}
    assert compare({"c": body("y")}, known).is_tied, "those who outvoted it are gone"
    assert compare({"a": body("x"), "c": body("x")}, known).outvoted.workers == frozenset()


def test_an_outvoted_rank_takes_dense_state_and_numbers_of_the_majority() -> None:
    """D13: at the change of members, before RESUME."""
    made = desk()
    made.bad_dense = ("w0",)
    made.lose("w3")
    order = prepared(made)
    assert made.state.phase is Phase.RUNNING and made.state.resumed == 2
    assert (order.dense_targets, order.dense_sources) == ((0,), (1, 2))
    assert json.loads(order.scalars) == {"by": "w1"}, "not the word of the rank that is outvoted"
    (seen,), (healed,) = made.events("replica_mismatch"), made.events("replica_repaired")
    assert (seen["nodes"], seen["majority"], seen["layer"]) == ([0], True, -1)
    assert (healed["node"], healed["source"], healed["step"]) == (0, "peer", 8)
    assert not made.state.agreement.outvoted and made.state.agreement.outvotes == {0: (8,)}


def test_an_outvoted_copy_is_refilled_and_feeds_nobody() -> None:
    """D14: also where it is the first in line as a source."""
    made = desk()
    made.bad_expert = ("w0",)
    made.lose("w3")
    moves = [m for m in prepared(made).moves if m.expert == 1]
    assert [m.target for m in moves] == [0] and moves[0].source in (1, 2)
    assert [(e["expert"], e["node"]) for e in made.events("replica_repaired")] == [(1, 0)]


def test_what_was_outvoted_stays_so_when_those_who_outvoted_it_die() -> None:
    """The memory of it ends with a RESUME, not with an attempt."""
    made = desk(on_lost_expert="partial")
    made.bad_expert, made.deaf = ("w0",), {"Prepare"}
    made.lose("w3")
    assert made.state.agreement.outvoted.copies == {("w0", 0, 1)}
    made.lose("w1")
    made.deaf = set()
    made.lose("w2")
    restored = [(r.expert, r.source) for r in prepared(made).restores]
    assert restored == [(1, "init")], "the copy that is left is not taken for a sound one"


def test_one_against_one_goes_back_to_a_checkpoint_or_restores_the_expert() -> None:
    made = desk(nodes=3)
    made.written(4)
    made.bad_dense = ("w0",)
    made.lose("w2")
    assert prepared(made).reload == "/ckpt 4" and not prepared(made).dense_targets
    assert made.events("rolled_back")[0]["step"] == 4
    assert {e["source"] for e in made.events("replica_repaired")} == {"checkpoint"}
    again = desk(nodes=3)
    again.written(4)
    again.bad_expert = ("w0",)
    again.lose("w2")
    assert [(r.expert, r.step) for r in prepared(again).restores] == [(1, 4)]
    assert not again.events("rolled_back")


@pytest.mark.parametrize(("stands", "status"), [(True, "short"), (False, "failed")])
def test_the_run_ends_at_the_first_difference_if_asked_to(stands: bool, status: str) -> None:
    made = desk(on_mismatch="stop")
    if stands:
        made.written(4)
    made.bad_dense = ("w0",)
    made.lose("w3")
    assert made.state.phase is Phase.ENDED
    (over,) = [c.body for c in made.of(TellDriver) if type(c.body).__name__ == "RunOver"]
    assert over.status == status and "on_mismatch" in over.failure.message


def test_differences_without_a_majority_again_and_again_end_the_run() -> None:
    made = desk(nodes=2)
    made.written(4)
    made.bad_dense = ("w0",)
    what = '{"layer": -1, "expert": -1, "what": "x", "majority": false}'
    for times in (1, 2):
        made.say("w0", ReplicaMismatch(generation=made.state.resumed, step=8, what=what))
        assert len(made.events("rolled_back")) == times
        assert made.state.phase is Phase.RUNNING
    made.say("w0", ReplicaMismatch(generation=made.state.resumed, step=8, what=what))
    assert made.state.phase is Phase.ENDED
    (end,) = made.events("run_finished")
    assert (end["status"], end["cause"]) == ("failed", "user_code")
    assert "3 times" in end["error"]


def test_a_node_that_is_outvoted_three_times_is_suspect_and_the_second_one_ends_the_run() -> None:
    made = desk(nodes=5)

    def outvote(rank: int, step: int) -> None:
        body = Repaired(generation=made.state.resumed, step=step, ranks=(rank,))
        made.say(made.state.standing.seats[0], body)
        made.say(made.state.standing.seats[0], body)  # said twice, it is one

    for step in (2, 4, 6):
        outvote(1, step)
    (suspect,) = made.events("node_suspect")
    assert (suspect["node"], suspect["steps"]) == (1, [2, 4, 6])
    assert [e["node"] for e in made.events("node_lost")] == [1]
    for step in (9, 10, 11):
        outvote(1, step)  # whoever is rank 1 now
    assert made.state.phase is Phase.ENDED
    assert made.events("run_finished")[0]["cause"] == "user_code"
    assert len(made.events("node_lost")) == 1


def test_a_word_of_repair_from_an_older_generation_or_of_no_rank_changes_nothing() -> None:
    made = running()
    before = made.state
    made.say("w0", Repaired(generation=0, step=3, ranks=(1,)))
    made.say("w0", Repaired(generation=1, step=3, ranks=(-1, 77)))
    assert made.state.agreement.outvotes == before.agreement.outvotes
    assert (
        replace(
            made.state,
            rejected=replace(made.state.rejected, stale=before.rejected.stale),
            roster=replace(made.state.roster, workers=before.roster.workers),
        )
        == before
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checksums_see_every_single_bit_on_any_device(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    row = torch.randn(37, 5).to(dtype)
    plain, on_device = checksum_of([row]), int(device_sum(row))
    words = row.view(torch.int16)
    for place in range(words.numel()):
        for bit in (0, 7, 14):
            words.view(-1)[place] ^= 1 << bit
            assert checksum_of([row]) != plain and int(device_sum(row)) != on_device
            words.view(-1)[place] ^= 1 << bit
    assert checksum_of([row]) == plain > 0 and int(device_sum(row)) == on_device
    assert int(device_sum(row.flip(0))) != on_device, "order counts"


@pytest.mark.parametrize(("members", "found"), [((0, 1, 2), 1), ((0, 1), 1), ((1,), None)])
def test_the_last_node_is_never_suspect(members: tuple[int, ...], found: int | None) -> None:
    outvotes = {1: (2, 4, 6), 0: (4,)}
    state = with_fields(running().state, {"members": members, "outvotes": outvotes})
    assert suspect(state) == found


def test_a_second_suspect_long_after_the_first_is_only_another_machine() -> None:
    far = APART_STEPS + 6
    outvotes = {2: (2, 4, far)}
    state = with_fields(running().state, {"suspects": ((1, 6),), "outvotes": outvotes})
    after, event = on_suspect(state, 2, at_s=1.0)
    assert event is None and after is state  # no later than that, it is what runs on them
    state = replace(state, agreement=replace(state.agreement, outvotes={2: (2, 4, far + 1)}))
    after, event = on_suspect(state, 2, at_s=1.0)
    assert event is not None and event.fields["node"] == 2
    assert after.agreement.suspects == ((1, 6), (2, far + 1))

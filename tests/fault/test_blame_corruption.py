"""Silent corruption: what the other ranks outvote is healed from them, and is never a source."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
from fault_runs import Event, Watched, at_step, watch
from torch import Tensor, nn

from lazarus.model.moe import moe_layers
from lazarus.record.events import read_events

cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = pytest.mark.timeout(240)

EVERYWHERE = "placement.slots_per_node=6"  # six experts: each node holds all of them


class Corrupts:
    """A machine that computes wrongly, as a hook does it: one bit after some steps on one node."""

    def __init__(
        self, what: str, *, node: int = 1, steps: Sequence[int] = (4,), by_rank: bool = False
    ) -> None:
        self.what, self.node, self.steps, self.by_rank = what, node, tuple(steps), by_rank

    def on_setup(self, ctx: Any, model: nn.Module) -> None:
        self.model = model

    def _is_here(self, ctx: Any) -> bool:
        return (ctx.rank if self.by_rank else ctx.node) == self.node

    def on_gradients(self, ctx: Any, grads: dict[str, Tensor]) -> None:
        if self.what == "gradient" and self._is_here(ctx) and self._step + 1 in self.steps:
            next(iter(grads.values())).view(-1)[3] += 1.0

    _step = 0

    def on_commit(self, ctx: Any, step: int) -> None:
        self._step = step
        if self._is_here(ctx) and step in self.steps and self.what != "gradient":
            self._corrupt()

    def _corrupt(self) -> None:
        optimizer = next(o for o in gc.get_objects() if isinstance(o, torch.optim.Optimizer))
        bank = next(iter(moe_layers(self.model).values())).experts
        slot = bank.expert_of_slot.index(2)
        match self.what:
            case "weight decay":
                optimizer.param_groups[0]["weight_decay"] = 0.5
            case "dense":
                _flip(next(self.model.parameters()))
            case "dense moment":
                _flip(optimizer.state[next(self.model.parameters())]["exp_avg"])
            case "expert":
                _flip(bank.weight[slot])
            case "expert moment":
                _flip(optimizer.state[bank.weight]["exp_avg_sq"][slot])


def _flip(tensor: Tensor) -> None:
    """Flip a bit that later steps do not round away, as they may with the last ones of a weight."""
    tensor.detach().view(-1).view(torch.int32)[5] ^= 1 << 16


def places(events: Sequence[Event]) -> set[tuple[int, int]]:
    return {(e["layer"], e["expert"]) for e in events}


@pytest.fixture(scope="module")
def calm(run: Any) -> Any:
    """The same run without a fault."""
    return run(nodes=3, steps=8, settings=[EVERYWHERE])


@pytest.mark.parametrize(
    "what",
    [
        "dense",
        *(
            pytest.param(w, marks=pytest.mark.slow)
            for w in ("expert", "dense moment", "expert moment", "weight decay")
        ),
    ],
)
def test_one_flipped_bit_is_repaired_at_once_and_leaves_no_trace(
    run: Any, calm: Any, what: str
) -> None:
    """D13: the comparison named the rank, with a majority, and nobody healed it."""
    outcome = run(
        nodes=3,
        steps=8,
        settings=[EVERYWHERE, "recovery.compare_every=2"],
        hooks=[Corrupts(what)],
    )
    outcome.assert_exactly_once(8)
    place = {(0, 2)} if what.startswith("expert") else {(-1, -1)}
    seen, healed = outcome.of("replica_mismatch"), outcome.of("replica_repaired")
    assert places(seen) == places(healed) == place
    assert [(e["step"], e["nodes"], e["majority"]) for e in seen] == [(4, [1], True)]
    assert [(e["step"], e["node"], e["rank"]) for e in healed] == [(4, 1, 1)]
    assert outcome.digest == calm.digest
    assert not outcome.of("node_lost")


@pytest.mark.slow
def test_a_gradient_that_one_rank_got_wrong_is_repaired(run: Any) -> None:
    """D13: all that the rank made of a wrong gradient differs; the others' is right."""
    outcome = run(
        nodes=3,
        steps=8,
        settings=[EVERYWHERE, "recovery.compare_every=1"],
        hooks=[Corrupts("gradient")],
    )
    outcome.assert_exactly_once(8)
    assert (-1, -1) in places(outcome.of("replica_repaired"))
    assert {e["node"] for e in outcome.of("replica_repaired")} == {1}
    assert {e["step"] for e in outcome.of("replica_mismatch")} == {4}, "nothing is left of it"


@pytest.mark.slow
@pytest.mark.parametrize("what", ["dense", "expert", "weight decay"])
@pytest.mark.parametrize("fault", ["kill:3@7", "leave:3@7", "leave:1@7"])
def test_a_change_of_members_compares_and_repairs_before_it_gives_up(
    run: Any, what: str, fault: str
) -> None:
    """D13: such a run stopped for an hour with "dense_digest differs" (5 of 5)."""
    outcome = run(
        fault,
        nodes=4,
        steps=12,
        settings=[EVERYWHERE, "recovery.compare_every=12"],
        hooks=[Corrupts(what)],
    )
    outcome.assert_exactly_once(12)
    assert not outcome.of("quorum_lost")
    (seen,) = outcome.of("replica_mismatch")
    assert (seen["nodes"], seen["majority"]) == ([1], True)
    assert seen["step"] in (6, 7), "at the change of members"
    if fault != "leave:1@7":
        (healed,) = outcome.of("replica_repaired")
        assert places([healed]) == ({(0, 2)} if what == "expert" else {(-1, -1)})
        assert (healed["node"], healed["source"]) == (1, "peer")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["dense", "expert"])
def test_a_newcomer_is_never_filled_from_what_was_outvoted(tmp_path: Path, what: str) -> None:
    """D14: it was, and then it was two against two."""
    after: list[int] = []

    def on_event(run: Watched, event: Event) -> None:
        if event["event"] == "node_joined" or (after and event["event"] == "step_committed"):
            after.append(1)
        if len(after) == 8:
            run.stop()

    run = watch(
        tmp_path,
        nodes=3,
        steps=3000,
        settings=[EVERYWHERE, "recovery.compare_every=2000"],
        acts=[at_step(4, Watched.start_node)],
        on_event=on_event,
        hooks=[Corrupts(what, node=0, steps=range(4, 3000, 4000))],
    )
    assert [e["node"] for e in run.of("node_joined")] == [3]
    (seen,) = run.of("replica_mismatch")
    assert (seen["nodes"], seen["majority"]) == ([0], True)
    (healed,) = run.of("replica_repaired")
    assert (healed["node"], healed["source"]) == (0, "peer")
    kinds = [e["event"] for e in run.events]
    assert kinds.index("replica_mismatch") < kinds.index("node_joined")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["dense", "expert"])
def test_one_against_one_goes_back_to_the_newest_checkpoint(tmp_path: Path, what: str) -> None:
    """D13: nobody can say who is right, so that part comes from where both had it from."""
    run = watch(
        tmp_path,
        nodes=2,
        steps=60,
        settings=[
            EVERYWHERE,
            "recovery.compare_every=1",
            "checkpoint.every=2",
            "checkpoint.select=full",
        ],
        hooks=[CorruptsOnce(what, node=1, marker=str(tmp_path / "struck"))],
    )
    assert run.status == "finished"
    assert (tmp_path / "struck").exists()
    (first, *_) = run.of("replica_mismatch")
    assert first["majority"] is False and first["nodes"] == [0, 1]
    assert {e["source"] for e in run.of("replica_repaired")} == {"checkpoint"}
    if what == "dense":
        (back,) = run.of("rolled_back")
        assert back["step"] <= first["step"]
    else:
        assert {(e["layer"], e["expert"]) for e in run.of("expert_restored")} == {(0, 2)}
    assert not [e for e in run.of("replica_mismatch") if e["step"] > first["step"] + 1]


class CorruptsOnce(Corrupts):
    """Once in a run's whole life, also where its steps are done again."""

    def __init__(self, what: str, *, node: int, marker: str) -> None:
        super().__init__(what, node=node, steps=range(20, 61))
        self.marker = marker

    def _corrupt(self) -> None:
        if not Path(self.marker).exists():
            Path(self.marker).touch()
            super()._corrupt()


def test_a_run_may_end_at_the_first_difference_instead(tmp_path: Path) -> None:
    """D13, ``recovery.on_mismatch=stop``: the end says what differs, and nothing is repaired."""
    with pytest.raises(Exception, match="recovery.on_mismatch is stop"):
        watch(
            tmp_path,
            nodes=3,
            steps=50,
            settings=[EVERYWHERE, "recovery.compare_every=1", "recovery.on_mismatch=stop"],
            hooks=[Corrupts("dense")],
        )
    events = read_events(tmp_path / "events.jsonl")
    assert events[-1]["event"] == "run_finished"
    assert (events[-1]["status"], events[-1]["cause"]) == ("failed", "node")
    assert [e["nodes"] for e in events if e["event"] == "replica_mismatch"] == [[1]]
    assert not [e for e in events if e["event"] == "replica_repaired"]


@pytest.mark.slow
def test_a_node_that_is_outvoted_again_and_again_is_suspect_and_goes(run: Any) -> None:
    """Line 9: the third time is no accident."""
    outcome = run(
        nodes=4,
        steps=20,
        settings=[EVERYWHERE, "recovery.compare_every=1"],
        hooks=[Corrupts("dense", steps=range(3, 20))],
    )
    outcome.assert_exactly_once(20)
    (suspect,) = outcome.of("node_suspect")
    assert (suspect["node"], suspect["times"]) == (1, 3)
    (lost,) = outcome.of("node_lost")
    assert lost["node"] == 1 and "outvoted" in lost["cause"]


@pytest.mark.slow
def test_nodes_that_part_one_after_the_other_are_the_users_code(tmp_path: Path) -> None:
    """Line 9: code that does something else on rank 1 must not cost node after node."""
    with pytest.raises(Exception, match="part ways again and again"):
        watch(
            tmp_path,
            nodes=5,
            steps=60,
            settings=[EVERYWHERE, "recovery.compare_every=1"],
            hooks=[Corrupts("dense", steps=range(3, 60), by_rank=True)],
        )
    events = read_events(tmp_path / "events.jsonl")
    assert (events[-1]["status"], events[-1]["cause"]) == ("failed", "user_code")
    assert len([e for e in events if e["event"] == "node_lost"]) == 1

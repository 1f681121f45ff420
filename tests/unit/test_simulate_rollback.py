"""Going back to a checkpoint on the virtual clock: what is done again, read and billed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lazarus.record.loads import LoadTrace, uniform_load
from lazarus.simulate.fleet.fleet import VirtualRun
from lazarus.simulate.fleet.training import Training
from lazarus.simulate.inputs.costs import PROFILES
from lazarus.simulate.inputs.faults import Scripted
from lazarus.simulate.inputs.shapes import SHAPES
from lazarus.simulate.inputs.traces import FleetEvent
from lazarus.simulate.rows import FleetPolicy, Setting
from lazarus.simulate.systems.policies import run_one, with_recovery

BARE = FleetPolicy(name="bare", min_replicas=1, slots_per_node=3)


def lose(*moments: tuple[float, str, tuple[str, ...]]) -> Scripted:
    return Scripted(script=tuple(FleetEvent(at_s=t, kind=k, nodes=n) for t, k, n in moments))


def setting(**more: Any) -> Setting:
    given: dict[str, Any] = {
        "name": "test", "shape": SHAPES["gpt-l"], "costs": PROFILES["rtx3090-100g"],
        "load": uniform_load(2, 16), "placed_layers": 2, "num_nodes": 10, "slots_per_node": 6,
        "horizon_s": 1800.0, "tokens_per_step": 40 * 1024.0,
    }  # fmt: skip
    return Setting(**{**given, **more})


def moving_load() -> LoadTrace:
    """What is hot turns every 300 steps."""
    row = np.arange(1, 17)
    counts = np.stack([np.stack([np.roll(row, turn)] * 2) for turn in (0, 5, 10, 15)])
    return LoadTrace(steps=np.array([0, 300, 600, 900]), counts=counts * 1000)


def bare(**more: Any) -> Setting:
    faults = lose((700.0, "remove", ("n0", "n1", "n2", "n3")))
    return setting(**{"faults": faults, "horizon_s": 1500.0, **more})


@pytest.mark.parametrize("load", [uniform_load(2, 16), moving_load()], ids=["even", "moving"])
@pytest.mark.parametrize("name", ["FromTheStart", "ToTheNewest"])
def test_a_rollback_undoes_what_the_steps_were(name: str, load: LoadTrace) -> None:
    chosen, events = bare(load=load, checkpoint_every=100), []
    policy = with_recovery(BARE, f"user_policies:{name}")
    run = VirtualRun(chosen, policy=policy, seed=0, on_event=events.append)
    row = run.run()
    (back,) = [e for e in events if e["event"] == "rolled_back"]
    assert (back["step"] == 0) == (name == "FromTheStart") and back["step"] % 100 == 0
    assert row.steps_lost > 0 and row.steps == run.training.step
    assert row.tokens == pytest.approx(row.steps * chosen.tokens_per_step)
    assert run.training.history[1].sum() == pytest.approx(row.tokens * 2, rel=1e-6)
    stalled = sum(row.stall_s.values())
    assert row.ettr * row.wall_s + stalled == pytest.approx(row.wall_s, abs=2.0)
    restore = chosen.costs.checkpoint_s(chosen.shape.total_bytes) if back["step"] else 0.0
    assert row.recovery_worst_s > restore
    assert (row.plt > 0) == (name == "ToTheNewest")  # of a checkpoint, seven eighths are older
    if len(load.steps) == 1:
        assert VirtualRun(chosen, policy=policy, seed=0, exact=True).run() == row


@pytest.mark.parametrize("name", ["FromTheStart", "ToTheNewest"])
def test_a_loss_after_a_rollback_is_one_like_any_other(name: str) -> None:
    first, second = ("n0", "n1", "n2", "n3"), ("n4",)
    faults = lose(
        (700.0, "remove", first), (800.0, "add", ("x0", "x1", "x2")), (1100.0, "remove", second)
    )
    chosen = bare(checkpoint_every=100, faults=faults)
    row = run_one(chosen, with_recovery(BARE, f"user_policies:{name}"), seed=0)
    assert (row.losses, row.joins, row.nodes_at_end) == (5, 3, 8)
    assert row.recoveries == 2 and "waiting for nodes" not in row.stall_s


def test_reading_a_whole_checkpoint_takes_time() -> None:
    waits = []
    for name in ("FromTheStart", "ToTheNewest"):
        chosen = bare(checkpoint_every=100)
        row = run_one(chosen, with_recovery(BARE, f"user_policies:{name}"), seed=0)
        waits.append(row.recovery_worst_s)
    read_s = chosen.costs.checkpoint_s(chosen.shape.total_bytes)
    assert waits[1] - waits[0] == pytest.approx(read_s, abs=3.0)


def test_losing_everything_bills_the_experts_that_the_checkpoint_holds_older() -> None:
    everyone, fresh = tuple(f"n{i}" for i in range(10)), tuple(f"x{i}" for i in range(10))
    faults = lose((900.0, "remove", everyone), (1000.0, "add", fresh))
    row = run_one(setting(faults=faults, checkpoint_every=100), FleetPolicy(name="l"), seed=0)
    assert row.restarts == 1 and 0 < row.plt < 0.5
    # One checkpoint only: it holds everything.
    row = run_one(setting(faults=faults, checkpoint_every=1000), FleetPolicy(name="l"), seed=0)
    assert row.restarts == 1 and row.plt == 0.0


def test_a_loss_right_after_the_return_from_storage_is_billed_under_moving_loads() -> None:
    everyone, fresh = tuple(f"n{i}" for i in range(10)), tuple(f"x{i}" for i in range(10))
    faults = lose(
        (900.0, "remove", everyone), (1000.0, "add", fresh),
        (1110.0, "remove", ("x0", "x1", "x2", "x3")),
    )  # fmt: skip
    chosen = setting(faults=faults, load=moving_load(), checkpoint_every=100, horizon_s=1500.0)
    before = run_one(replace(chosen, horizon_s=1105.0), BARE, seed=0)
    row = run_one(chosen, BARE, seed=0)
    assert row.restarts == 1 and row.experts_restored > 0
    assert 0 < before.plt * before.tokens < row.plt * row.tokens


def test_no_count_falls_below_that_of_a_stored_copy() -> None:
    run = VirtualRun(bare(load=moving_load(), checkpoint_every=100), policy=BARE, seed=0)
    run.run()
    training: Training = run.training
    training.start_again(run.state.saving.plt)
    stored = np.array(training.copies.counts_on_storage())
    assert (stored <= training.history[1].astype(np.int64)).all()
    exact = np.array([row.routed for row in training.copies.on_storage()[0]])
    assert (exact == stored.reshape(-1)).all()

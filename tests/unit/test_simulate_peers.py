"""Models of other systems: losses within a restart, spares, batches that shrink with the fleet."""

from __future__ import annotations

from typing import Any

import pytest

from lazarus.record.loads import uniform_load
from lazarus.simulate.inputs.costs import PROFILES
from lazarus.simulate.inputs.faults import Scripted
from lazarus.simulate.inputs.shapes import SHAPES
from lazarus.simulate.inputs.traces import FleetEvent
from lazarus.simulate.rows import Row, Setting
from lazarus.simulate.systems.peers import PeerPolicy, PeerRun

Moment = tuple[float, str, tuple[str, ...]]


def peer(kind: str, *moments: Moment, spares: int = 0, **more: Any) -> Row:
    given: dict[str, Any] = {
        "name": "test", "shape": SHAPES["gpt-l"], "costs": PROFILES["rtx3090-100g"],
        "load": uniform_load(2, 16), "num_nodes": 10, "slots_per_node": 6, "group": 2,
        "horizon_s": 3600.0, "tokens_per_step": 40 * 1024.0, "full_checkpoint_every": 100_000,
        "ft_checkpoint_every": 100_000, "peer_join_wait_s": 10.0,
    }  # fmt: skip
    script = tuple(FleetEvent(at_s=t, kind=k, nodes=n) for t, k, n in moments)
    setting = Setting(faults=Scripted(script=script), **{**given, **more})
    return PeerRun(setting, policy=PeerPolicy(name=kind, kind=kind, spares=spares), seed=0).run()


def booked(row: Row) -> float:
    return row.ettr * row.wall_s + sum(row.stall_s.values())


@pytest.mark.parametrize(("kind", "spares"), [("ds", 0), ("ds-ft", 0), ("peer-memory", 2)])
def test_a_loss_within_a_restart_starts_it_afresh(kind: str, spares: int) -> None:
    first, second = (600.0, "remove", ("n0", "n1")), (610.0, "remove", ("n2", "n3"))
    both = peer(kind, first, second, spares=spares)
    alone = peer(kind, (610.0, "remove", ("n0", "n1", "n2", "n3")), spares=spares)
    assert both.recoveries == 1
    assert both.recovery_worst_s == pytest.approx(10.0 + alone.recovery_worst_s)
    assert both.steps_lost <= alone.steps_lost
    assert booked(both) == pytest.approx(both.wall_s, abs=3.0)  # but for steps under way


def test_a_checkpoint_under_way_is_written_before_a_loss_is_noticed() -> None:
    every = {"full_checkpoint_every": 100, "steps": 150}
    calm = peer("ds", **every)
    save_s = calm.stall_s["checkpoint"]
    begun = 100 * calm.step_s_at_start
    row = peer("ds", (begun + save_s / 2, "remove", ("n0",)), **every)
    assert row.steps_lost == 0 and row.stall_s["checkpoint"] == pytest.approx(save_s)


def test_a_returning_node_is_a_spare_and_restarts_nothing() -> None:
    loss, back = (600.0, "remove", ("n0",)), (900.0, "add", ("x0",))
    without = peer("peer-memory", loss, spares=2)
    row = peer("peer-memory", loss, back, spares=2)
    assert (row.joins, row.nodes_at_end) == (1, 10)
    assert (row.restarts, row.stall_s) == (0, without.stall_s) and row.steps == without.steps
    # One that makes another group is taken in.
    more = peer("peer-memory", (600.0, "remove", ("n0", "n1", "n2", "n3")),
                (900.0, "add", ("x0", "x1")), spares=2)  # fmt: skip
    assert more.restarts == 1


def test_the_loss_of_a_spare_interrupts_no_step() -> None:
    calm = peer("peer-memory", spares=2, steps=100)
    middle_s = 50.5 * calm.step_s_at_start
    row = peer("peer-memory", (middle_s, "remove", ("n9",)), spares=2, steps=100)
    assert row.losses == 1 and row.wall_s == pytest.approx(calm.wall_s)


def test_steps_done_again_are_booked_as_what_they_carried() -> None:
    few, fatal = (600.0, "remove", ("n0", "n1")), (700.0, "remove", ("n2", "n4", "n6", "n8"))
    row = peer("ds-ft", few, fatal, peer_batch_per_node=True)
    assert row.restarts == 1 and row.steps_lost > 100
    # Nothing was saved: all that counts was done by the four nodes that are left.
    assert row.tokens == pytest.approx(row.steps * 40 * 1024.0 * 4 / 10)
    assert booked(row) == pytest.approx(row.wall_s, abs=3.0)

"""The virtual fleet drives the production decisions, deterministically, fast path equal to slow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from simulated import simulate

from lazarus.errors import ConfigError
from lazarus.record.loads import uniform_load, zipf_load
from lazarus.simulate.fleet.fleet import VirtualRun
from lazarus.simulate.inputs.costs import PROFILES
from lazarus.simulate.inputs.faults import FromTrace, Periodic, Poisson, Scripted
from lazarus.simulate.inputs.shapes import SHAPES
from lazarus.simulate.inputs.traces import FleetEvent, parse_trace
from lazarus.simulate.rows import FleetPolicy, Row, Setting
from lazarus.simulate.systems.policies import policy_named, run_one, with_recovery
from placement import PlacementRequest, Plan, replan

POLICIES = ("lazarus", "no-adaptive", "spread", "eplb-like", "pec", "ds", "ds-ft", "peer-memory")


def setting(**more: Any) -> Setting:
    given: dict[str, Any] = {
        "name": "test",
        "shape": SHAPES["gpt-l"],
        "costs": PROFILES["rtx3090-100g"],
        "load": zipf_load(2, 16, 0.8),
        "placed_layers": 2,
        "faults": Periodic(every_s=300, until=5),
        "num_nodes": 10,
        "slots_per_node": 6,
        "horizon_s": 1800.0,
        "tokens_per_step": 40 * 1024.0,
    }
    return Setting(**{**given, **more})


def lose(*moments: tuple[float, str, tuple[str, ...]]) -> Scripted:
    return Scripted(script=tuple(FleetEvent(at_s=t, kind=k, nodes=n) for t, k, n in moments))


def fleet(chosen: Setting, *, exact: bool = False, seed: int = 0) -> tuple[Row, list[Any]]:
    events: list[Any] = []
    run = VirtualRun(
        chosen, policy=FleetPolicy(name="lazarus"), seed=seed, exact=exact, on_event=events.append
    )
    return run.run(), events


@pytest.mark.parametrize(
    "faults",
    [
        Periodic(every_s=300, until=5),
        Poisson(node_mtbf_s=3000, replace_s=60, zones=3, zone_mtbf_s=4000),
    ],
)
def test_answers_entered_at_once_end_where_answers_one_by_one_end(faults: Any) -> None:
    chosen = setting(faults=faults, horizon_s=1200.0)
    fast, events = fleet(chosen)
    slow, exact_events = fleet(chosen, exact=True)
    assert fast == slow
    kinds = ("node_lost", "node_joined", "reconfigured", "plan_adopted")
    told = [e for e in events if e["event"] in kinds]
    assert told == [e for e in exact_events if e["event"] in kinds]
    assert len([e for e in told if e["event"] == "reconfigured"]) >= 3


@pytest.mark.slow
def test_a_fleet_with_joins_and_losses_ends_as_one_by_one() -> None:
    chosen = setting(
        shape=SHAPES["olmoe-1b-7b"],
        costs=PROFILES["h200-8x400g"],
        load=zipf_load(2, 64, 0.5),
        faults=Poisson(node_mtbf_s=20 * 3600, replace_s=300),
        num_nodes=70,
        slots_per_node=3,
        horizon_s=3600.0,
    )
    fast, events = fleet(chosen)
    slow, exact_events = fleet(chosen, exact=True)
    assert fast == slow and fast.losses >= 2 and fast.joins >= 2
    plans = [e["digest"] for e in events if e["event"] == "plan_adopted"]
    assert plans == [e["digest"] for e in exact_events if e["event"] == "plan_adopted"]


def test_the_same_seed_gives_the_same_row_and_another_seed_another_history() -> None:
    chosen = setting(faults=Poisson(node_mtbf_s=3000, replace_s=100))
    assert fleet(chosen, seed=1)[0] == fleet(chosen, seed=1)[0]
    assert fleet(chosen, seed=1)[0] != fleet(chosen, seed=2)[0]


def test_a_loss_costs_no_step_and_its_phases_are_those_of_the_cost_model() -> None:
    row, events = fleet(setting(faults=lose((100.0, "remove", ("n3",)))))
    assert (row.losses, row.steps_lost, row.plt, row.recoveries) == (1, 0, 0.0, 1)
    (change,) = [e for e in events if e["event"] == "reconfigured"]
    costs = PROFILES["rtx3090-100g"]
    assert change["phases"]["release"] == pytest.approx(costs.release_s, abs=1e-4)
    assert change["phases"]["groups"] == pytest.approx(costs.grouping_s(9), abs=1e-4)
    assert change["num_nodes"] == 9


def test_a_second_loss_during_a_recovery_starts_the_next_generation() -> None:
    faults = lose((100.0, "remove", ("n3",)), (101.0, "remove", ("n4",)))
    row, events = fleet(setting(faults=faults))
    (change,) = [e for e in events if e["event"] == "reconfigured"]
    assert change["attempts"] == 2 and change["num_nodes"] == 8
    assert row.steps_lost == 0


def test_newcomers_join_at_a_step_boundary() -> None:
    faults = lose((100.0, "remove", ("n3",)), (200.0, "add", ("x1", "x2")))
    row, events = fleet(setting(faults=faults))
    assert row.joins == 2 and row.nodes_at_end == 11
    assert [e["event"] for e in events].count("node_joined") == 2
    assert "planned change" in row.stall_s


def test_a_loss_during_a_planned_change_is_a_recovery() -> None:
    join = (200.0, "add", ("x1", "x2"))
    calm, _ = fleet(setting(faults=lose(join)))
    assert calm.recoveries == 0 and calm.nodes_at_end == 12
    for exact in (False, True):
        row, _ = fleet(setting(faults=lose(join, (235.0, "remove", ("n3",)))), exact=exact)
        assert row.recoveries == 1 and row.recovery_worst_s > 0
        assert row.stall_s["recovery"] == pytest.approx(row.recovery_worst_s, abs=1e-5)
        assert row.stall_s["planned change"] > calm.stall_s["planned change"]  # begun twice


def test_a_newcomer_that_is_gone_before_it_is_up_never_joins() -> None:
    faults = lose((200.0, "add", ("x1",)), (210.0, "remove", ("x1",)))
    row, events = fleet(setting(faults=faults))
    assert row.joins == 0
    assert not [e for e in events if e["event"] == "node_joined"]


def test_too_few_nodes_hold_the_state_until_others_come() -> None:
    gone = tuple(f"n{i}" for i in range(8))
    faults = lose((100.0, "remove", gone), (500.0, "add", ("x1", "x2", "x3")))
    row, events = fleet(setting(faults=faults, shape=replace(SHAPES["gpt-l"], experts=16)))
    assert any(e["event"] == "quorum_lost" for e in events)
    assert row.steps_lost == 0
    assert row.recovery_worst_s > 400


def test_the_removal_of_everything_means_a_restart_from_storage() -> None:
    everyone = tuple(f"n{i}" for i in range(10))
    fresh = tuple(f"x{i}" for i in range(10))
    faults = lose((900.0, "remove", everyone), (1000.0, "add", fresh))
    row, _ = fleet(setting(faults=faults, checkpoint_every=250))
    assert row.restarts == 1
    assert 0 < row.steps_lost < 250 + 25
    assert row.nodes_at_end == 10


def test_experts_without_a_live_replica_come_back_and_are_billed() -> None:
    chosen = setting(faults=Periodic(every_s=400, nodes=2, until=6), load=uniform_load(2, 16))
    row = run_one(chosen, FleetPolicy(name="bare", min_replicas=1, slots_per_node=3), seed=3)
    assert row.experts_restored > 0
    assert row.plt > 0 and row.steps_lost == 0


def test_the_recovery_policy_of_a_live_run_decides_here_too() -> None:
    chosen = setting(faults=Periodic(every_s=400, nodes=2, until=6), load=uniform_load(2, 16))
    bare = FleetPolicy(name="bare", min_replicas=1, slots_per_node=3)
    assert with_recovery(bare, None) is bare
    plain = run_one(chosen, bare, seed=3)
    patient = with_recovery(bare, "user_policies:Patient")
    assert patient.name == "bare+user_policies:Patient"
    row = run_one(chosen, patient, seed=3)
    assert row.experts_restored > 0
    assert row.recovery_worst_s == pytest.approx(plain.recovery_worst_s + 60, abs=5)
    assert row.plt > plain.plt  # the oldest copies, not the newest
    with pytest.raises(ConfigError, match=r"is called with \(losses, view, \*, now_s\)"):
        with_recovery(bare, "user_policies:GivesUp")


def test_every_policy_gives_a_plain_row_with_its_digest() -> None:
    rows = simulate(setting(), policies=POLICIES)
    assert [row.policy for row in rows] == list(POLICIES)
    assert len({row.config_digest for row in rows}) == 1
    assert all(row.goodput_tokens_per_s > 0 for row in rows)
    by_name = {row.policy: row.goodput_tokens_per_s for row in rows}
    assert by_name["lazarus"] > by_name["ds-ft"] > by_name["ds"]


def test_ds_restarts_from_the_last_checkpoint_and_ds_ft_does_not() -> None:
    rows = {r.policy: r for r in simulate(setting(), policies=["ds", "ds-ft"], seeds=[2])}
    assert rows["ds"].restarts >= 3 and rows["ds"].steps_lost > 0
    assert rows["ds-ft"].restarts < rows["ds"].restarts


class Strange:
    """A stranger's policy: the production one, but it counts its calls."""

    calls = 0

    def __call__(
        self, request: PlacementRequest, *, previous: Plan | None, lost: frozenset[int]
    ) -> Plan:
        type(self).calls += 1
        return replan(request, previous=previous, lost=lost)


def test_a_strangers_policy_runs_by_dotted_path(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    module = types.ModuleType("strange_policies")
    module.Strange = Strange  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "strange_policies", module)
    chosen = setting()
    policy = policy_named("strange_policies:Strange", chosen)
    row = run_one(chosen, policy, seed=0)
    assert Strange.calls >= 6
    assert row.policy == "strange_policies:Strange"
    for wrong in ("strange_policies:Nobody", "no_such_module:X", "lazarrus"):
        with pytest.raises(ConfigError):
            policy_named(wrong, chosen)


def test_a_spot_trace_drives_the_fleet() -> None:
    lines = ["0,add,a", "0,add,b", "0,add,c", "60000,remove,b", "120000,add,d"]
    trace = parse_trace(lines, name="t.csv")
    row, _ = fleet(setting(faults=FromTrace(trace=trace), num_nodes=3, slots_per_node=16))
    assert (row.losses, row.joins, row.nodes_at_end) == (1, 1, 3)


def test_a_thousand_nodes_for_a_day_take_seconds() -> None:
    chosen = setting(
        costs=PROFILES["h200-8x400g"],
        placed_layers=1,
        load=zipf_load(1, 16, 0.5),
        num_nodes=1000,
        slots_per_node=2,
        faults=Poisson(node_mtbf_s=264 * 86400, replace_s=3600),
        horizon_s=86400.0,
        tokens_per_step=1000 * 65536.0,
    )
    row, _ = fleet(chosen)
    assert row.losses >= 1 and row.steps_lost == 0 and row.ettr > 0.99

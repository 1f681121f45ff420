"""What lies just within a bound is taken, what lies beyond is not; texts say what is so."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from placement import InfeasiblePlacementError, InvalidRequestError, PlacementRequest, plan
from placement.assignment.assign import _least_loaded, fill
from placement.balance.allocate import allocate_replicas
from placement.balance.level import levelled
from placement.certificate import Certificate, certificate
from placement.foreign import certified
from placement.migration.migrate import balanced_choice
from placement.plan import Plan
from placement.rebalance import Regret, accumulated
from placement.request import feasible_floor
from placement.survival.bitmasks import mask_of
from placement.survival.estimate import estimated_survival
from placement.survival.frontier import frontier_counts
from placement.survival.interval import as_intervals, interval_survival
from placement.survival.resilience import survival
from placement.table import comparison, heat_map, wants_bold
from placement.templates.template import even_widths, proportional_sizes, segments, wrap

CERTIFICATE = Certificate(
    survival={0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0, 5: 1.0, 6: 0.75, 7: 0.0},
    low={0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0, 5: 1.0, 6: 0.7, 7: 0.0},
    high={0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0, 5: 1.0, 6: 0.8, 7: 0.0},
    method="estimate",
    fatal_nodes=(3, 5),
    fatal_experts=((0, 7), (1, 2), (1, 3), (1, 4), (1, 5), (1, 6)),
    max_over_mean=1.25,
    worst_max_over_mean=1.5,
    min_distinct_nodes=2,
    domain_survival={},
    hazard_survival=None,
)


def test_the_certificate_s_text_says_what_it_holds_and_no_more() -> None:
    assert CERTIFICATE.table().splitlines() == [
        "survives losses of   1: 100.0%   2: 100.0%   3: 100.0%   4: 100.0%   "
        "6: 75.0% (70.0%..80.0%)   (estimate)",
        "fatal set            nodes [3, 5] would lose experts 7, 1/2, 1/3, 1/4, 1/5, 1/6",
        "max/mean load        1.250 (worst layer 1.500)",
        "distinct nodes       >= 2",
    ]
    more = replace(
        CERTIFICATE,
        method="template bound",
        fatal_experts=(*CERTIFICATE.fatal_experts, (2, 0)),
        domain_survival={0: 1.0, 1: 0.5},
        hazard_survival=0.999,
    )
    lines = more.table().splitlines()
    assert lines[0].endswith("6: >= 75.0%   (template bound)")
    assert lines[1].endswith("1/5, 1/6 and 1 more")
    assert lines[4:] == ["survives domains     1: 50.0%", "under node hazards   99.9000%"]
    assert not CERTIFICATE.exact and not more.exact and replace(more, method="frontier").exact


def test_the_comparison_marks_the_best_of_each_column() -> None:
    worse = replace(CERTIFICATE, survival={1: 0.9, 2: 1.0}, max_over_mean=1.2504)
    best = replace(CERTIFICATE, survival={1: 1.0, 2: 0.99996})
    plain = comparison([("a", best), ("b", worse)], bold=False).splitlines()
    assert plain[0].split() == ["policy", "survive", "1", "survive", "2", "max/mean", "distinct"]
    assert plain[1].split() == ["a", "100.0%*", "100.0%*", "1.250*", "2"]
    assert plain[2].split() == ["b", "90.0%", "100.0%*", "1.250*", "2"]
    bold = comparison([("a", best), ("b", worse)], bold=True).splitlines()
    assert bold[1].count("\033[1m") == 3 and "*" not in bold[1]
    assert bold[2].replace("\033[1m", "").replace("\033[0m", "").split()[1] == "90.0%"
    assert [len(line.replace("\033[1m", "").replace("\033[0m", "")) for line in bold] == [58] * 3


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bold_is_for_terminals_that_want_it() -> None:
    assert wants_bold(Terminal(), {}) and wants_bold(Terminal(), {"NO_COLOR": ""})
    assert not wants_bold(Terminal(), {"NO_COLOR": "1"}) and not wants_bold(io.StringIO(), {})


def test_the_heat_map_is_cut_beyond_its_most_nodes_and_experts() -> None:
    def drawn(nodes: int, experts: int, layers: int = 1) -> list[str]:
        slots = -(-experts // nodes)
        request = PlacementRequest(
            load=np.ones((layers, experts)), num_nodes=nodes, slots_per_node=slots, min_replicas=1
        )
        return heat_map(plan(request)).splitlines()

    whole = drawn(64, 48)
    assert len(whole) == 66 and whole[-1].endswith("██ more")
    assert drawn(65, 48)[-1].endswith("██ more   64 of 65 nodes, 48 of 48 experts")
    assert drawn(64, 49)[-1].endswith("64 of 64 nodes, 48 of 49 experts")
    assert drawn(2, 2, layers=2)[-1].endswith("layer 0 of 2")
    assert "██" in drawn(2, 2)[1] and drawn(2, 2)[0].split() == ["e0", "e1"]


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({"resilience_weight": 0.0}, True),
        ({"resilience_weight": -0.1}, False),
        ({"solver_limit_s": 0.0}, False),
        ({"solver_limit_s": float("inf")}, False),
        ({"hazards": (0.0, 1.0)}, True),
        ({"hazards": (0.0, 1.1)}, False),
        ({"hazards": (-0.1, 1.0)}, False),
        ({"node_ids": (4, 4)}, False),
        ({"node_ids": (4, 5)}, True),
        ({"min_replicas": 1}, True),
        ({"min_replicas": np.int64(2)}, True),
        ({"load": [[0.0, 0.0]]}, True),
        ({"load": [[], []]}, False),
        ({"load": np.ones((1, 1, 2))}, False),
        ({"load": np.ones(2)}, True),
    ],
)
def test_a_request_at_its_bounds(options: dict[str, Any], taken: bool) -> None:
    shape = {"load": [1.0, 1.0], "num_nodes": 2, "slots_per_node": 2} | options
    if taken:
        assert plan(PlacementRequest(**shape)).num_nodes == 2
    else:
        with pytest.raises(InvalidRequestError):
            PlacementRequest(**shape)


def test_floors_that_just_fit_are_kept() -> None:
    exact = allocate_replicas([3.0, 1.0], num_slots=4, min_replicas=2, max_replicas=2)
    assert exact.tolist() == [[2, 2]]
    with pytest.raises(InfeasiblePlacementError, match=r"add 1 slots or lower min_replicas to 1"):
        allocate_replicas([3.0, 1.0], num_slots=3, min_replicas=2, max_replicas=2)
    with pytest.raises(InfeasiblePlacementError, match=r"min_replicas=3 copies .* there are 2"):
        allocate_replicas([3.0, 1.0], num_slots=9, min_replicas=3, max_replicas=2)
    with pytest.raises(InfeasiblePlacementError, match=r"min_replicas=0 must be >= 1"):
        allocate_replicas([3.0, 1.0], num_slots=9, min_replicas=0, max_replicas=2)
    shape = {"num_experts": 6, "num_nodes": 3, "min_replicas": 2}
    assert feasible_floor(slots_per_node=2, **shape) == 1
    assert feasible_floor(slots_per_node=4, **shape) == 2
    with pytest.raises(InfeasiblePlacementError, match=r">= 6 nodes, or slots_per_node >= 2"):
        feasible_floor(slots_per_node=1, **shape)


RING: dict[str, Any] = {"experts_of_node": [[[0, 1], [0, 2], [1, 2]]]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"survival": {"1": 1.0, "2": 0.0, "3": 0.0}}, ""),
        ({"survival": {1: 1, 2: 0}}, ""),
        ({"survival": {"1": 1.1}}, "'1' lost nodes is 1.1"),
        ({"survival": {"1": -0.1}}, "'1' lost nodes is -0.1"),
        ({"survival": {"1": True}}, "'1' lost nodes is True"),
        ({"survival": {"-1": 1.0}}, "'-1' lost nodes"),
        ({"experts_of_node": [[[0, 1], [0, 2, -1], [1, 2]]]}, ""),
        ({"experts_of_node": [[[0, 1], [0, 2, -2], [1, 2]]]}, "holds expert -2; there are 3"),
        ({"experts_of_node": [[[0, 1], [0, 3], [1, 2]]], "replicas": [[2, 2, 2]]}, "expert 3"),
        ({"experts_of_node": [[[0, True], [0, 2], [1, 2]]]}, "holds True, which is no expert id"),
        ({"experts_of_node": [[[0, 1.0], [0, 2], [1, 2]]]}, "holds 1.0, which is no expert id"),
        ({"experts_of_node": [[[0, 1], "02", [1, 2]]], "replicas": [[2, 2, 2]]}, "node 1 is no"),
        ({"experts_of_node": [[[0, 1], 5, [1, 2]]]}, "no list [L][N][...]"),
        ({"experts_of_node": []}, "no list [L][N][...]"),
        ({"experts_of_node": [[]], "replicas": [[2]]}, "different numbers of nodes: [0]"),
        ({"replicas": [], "shares": []}, "shares have shape [0]"),
        ({"shares": [[[0.5, 0.5, 0.0], [0.25, 0, 0.75], [0, 1, 0]]]}, ""),
        ({"shares": [[[0.5, 0.5, 0.0], [0.25, 0, 0.7501], [0, 1, 0]]]}, ""),
        ({"shares": [[[0.5, 0.5, 0.0], [0.25, 0, 0.7502], [0, 1, 0]]]}, "expert 1 add up to"),
        ({"shares": [[[0.5, 0.5, 0.0], [-0.25, 0, 1.25], [0, 1, 0]]]}, "finite and >= 0"),
        ({"shares": [[[0.5, 0.5, 0.0], [float("nan"), 0, 1], [0, 1, 0]]]}, "finite and >= 0"),
        ({"shares": [[[0.5, 0.4, 0.1], [0.25, 0, 0.75], [0, 1, 0]]]}, "node 2 serves 0.1 of"),
        ({"shares": "much"}, "shares are no numbers [L][E][N]"),
        ({"shares": [[[1, 0], [1, 0], [0, 1]]]}, "shares have shape [1, 3, 2], the plan [1, 3, 3]"),
    ],
)
def test_a_foreign_plan_at_its_bounds(change: dict[str, Any], message: str) -> None:
    if message:
        with pytest.raises(InvalidRequestError, match=re.escape(message)):
            certified(RING | change)
        return
    made, claims = certified(RING | change)
    assert claims(certificate(made)) == []
    assert made.replicas.tolist() == [[2, 2, 2]]


def test_claims_of_a_foreign_plan_are_measured_one_by_one() -> None:
    for claim, wrong in (
        ({"replicas": [[2, 2, 2]]}, 0),
        ({"replicas": [[2, 2, 1]]}, 1),
        ({"max_over_mean": 1.0}, 0),
        ({"max_over_mean": 0.99}, 1),
        ({"max_over_mean": "level"}, 1),
        ({"min_distinct_nodes": 2}, 0),
        ({"min_distinct_nodes": 1}, 1),
        ({"survival": {"3": 0.0}}, 0),
        ({"survival": {"4": 0.0}}, 1),
        ({"survival": {"2": 1e-3, "1": 0.999}}, 2),
    ):
        made, claims = certified(RING | claim)
        assert len(claims(certificate(made))) == wrong, claim
    with pytest.raises(InvalidRequestError, match=r"load has shape \[1, 2\], the plan \[1, 3\]"):
        certified(RING, load=[[1.0, 1.0]])
    made, claims = certified(RING | {"survival": {"2": 0.5}}, num_experts=3)
    assert claims(certificate(made, max_losses=1)) == []  # not covered, so not judged
    assert made.num_experts == 3


def test_a_plan_read_back_has_ids_that_ascend() -> None:
    made = plan(PlacementRequest(load=[1.0, 1.0], num_nodes=2, slots_per_node=2, node_ids=(3, 7)))
    data = made.to_dict()
    assert Plan.from_dict(data) == made
    for ids in ([3, 3], [7, 3]):
        with pytest.raises(InvalidRequestError, match="must ascend, each once"):
            Plan.from_dict(data | {"node_ids": ids})
    with pytest.raises(InvalidRequestError, match="the plan was altered"):
        Plan.from_dict(data | {"floor": 1})
    assert Plan.from_dict({k: v for k, v in data.items() if k != "digest"}) == made


def test_counts_of_nodes_and_widths_are_divided_as_said() -> None:
    assert even_widths(7, 3) == (2, 2, 3) and even_widths(6, 3) == (2, 2, 2)
    assert proportional_sizes(np.array([1.0, 1.0]), total=6, floor=2) == (3, 3)
    assert proportional_sizes(np.array([1.0, 5.0]), total=6, floor=1) == (1, 5)
    assert proportional_sizes(np.array([0.0, 0.0]), total=5, floor=1) == (2, 3)
    assert proportional_sizes(np.array([1.0, 1.0, 4.0]), total=6, floor=2) == (2, 2, 2)
    assert segments((1, 2), (3, 4)) == (((0,), 3), ((1, 2), 4))
    assert wrap((2, 2, 1), num_nodes=3, first_node=4) == (((4, 5), 1), ((4, 6), 1), ((5,), 1))
    assert wrap((3, 3), num_nodes=3) == (((0, 1, 2), 2),)


def test_replicas_go_to_the_idlest_nodes_the_lower_one_first() -> None:
    keys = np.array([[2.0, 1.0, 1.0, np.inf], [0.0, 0.0, 0.0, 0.0]])
    need = np.array([2, 1], dtype=np.int32)
    wanted = [[False, True, True, False], [True, False, False, False]]
    assert _least_loaded(keys, need).tolist() == wanted
    many = np.tile(keys, (1, 1024))  # beyond the size up to which keys are sorted whole
    many[:, 4:] += 3.0
    large = _least_loaded(many, need)
    assert large[:, :4].tolist() == wanted and large.sum() == 3
    blocked = _least_loaded(np.full((2, 4096), np.inf), need)
    assert not blocked.any()


def test_free_slots_go_to_the_most_loaded_experts() -> None:
    core = np.array([[[True, False], [False, True]]])
    load = np.array([[3.0, 1.0]])
    wanted = np.array([[1, 1]], dtype=np.int32)
    assert fill(load, wanted, core, slots_per_node=1).tolist() == core.tolist()
    both = fill(load, wanted, core, slots_per_node=2)
    assert both.all() and not core.all()


def test_the_busiest_sender_is_relieved_along_a_path() -> None:
    rows = [(0, 1), (0,), (1, 2), (0,)]
    assert balanced_choice(rows) in ([1, 0, 2, 0],)
    assert balanced_choice([(), (3,)]) == [-1, 3] and balanced_choice([]) == []
    many = [(0, 1)] * 20_001
    chosen = balanced_choice(many)
    assert chosen.count(0) == 10_001 and chosen.count(1) == 10_000


def test_a_move_that_costs_just_what_was_lost_is_not_due() -> None:
    regret, due = accumulated(Regret(), gain=0.5, steps=2, cost=1.0, alpha=1.0)
    assert (regret.value, due) == (1.0, False)
    assert accumulated(Regret(), gain=0.5, steps=0, cost=0.0)[1] is False
    for odd in ({"gain": float("nan")}, {"steps": -1}, {"alpha": float("inf")}):
        with pytest.raises(InvalidRequestError):
            accumulated(Regret(), **({"gain": 1.0, "steps": 1, "cost": 1.0} | odd))  # type: ignore[arg-type]


def test_sets_that_are_no_intervals_and_those_that_are() -> None:
    assert as_intervals([0b0110, 0b1001, 0b1111], num_nodes=4) == ((1, 2), (3, 2), (0, 4))
    assert as_intervals([0b0101], num_nodes=4) is None
    assert interval_survival((), num_nodes=4, max_losses=2).tolist() == [1.0, 1.0, 1.0]


def test_counts_are_given_up_beyond_the_most_states() -> None:
    sets = [mask_of(range(i, i + 4)) for i in range(9)]
    assert frontier_counts(sets, num_nodes=12) is not None
    assert frontier_counts(sets, num_nodes=12, max_states=2) is None
    assert frontier_counts([0b11], num_nodes=3) == (1, 3, 2, 0)  # node 2 is in no set


def test_an_estimate_is_exact_where_two_sets_cannot_be_dead_together() -> None:
    sets = [mask_of([0, 1]), mask_of([2, 3])]
    value, low, high = estimated_survival(sets, num_nodes=6, losses=2, seed=0)
    assert value == low == high == pytest.approx(1 - 2 / 15)
    value, low, high = estimated_survival(sets, num_nodes=6, losses=4, seed=0)
    assert low < 1 - 11 / 15 < high and low < value < high
    assert estimated_survival(sets, num_nodes=6, losses=1, seed=0) == (1.0, 1.0, 1.0)
    crowded = [mask_of([i, j]) for i in range(6) for j in range(i)]
    assert estimated_survival(crowded, num_nodes=6, losses=4, seed=0)[0] == 0.0


def test_groups_of_many_nodes_are_combined_as_those_of_few() -> None:
    few = survival([mask_of(range(4)), mask_of(range(4, 9))], num_nodes=64).probability
    more = survival([mask_of(range(4)), mask_of(range(4, 9))], num_nodes=65).probability
    # One more node that is in no set: with chance k / 65 it is among the dead.
    for k in range(1, 65):
        mixed = few[k] * (65 - k) / 65 + few[k - 1] * k / 65
        assert more[k] == pytest.approx(mixed, abs=1e-12)


def test_the_idlest_nodes_of_many_are_those_of_a_whole_sort(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(8)
    for most in (1, 2, 5, 40, 64):
        keys = rng.integers(0, 30, size=(6, 64)).astype(float)
        keys[rng.random(keys.shape) < 0.1] = np.inf
        need = rng.integers(0, most + 1, size=6).astype(np.int32)
        whole = _least_loaded(keys, need)
        with monkeypatch.context() as patch:
            patch.setattr("placement.assignment.assign._SMALL", 0)
            assert (_least_loaded(keys, need) == whole).all()


def test_what_is_level_is_left_as_it_is() -> None:
    member = np.ones((1, 2, 2), dtype=np.bool_)
    core = np.zeros_like(member)
    same, ratio = levelled(np.array([[3.0, 1.0]]), member, core, slots_per_node=2)
    assert same is member and ratio is not None and ratio[0] <= 1.002
    apart = np.array([[[True, False], [False, True]]])
    better, _ = levelled(np.array([[3.0, 1.0]]), apart, core, slots_per_node=2, rounds=1)
    assert better.sum() == 3 and better[0, 0].all() and not (apart == better).all()
    kept, _ = levelled(np.array([[3.0, 1.0]]), apart, apart, slots_per_node=1)
    assert (kept == apart).all()  # the core stays
    only = np.array([True, False])
    barred, _ = levelled(np.array([[3.0, 1.0]]), apart, core, slots_per_node=2, targets=only)
    assert not barred[0, 0, 1]


def test_the_cheapest_exact_method_is_the_one_that_is_used() -> None:
    rng = np.random.default_rng(4)

    def used(sets: int, nodes: int) -> str:
        drawn = [mask_of(rng.choice(nodes, size=5, replace=False).tolist()) for _ in range(sets)]
        return survival([*drawn, 0b11, 0b101], num_nodes=nodes, max_losses=2).method

    assert used(12, 14) == used(12, 20) == "truth table"
    assert used(200, 14) == "truth table" and used(200, 16) == "frontier"
    assert used(40, 21) == "frontier"
    assert survival([0b11, 0b110], num_nodes=16).method == "truth table"  # of their three nodes
    assert survival([1 << i | 1 << i + 1 for i in range(20)], num_nodes=21).method == "interval"
    assert survival([0b11, 0b1100], num_nodes=30).method == "closed form"

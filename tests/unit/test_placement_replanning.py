"""When a plan is replaced, and by which policy: rebalancing, replanning, policies by name."""

from __future__ import annotations

import random

import numpy as np
import pytest
from placement_requests import request, zipf

from placement import (
    InvalidRequestError,
    PlacementRequest,
    Plan,
    plan,
    policy_from_path,
    replan,
)
from placement.balance.shares import balance_of
from placement.migration.migrate import transfers
from placement.rebalance import MoveCost, Regret, accumulated, considered
from placement.testing import assert_valid, conformance


def test_regret_waits_until_moving_has_paid_off() -> None:
    regret, due = accumulated(Regret(), gain=0.1, steps=5, cost=1.0, alpha=1.0)
    assert not due and regret.value == pytest.approx(0.5)
    regret, due = accumulated(regret, gain=-3.0, steps=100, cost=1.0, alpha=1.0)
    assert not due and regret.value == pytest.approx(0.5)
    regret, due = accumulated(regret, gain=0.1, steps=6, cost=1.0, alpha=1.0)
    assert due and regret == Regret()
    with pytest.raises(InvalidRequestError, match="cost=-1"):
        accumulated(regret, gain=0.0, steps=1, cost=-1.0)


def test_a_drifted_load_leads_to_a_rebalance_and_a_steady_one_to_none() -> None:
    made = plan(request())
    regret, then = considered(Regret(), request(), previous=made, steps=1000, cost=MoveCost())
    assert then is None or transfers(made, then) == ()
    turned = request(load=np.roll(request().load, 5, axis=1))
    regret, then = considered(Regret(), turned, previous=made, steps=1000, cost=MoveCost())
    assert then is not None and regret == Regret()
    assert (
        balance_of(turned.load, then.node_member).mean()
        < balance_of(turned.load, made.node_member).mean()
    )


def test_new_shares_alone_are_adopted_when_they_have_paid_for_the_pause() -> None:
    """A ring of three experts has nowhere to move, but who serves what follows the load."""
    before = request(3, 2, load=[[1.0, 1.0, 1.0]])
    made = plan(before)
    turned = request(3, 2, load=[[1.0, 1.4, 1.0]])
    regret, then, looks = Regret(), None, 0
    while then is None and looks < 1000:
        regret, then = considered(
            regret, turned, previous=made, steps=1, cost=MoveCost(fixed=1.0), latest=turned.load
        )
        looks += 1
    assert then is not None and transfers(made, then) == ()
    assert looks > 5
    level = then.loads_of_nodes(turned.load)
    assert level.max() / level.mean() < made.loads_of_nodes(turned.load).max() / level.mean()
    _, same = considered(Regret(), before, previous=made, steps=1000, cost=MoveCost())
    assert same is None


class Fresh:
    """A stranger's policy: always from scratch."""

    def __call__(
        self, request: PlacementRequest, *, previous: Plan | None, lost: frozenset[int]
    ) -> Plan:
        return replan(request, previous=None)


class Needy:
    """A class that cannot be made without an argument."""

    def __init__(self, taste: float) -> None:
        self.taste = taste


def test_a_policy_is_selected_by_dotted_path() -> None:
    assert policy_from_path("placement.policy.replan") is replan
    assert policy_from_path("placement.policy:replan") is replan
    found = policy_from_path(f"{__name__}:Fresh")
    assert conformance(found) > 50
    for path, message in (
        (f"{__name__}:Needy", "needs arguments"),
        ("replan", "no dotted path"),
        ("placement.nothing.x", "nothing"),
        ("placement.policy.x", "'x'"),
        ("placement.policy.__name__", "str"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            policy_from_path(path)


def test_replanning_is_deterministic_along_a_long_life() -> None:
    rng = random.Random(7)
    ids = list(range(6))
    before: Plan | None = None
    lost: frozenset[int] = frozenset()
    for step in range(25):
        now = request(len(ids), 6, node_ids=tuple(ids), load=zipf(3, 16, 1.0, seed=step // 5))
        made = replan(now, previous=before, lost=lost)
        assert_valid(made, now)
        again = replan(now, previous=before and Plan.from_json(before.to_json()), lost=lost)
        assert again.digest == made.digest
        before = made
        if rng.random() < 0.5 and len(ids) > 3:
            lost = frozenset(rng.sample(ids, 1))
            ids = [n for n in ids if n not in lost]
        else:
            lost = frozenset()
            ids.append(max(*ids, 6 + step) + 1)

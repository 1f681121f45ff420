"""The same promise where tokens are spread over replicas, and where tensors go over sockets."""

from __future__ import annotations

from typing import Any

import pytest

STEP, STEPS = 4, 7
WAYS = {
    "balanced": ("dispatch.mode=balanced", "dispatch.rows_per_replica=0"),
    "shares": ("dispatch.mode=shares",),
    "balanced over sockets": (
        "dispatch.mode=balanced", "dispatch.rows_per_replica=0", "dispatch.transport=group",
    ),
    "home over sockets": ("dispatch.transport=group",),
    "overlapped": ("dispatch.overlap=on",),
    "overlapped, balanced, over sockets": (
        "dispatch.overlap=on", "dispatch.transport=group", "dispatch.mode=balanced",
        "dispatch.rows_per_replica=0",
    ),
}  # fmt: skip
QUICK = {
    ("balanced", "grad_sync"), ("home over sockets", "dispatch"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("way", "phase"),
    [
        pytest.param(way, phase, marks=() if (way, phase) in QUICK else pytest.mark.slow)
        for way in WAYS
        for phase in ("dispatch", "backward", "grad_sync", "commit")
    ],
)
def test_a_kill_leaves_the_bits_of_a_leave_in_every_mode(run: Any, way: str, phase: str) -> None:
    settings = WAYS[way]
    killed = run(f"kill:2@{STEP}/{phase}", steps=STEPS, settings=settings)
    killed.assert_exactly_once(STEPS)
    last = max(e["generation"] for e in killed.of("reconfigured"))
    left = run(f"leave:2@{killed.resumed_at(last) + 1}", steps=STEPS, settings=settings)
    assert killed.digest == left.digest


@pytest.mark.slow
def test_transports_sum_in_different_orders_but_modes_train_alike(run: Any) -> None:
    home = run(steps=STEPS, settings=WAYS["home over sockets"])
    for way in ("balanced", "shares"):
        for step, loss in run(steps=STEPS, settings=WAYS[way]).losses.items():
            assert loss == pytest.approx(home.losses[step], rel=1e-4)

"""The promise, phase by phase: a kill anywhere leaves the bits of a leave (rules 40-42)."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest

from lazarus.checkpoint.files.verify import verify

PHASES = ("data", "forward", "dispatch", "combine", "backward", "grad_sync", "commit", "optimizer")
STEP = 4
STEPS = 7


@pytest.fixture(scope="session")
def left(run: Any) -> Any:
    """The same nodes leaving on purpose before a step; each membership is run once."""

    @cache
    def go(nodes: tuple[int, ...], before: int) -> Any:
        outcome = run(*(f"leave:{node}@{before}" for node in nodes), steps=STEPS)
        assert {e["node"] for e in outcome.of("node_left")} == set(nodes)
        return outcome

    return go


@pytest.fixture(scope="session")
def undisturbed(run: Any) -> Any:
    return run(steps=STEPS)


QUICK = {("backward", (2,)), ("commit", (0,))}  # the rest of the matrix runs with the slow tests
CASES = [
    pytest.param(
        phase,
        nodes,
        id=f"{phase}-{name}",
        marks=() if (phase, nodes) in QUICK else pytest.mark.slow,
    )
    for phase in PHASES
    for name, nodes in (("middle", (2,)), ("first", (0,)), ("two", (1, 3)))
]


# With checkpoints under way at every step.
BESIDE = ("checkpoint.every=1", "checkpoint.k_persist=1", "checkpoint.k_snapshot=3")
CHECKPOINTED = [
    pytest.param(
        phase,
        nodes,
        id=f"{phase}-{name}",
        marks=pytest.mark.slow,
    )
    for phase in PHASES
    for name, nodes in (("middle", (2,)), ("first", (0,)), ("two", (1, 3)))
]


@pytest.mark.parametrize(("phase", "nodes"), CASES)
def test_a_kill_leaves_the_bits_of_a_leave(
    run: Any, left: Any, undisturbed: Any, phase: str, nodes: tuple[int, ...]
) -> None:
    _kill(run, left, undisturbed, phase, nodes)


@pytest.mark.parametrize(("phase", "nodes"), CHECKPOINTED)
def test_with_checkpoints_under_way_the_bits_are_the_same(
    run: Any, left: Any, undisturbed: Any, phase: str, nodes: tuple[int, ...]
) -> None:
    outcome = _kill(run, left, undisturbed, phase, nodes, settings=BESIDE)
    assert not outcome.of("expert_restored")  # no expert lost all of its replicas
    found = verify(str(outcome.folder / "checkpoints"))
    assert found.bad == ()
    assert outcome.of("checkpoint_persisted", "checkpoint_failed")


def _kill(
    run: Any,
    left: Any,
    undisturbed: Any,
    phase: str,
    nodes: tuple[int, ...],
    settings: tuple[str, ...] = (),
) -> Any:
    faults = [f"kill:{node}@{STEP}/{phase}" for node in nodes]
    outcome = run(*faults, steps=STEPS, settings=settings)

    fired = {(e["node"], e["phase"]) for e in outcome.of("fault_injected")}
    assert fired == {(node, phase) for node in nodes}
    assert {e["node"] for e in outcome.of("node_lost")} == set(nodes)
    outcome.assert_exactly_once(STEPS)

    last = max(e["generation"] for e in outcome.of("reconfigured"))
    base = outcome.resumed_at(last)
    assert base in (STEP - 1, STEP)
    assert outcome.digest == left(nodes, base + 1).digest
    for step, loss in outcome.losses.items():
        assert math.isclose(loss, undisturbed.losses[step], rel_tol=1e-4)
    return outcome

"""Laws of restoring: which copies count, which one is taken, and what is lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazarus.checkpoint.format.lineage import extended, is_valid
from lazarus.checkpoint.restoring.plt import PltLedger, portion_lost, staleness
from lazarus.checkpoint.restoring.restore_choice import (
    Copy,
    Fail,
    Loss,
    Restore,
    Rollback,
    Source,
    StoredCheckpoint,
    choose_copy,
    decide_recovery,
)

lineages = st.lists(st.integers(0, 30), max_size=6).map(
    lambda steps: tuple(enumerate(steps, start=1))
)


@given(lineage=lineages, generation=st.integers(0, 6), step=st.integers(0, 30))
def test_validity_follows_the_history_step_by_step(
    lineage: tuple[tuple[int, int], ...], generation: int, step: int
) -> None:
    # The slow twin: replay the run; what each RESUME leaves true.
    alive = True
    for later, resumed in lineage:
        if later > generation and step > resumed:
            alive = False
    newest = max([30, *(b for _, b in lineage)])
    assert is_valid(generation=generation, step=step, lineage=lineage, resume_step=newest) == alive


@given(
    lineage=st.lists(st.integers(0, 30), max_size=6).map(sorted),
    generation=st.integers(0, 6),
    step=st.integers(0, 30),
)
def test_without_rollbacks_the_first_later_generation_decides(
    lineage: list[int], generation: int, step: int
) -> None:
    pairs = tuple(enumerate(lineage, start=1))
    first = next((resumed for later, resumed in pairs if later > generation), 30)
    valid = is_valid(generation=generation, step=step, lineage=pairs, resume_step=30)
    assert valid == (step <= first)


def test_a_step_that_a_dead_rank_applied_alone_is_void() -> None:
    lineage = extended([(1, 0)], generation=2, step=9)
    assert not is_valid(generation=1, step=10, lineage=lineage, resume_step=12)
    assert is_valid(generation=2, step=10, lineage=lineage, resume_step=12)
    with pytest.raises(ValueError, match="only grow"):
        extended(lineage, generation=2, step=9)


def copy(step: int, source: Source, node: int = -1, **extra: int) -> Copy:
    return Copy(layer=0, expert=3, generation=1, step=step, source=source, node=node, **extra)


def lost(*copies: Copy, targets: tuple[int, ...] = (4,), routed: int = 90) -> Loss:
    return Loss(layer=0, expert=3, targets=targets, routed=routed, copies=copies)


def test_the_newest_valid_copy_wins_and_the_nearest_among_equals() -> None:
    storage = copy(20, Source.STORAGE, routed=40)
    other = copy(30, Source.OTHER_NODE, node=2, routed=60)
    own = copy(30, Source.OTHER_NODE, node=4, routed=60)
    void = copy(50, Source.OTHER_NODE, node=1)
    decision = decide_recovery(
        [lost(storage, other, own, void)],
        policy="partial",
        lineage=[(1, 0), (2, 45)],
        resume_step=45,
    )
    assert isinstance(decision, Restore)
    (restored,) = decision.experts
    assert restored.copy == own
    assert restored.source is Source.OWN_NODE
    assert (restored.behind_steps, restored.lost_copies) == (15, 30)


def test_a_lost_expert_without_any_valid_copy_fails_by_name() -> None:
    decision = decide_recovery(
        [lost(copy(50, Source.STORAGE))], policy="partial", lineage=[(2, 45)], resume_step=45
    )
    assert isinstance(decision, Fail)
    assert "L0/E3" in decision.reason


def test_rollback_prefers_a_full_checkpoint_on_the_lineage() -> None:
    stored = [
        StoredCheckpoint(generation=1, step=10, is_full=True),
        StoredCheckpoint(generation=1, step=40, is_full=False),
        StoredCheckpoint(generation=1, step=60, is_full=True),
    ]
    decision = decide_recovery(
        [lost()], policy="rollback", lineage=[(2, 45)], resume_step=45, checkpoints=stored
    )
    assert isinstance(decision, Rollback)
    assert decision.step == 10
    empty = decide_recovery([lost()], policy="rollback", lineage=[], resume_step=45)
    assert isinstance(empty, Rollback)
    assert empty.step == 0  # the start of the run: any node makes it anew from the seed
    assert isinstance(decide_recovery([lost()], policy="fail", lineage=[], resume_step=4), Fail)


@given(st.permutations([copy(s, Source.OTHER_NODE, node=n) for s in (10, 20) for n in (1, 2, 4)]))
def test_the_choice_does_not_depend_on_the_order_of_inventories(copies: list[Copy]) -> None:
    choice = choose_copy(lost(*copies), lineage=[], resume_step=20)
    assert choice is not None
    assert (choice.copy.step, choice.copy.node) == (20, 4)


@given(events=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 60)), min_size=1, max_size=12))
def test_copies_lost_twice_count_once(events: list[tuple[int, int]]) -> None:
    # The slow twin: a set of all lost copies by number.
    ledger, twin, now, total = PltLedger(), set[int](), 0, 0
    for routed_more, age in events:
        now += routed_more
        version = max(0, now - age)
        # A version is taken from a state; copies it lacks were billed before.
        ledger, new = ledger.restored(layer=1, expert=2, version_routed=version, routed=now)
        before = len(twin)
        twin |= set(range(version + 1, now + 1))
        assert new == len(twin) - before
        total += new
    assert ledger.lost(1, 2) == total
    assert ledger.lost(1, 2) == len(twin)
    assert PltLedger.from_json(ledger.to_json()) == ledger


def test_plt_is_the_mean_over_layers_of_lost_to_routed() -> None:
    ledger, new = PltLedger().restored(layer=0, expert=1, version_routed=70, routed=100)
    assert new == 30
    routed = [[100, 100], [150, 50]]
    assert portion_lost(ledger.lost_by_expert(), routed=routed) == pytest.approx(0.5 * 30 / 200)
    assert portion_lost({}, routed=[[0, 0]]) == 0.0
    assert ledger.rolled_back([[60, 60]]).lost_by_expert() == {}
    assert ledger.rolled_back([[80, 80]]).lost_by_expert() == {(0, 1): 10}
    assert staleness([[70, 100]], routed=[[100, 100]]) == {(0, 0): 30}

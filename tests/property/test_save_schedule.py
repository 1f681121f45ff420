"""The schedule of saves is a function of committed steps, however a rank came to commit them."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lazarus.checkpoint.selection.schedule import default_schedule
from lazarus.control.messages import Resume
from lazarus.runtime.saving.save_schedule import SaveSchedule

LAYERS, EXPERTS = 2, 6


def schedule(every: int, select: str) -> SaveSchedule:
    config = default_schedule(
        num_layers=LAYERS,
        num_experts=EXPERTS,
        every=every,
        k_snapshot=2,
        k_persist=1,
        select=select,
    )
    return SaveSchedule(config, last_step=40)


def counts(step: int) -> np.ndarray:
    return np.array([[float((step * (e + 2) + x) % 7) for e in range(EXPERTS)] for x in range(2)])


@st.composite
def lives(draw: st.DrawFn) -> list[tuple[str, bool, bool, bool]]:
    """What happens to two ranks: commits, and changes of members of which one hears half."""
    kinds = st.sampled_from(["commit", "commit", "commit", "change"])
    flags = st.booleans()
    return draw(st.lists(st.tuples(kinds, flags, flags, flags), min_size=1, max_size=30))


@given(
    events=lives(), every=st.sampled_from([1, 2, 4]), select=st.sampled_from(["sequential", "load"])
)
def test_ranks_agree_whoever_was_late_or_missed_a_resume(
    events: list[tuple[str, bool, bool, bool]], every: int, select: str
) -> None:
    """D3: one rank decides each step, the other gets some of them by the verdict only."""
    prompt, late = schedule(every, select), schedule(every, select)
    step = 0
    for kind, by_verdict, missed, double in events:
        if kind == "commit":
            step += 1
            prompt.committed(step, counts(step))
            prompt.take_due(step)
            late.committed(step, counts(step))
            if by_verdict:
                late.aligned()
                prompt.aligned()
            else:
                late.take_due(step)
            assert prompt.to_text() == late.to_text()
            continue
        order = Resume(generation=9, step=step, double_k=double, save_all=by_verdict)
        prompt.adapt(order)
        if missed:  # so no step was committed in that generation: the next one says it all again
            prompt.aligned(), late.aligned()
            assert prompt.to_text() == late.to_text()
            prompt.adapt(order)
        late.adapt(order)
    joiner = schedule(every, select)
    joiner.take_text(late.to_text())
    assert joiner.to_text() == prompt.to_text()


@given(every=st.integers(1, 5), late_at=st.sets(st.integers(1, 40)))
def test_every_expert_is_saved_again_and_a_share_not_begun_is_told(
    every: int, late_at: set[int]
) -> None:
    rank = schedule(every, "sequential")
    persisted: dict[int, set[int]] = {e: set() for e in range(EXPERTS)}
    for step in range(1, 40):
        rank.committed(step, counts(step))
        if step in late_at:
            assert rank.aligned() == (step if step % every == 0 else None)
            assert rank.take_due(step) is None
            continue
        selection = rank.take_due(step)
        for expert in selection.persist[0] if selection else ():
            persisted[expert].add(step)
    if not late_at:
        assert all(persisted.values())
    rank.committed(40, counts(40))
    assert rank.take_due(40) is None  # the full checkpoint of the end follows

"""The schedule of saves from measured rates: against a search over all K, and its limits."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazarus.checkpoint.selection.adaptive import (
    DEFAULT_EVERY,
    Adapted,
    Measured,
    SaveSettings,
    adapt,
    busiest_rank,
    default_of,
    ladder_of,
    rounded_up,
)
from lazarus.checkpoint.selection.schedule import (
    ScheduleConfig,
    ScheduleState,
    doubled_k,
    rescheduled,
    select_experts,
)

RATES = st.floats(1e3, 1e12)
SIZES = {"num_layers": 2, "num_experts": 32}


def measured(*, copy: float = 1e9, write: float = 1e9, window: float = 1.0) -> Measured:
    return Measured(copy_rate=copy, write_rate=write, window_s=window)


@given(
    ranks=st.lists(st.tuples(RATES, st.floats(1e-3, 10.0)), min_size=1, max_size=4),
    record=st.integers(1, 10**9),
    k_persist=st.integers(1, 32),
)
def test_k_is_the_largest_step_of_the_ladder_that_the_slowest_rank_hides(
    ranks: list[tuple[float, float]], record: int, k_persist: int
) -> None:
    found = adapt(
        SaveSettings(k_persist=k_persist),
        [measured(copy=rate, window=window) for rate, window in ranks],
        step_s=1.0,
        busiest=lambda k: k * record,
        **SIZES,
    )
    rate, window = min(r for r, _ in ranks), min(w for _, w in ranks)
    hidden = [k for k in ladder_of(k_persist, 32) if k * record <= 0.8 * rate * window]
    assert found.k_snapshot == max(hidden, default=k_persist)
    assert found.persist_every == DEFAULT_EVERY
    assert DEFAULT_EVERY % found.snapshot_every == 0


@pytest.mark.slow
@given(rate=RATES, num_bytes=st.integers(1, 10**10), step_s=st.floats(0.01, 10.0))
def test_the_interval_leaves_storage_idle_half_of_the_time_and_is_not_much_longer(
    rate: float, num_bytes: int, step_s: float
) -> None:
    found = adapt(
        SaveSettings(every=None),
        [measured(write=rate)],
        step_s=step_s,
        busiest=lambda k: num_bytes,
        **SIZES,
    )
    persist_s = num_bytes / rate
    assert found.persist_every * step_s * (1 + 1e-6) >= 2 * persist_s
    shorter = found.persist_every / 2.5  # 1, 2, 5, 10: the next step down is at most that far
    assert found.persist_every == 1 or shorter * step_s <= 2 * persist_s + step_s


def test_what_the_user_fixed_stays() -> None:
    fixed = SaveSettings(every=12, k_snapshot=3, k_persist=2)
    assert not fixed.is_adaptive and not SaveSettings(select="full").is_adaptive
    assert SaveSettings(every=None, select="full").is_adaptive
    found = adapt(fixed, [measured()], step_s=1.0, busiest=lambda k: k, **SIZES)
    assert found == default_of(fixed, **SIZES)
    assert (found.k_snapshot, found.persist_every) == (3, 12)


@pytest.mark.parametrize(
    ("steps", "rounded"), [(1, 1), (2, 2), (3, 5), (6, 10), (10, 10), (11, 20), (101, 200)]
)
def test_intervals_are_round(steps: int, rounded: int) -> None:
    assert rounded_up(steps) == rounded


def test_a_factor_of_two_is_far() -> None:
    here = Adapted(k_snapshot=4, snapshot_every=50, persist_every=200)
    assert here.is_far_from(replace(here, k_snapshot=8))
    assert here.is_far_from(replace(here, persist_every=100))
    assert not here.is_far_from(replace(here, k_snapshot=6, snapshot_every=10))


def test_the_busiest_rank_counts_what_only_it_holds() -> None:
    alone = {"num_ranks": 2, "num_layers": 1, "num_experts": 4, "expert_bytes": 10}
    everywhere = busiest_rank(4, ranks_of=lambda x, e: (0, 1), dense_bytes=7, **alone)
    assert everywhere == 4 + 20
    lopsided = busiest_rank(4, ranks_of=lambda x, e: (0,), dense_bytes=7, **alone)
    assert lopsided == 4 + 40


def test_a_new_schedule_takes_effect_and_dynamic_k_outlives_it() -> None:
    config = ScheduleConfig(
        num_layers=1,
        num_experts=8,
        k_snapshot=2,
        k_persist=1,
        snapshot_every=5,
        persist_every=10,
    )
    state = replace(ScheduleState.initial(config), persisted_once=True)
    state = rescheduled(state, config, k_snapshot=4, snapshot_every=2, persist_every=6)
    chosen = select_experts(state, config, step=6, unsaved=[[0] * 8])
    assert chosen is not None
    assert len(chosen[0].snapshot[0]) == 4 and len(chosen[0].persist[0]) == 1
    assert select_experts(state, config, step=5, unsaved=[[0] * 8]) is None
    doubled = doubled_k(state, config, plt_of_present_k=1.0)
    again = rescheduled(doubled, config, k_snapshot=1)
    assert (again.k_snapshot, again.k_persist) == (4, 2)
    assert rescheduled(state, config) == replace(ScheduleState.initial(config), persisted_once=True)

"""A node that is slow for long gets fewer samples, and its share back when it is fast again."""

from __future__ import annotations

from dataclasses import replace

from control_desk import Desk, running

from lazarus.control.messages import Pause, Prepare
from lazarus.control.plans.tuning import MIN_WEIGHT, STREAK
from lazarus.data.sampler import share

SLOW = {2: 0.08}  # the others take 0.01 s


def slow_for(desk: Desk, steps: int, own_s: dict[int, float] = SLOW) -> None:
    for _ in range(steps):
        desk.commit(desk.state.step + 1, own_s=own_s)


def slowed() -> Desk:
    """Three nodes of which the last one has had its share cut."""
    desk = running()
    slow_for(desk, STREAK)
    desk.pause()
    return desk


def test_a_node_that_stays_slow_gets_fewer_samples_at_one_pause() -> None:
    desk = running()
    slow_for(desk, STREAK - 1)
    assert not desk.events("rank_slow") and not desk.told(Pause)
    slow_for(desk, 1)
    (event,) = desk.events("rank_slow")
    assert (event["node"], event["rank"], event["weight"]) == (2, 2, MIN_WEIGHT)
    assert event["slowdown"] > 6
    desk.pause()
    assert desk.told(Prepare)[-1].speeds == (1.0, 1.0, MIN_WEIGHT)
    slow_for(desk, 3 * STREAK)
    assert len(desk.events("rank_slow")) == 1  # as slow as before is nothing new


def test_one_fast_step_in_between_does_not_count_as_slow_for_long() -> None:
    desk = running()
    slow_for(desk, 4, {2: 0.03})
    slow_for(desk, 4, {})
    slow_for(desk, 6, {2: 0.03})
    assert not desk.events("rank_slow")


def test_a_node_that_is_fast_again_gets_its_share_back() -> None:
    desk = slowed()
    sizes = share(desk.state.config.global_batch, 3, [1.0, 1.0, MIN_WEIGHT])
    fast = {rank: 0.001 * size for rank, size in enumerate(sizes)}  # alike per sample
    slow_for(desk, 4 * STREAK, fast)
    assert [event["weight"] for event in desk.events("rank_slow")] == [MIN_WEIGHT, 1.0]
    desk.pause()
    assert desk.told(Prepare)[-1].speeds == ()


def test_a_slow_node_keeps_its_small_share_when_another_one_turns_slow() -> None:
    desk = running(nodes=5)
    slow_for(desk, STREAK, {2: 0.08})
    desk.pause()
    slow_for(desk, STREAK, {1: 0.08, 2: 0.02})
    assert [event["node"] for event in desk.events("rank_slow")] == [2, 1]
    desk.pause()
    assert desk.told(Prepare)[-1].speeds == (1.0, MIN_WEIGHT, MIN_WEIGHT, 1.0, 1.0)


def test_of_two_nodes_nobody_is_called_slow() -> None:
    """Nobody can say which one is the odd one."""
    desk = running(nodes=2)
    slow_for(desk, 2 * STREAK, {1: 0.08})
    assert not desk.events("rank_slow") and not desk.told(Pause)


def test_less_than_twice_as_slow_is_not_slow() -> None:
    desk = running()
    slow_for(desk, 3 * STREAK, {2: 0.016})
    assert not desk.events("rank_slow")


def test_the_samples_of_a_stream_follow_its_shards_whatever_the_speeds() -> None:
    desk = running()
    desk.state = replace(desk.state, standing=replace(desk.state.standing, num_samples=-1))
    slow_for(desk, 2 * STREAK)
    assert not desk.events("rank_slow")

"""What is refused, or warned of, before anything starts."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazarus.config.preflight import BUILTIN_CHECKS, warnings_of
from lazarus.config.timeouts import derive_timeouts
from lazarus.config.train_config import TrainConfig
from lazarus.control.plans.verdict import slots_for
from lazarus.errors import ConfigError


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        TrainConfig.load(overrides=overrides, checks=BUILTIN_CHECKS)
    return str(caught.value)


def test_slots_for_fewer_experts_than_there_are_name_the_numbers_and_the_way_out() -> None:
    said = refusal("cluster.nodes=3", "placement.slots_per_node=1")
    assert "8 experts do not fit: 3 nodes x 1 slots = 3 < 8 per layer" in said
    assert "Use >= 8 nodes, or placement.slots_per_node >= 3" in said
    assert said.startswith("--set placement.slots_per_node=1: ")


def test_other_impossible_input_is_refused_in_one_go(tmp_path: Path) -> None:
    said = refusal(
        f"data.path={tmp_path}/nothing.txt",
        "faults.specs=['kill:4@20', 'kill:1@5000']",
        "checkpoint.k_snapshot=9",
        "data.seq_len=4096",
        "model.vocab=100",
        "security.secret_file=/nope/secret",
    )
    for part in (
        'nothing.txt" does not exist',
        "there is no node 4",
        "step 5000 never comes",
        "checkpoint.k_snapshot=9 is more than model.experts=8",
        "data.seq_len=4096 is more than model.seq_len=128",
        "model.vocab=100",
        "security.secret_file",
    ):
        assert part in said
    assert len(said.splitlines()) == 7


@given(
    experts=st.integers(1, 64),
    nodes=st.integers(1, 20),
    floor=st.integers(1, 4),
    spare=st.integers(0, 4),
    ranks=st.integers(1, 4),
)
def test_auto_slots_keep_the_floor_after_the_spare_losses_and_are_the_fewest(
    experts: int, nodes: int, floor: int, spare: int, ranks: int
) -> None:
    slots = slots_for(
        num_nodes=nodes,
        num_experts=experts,
        configured=None,
        started_nodes=nodes,
        min_replicas=floor,
        spare_losses=spare,
        ranks_per_node=ranks,
    )
    left = max(1, nodes - spare)
    needed = experts * min(floor, left)
    assert slots % ranks == 0 and slots * left >= needed
    assert (slots - ranks) * left < needed


def test_slots_must_divide_among_the_ranks_of_a_node() -> None:
    said = refusal("placement.slots_per_node=5", "cluster.ranks_per_node=2")
    assert "placement.slots_per_node=5 does not divide among 2 ranks of a node" in said


def test_warnings_say_what_the_floor_and_the_batch_really_give() -> None:
    config = TrainConfig.load(overrides=["cluster.nodes=16", "train.global_batch=12"])
    floor, batch = warnings_of(config, num_experts=64, slots_per_node=8)
    assert "holds for 0 further losses" in floor and "slots_per_node=9 keeps it for 1 loss" in floor
    assert "leaves 4 of 16 ranks without work" in batch and "use >= 16 (>= 320" in batch
    assert warnings_of(TrainConfig.load(), num_experts=8, slots_per_node=8) == []
    (lower,) = warnings_of(TrainConfig.load(), num_experts=8, slots_per_node=3)
    assert "the floor is 1" in lower
    two = TrainConfig.load(overrides=["cluster.ranks_per_node=2", "train.global_batch=5"])
    assert (
        "leaves 3 of 8 ranks without work" in warnings_of(two, num_experts=8, slots_per_node=8)[0]
    )


@given(stall=st.floats(0.5, 1e4))
def test_all_time_outs_follow_from_the_tolerated_stall(stall: float) -> None:
    derived = derive_timeouts(stall)
    assert 2 * derived.heartbeat_interval_s <= derived.heartbeat_timeout_s <= stall
    assert derived.no_progress_s <= stall < derived.collective_s
    assert derived.report_s <= derived.group_build_s < derived.collective_s

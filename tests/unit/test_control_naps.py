"""A controller that could not run for a while blames nobody for its own silence."""

from __future__ import annotations

from random import Random

import pytest
from control_play import config_of
from control_world import World

from lazarus.control import machine
from lazarus.control.cluster.state import Phase
from lazarus.control.ports import Publish, Tick


@pytest.fixture(params=[Phase.RUNNING, Phase.FENCING, Phase.ALIGNING, Phase.PREPARING])
def world(request: pytest.FixtureRequest) -> World:
    """A run in that phase."""
    world = World(Random(1), config_of(nodes=3, steps=50))
    for _ in range(20_000):
        world.turn()
        if world.state.phase is request.param:
            return world
    raise AssertionError("the phase was never reached")


def lost(world: World, tick: Tick) -> list[object]:
    _, commands = machine.decide(world.state, tick)
    return [c.fields["node"] for c in commands if isinstance(c, Publish) and c.event == "node_lost"]


def test_only_time_in_which_it_could_hear_counts(world: World) -> None:
    later = world.now + 100.0
    assert lost(world, Tick(at_s=later)), "silence is a loss"
    assert not lost(world, Tick(at_s=later, slept_s=100.0))

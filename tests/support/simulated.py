"""Simulations for tests: every policy under every seed."""

from __future__ import annotations

from collections.abc import Sequence

from lazarus.simulate.rows import Row, Setting
from lazarus.simulate.systems.policies import policy_named, run_one


def simulate(
    setting: Setting, *, policies: Sequence[str], seeds: Sequence[int] = (0,)
) -> list[Row]:
    """One row per policy and seed, policies in the outer loop."""
    chosen = [policy_named(name, setting) for name in policies]
    return [run_one(setting, policy, seed=seed) for policy in chosen for seed in seeds]

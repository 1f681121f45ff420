"""The policies that are compared, by name; strangers' ones by dotted path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lazarus.checkpoint.restoring.policy import RecoveryPolicy
from lazarus.control.plans.verdict import slots_for
from lazarus.errors import ConfigError
from lazarus.policy.checked import CheckedRecovery
from lazarus.policy.named import PLACEMENTS, RECOVERIES, imported_policy, offered
from lazarus.simulate.fleet.fleet import VirtualRun
from lazarus.simulate.rows import FleetPolicy, Row, Setting
from lazarus.simulate.systems.peers import PeerPolicy, PeerRun
from placement import InfeasiblePlacementError, PlacementPolicy, PlacementRequest, Plan, replan
from placement.assignment.baselines import baseline
from placement.testing import assert_valid

Policy = FleetPolicy | PeerPolicy

PAPER_COSTS = {"detect_s": 15.0, "release_s": 0.5, "groups_s": 10.0, "transfer_fixed_s": 2.0}


@dataclass(frozen=True)
class Baseline:
    """A placement that plans from scratch at every change, such as ``spread``."""

    name: str

    def __call__(
        self, request: PlacementRequest, *, previous: Plan | None, lost: frozenset[int]
    ) -> Plan:
        """See ``PlacementPolicy``."""
        del previous, lost
        return baseline(self.name, request)


@dataclass(frozen=True)
class WithoutLoads:
    """The production policy, blind to loads: every expert gets the same number of replicas."""

    def __call__(
        self, request: PlacementRequest, *, previous: Plan | None, lost: frozenset[int]
    ) -> Plan:
        """See ``PlacementPolicy``."""
        blind = replace(request, load=np.ones_like(request.load))
        return replan(blind, previous=previous, lost=lost)


@dataclass(frozen=True)
class Stranger:
    """Somebody's policy; what it answers must hold, or the row would be another policy's."""

    path: str
    policy: PlacementPolicy

    def __call__(
        self, request: PlacementRequest, *, previous: Plan | None, lost: frozenset[int]
    ) -> Plan:
        """A plan that answers the request.

        Raises:
            InfeasiblePlacementError: The policy says that there is none.
            ConfigError: It raised anything else, or its answer cannot be used.
        """
        try:
            plan = self.policy(request, previous=previous, lost=lost)
            if not isinstance(plan, Plan):
                raise TypeError(f"it returned {type(plan).__name__}, not a placement.Plan")
            assert_valid(plan, request)
        except InfeasiblePlacementError:
            raise
        except Exception as problem:  # a stranger's code may raise anything
            raise ConfigError(
                f"policy {self.path} for {request.num_nodes} nodes without {sorted(lost)}: "
                f"{type(problem).__name__}: {problem}; a live run would take the library's plan "
                f"instead (event plan_fallback)"
            ) from problem
        return plan


def named_policies(setting: Setting) -> dict[str, Policy]:
    """Every policy that has a name; some depend on the setting's sizes."""
    experts, nodes = setting.shape.experts, max(1, setting.num_nodes)
    bare = max(-(-experts // nodes), min(experts, setting.slots_per_node))
    return {
        "lazarus": FleetPolicy(name="lazarus"),
        "lazarus-auto": FleetPolicy(name="lazarus-auto", slots_per_node=_automatic(setting)),
        "lazarus-slow": FleetPolicy(name="lazarus-slow", overrides=PAPER_COSTS),
        "no-adaptive": FleetPolicy(name="no-adaptive", placement=WithoutLoads()),
        "spread": FleetPolicy(name="spread", placement=Baseline("spread")),
        "mro": FleetPolicy(name="mro", placement=Baseline("mro")),
        "eplb-like": FleetPolicy(name="eplb-like", placement=Baseline("eplb-like")),
        "pec": FleetPolicy(name="pec", min_replicas=1, slots_per_node=min(bare, _lean(setting))),
        "ds": PeerPolicy(name="ds", kind="ds"),
        "ds-ft": PeerPolicy(name="ds-ft", kind="ds-ft"),
        "peer-memory": PeerPolicy(
            name="peer-memory", kind="peer-memory", spares=max(1, nodes // 16)
        ),
    }


def _automatic(setting: Setting) -> int:
    """What a run takes with ``placement.slots_per_node = "auto"``: floors hold for two losses."""
    return slots_for(
        num_nodes=setting.num_nodes,
        num_experts=setting.shape.experts,
        configured=None,
        started_nodes=setting.num_nodes,
        min_replicas=setting.min_replicas,
        spare_losses=2,
    )


def _lean(setting: Setting) -> int:
    """Slots without replicas, with room for the loss of half the nodes."""
    return -(-setting.shape.experts // max(1, setting.num_nodes // 2))


def policy_named(text: str, setting: Setting) -> Policy:
    """A policy by name, or somebody's placement by dotted path or entry point.

    The object is the same that ``placement.policy`` takes in a live run; a class is called without
    arguments first.

    Raises:
        ConfigError: No such name, or the path leads to nothing callable.
    """
    known = named_policies(setting)
    if text in known:
        return known[text]
    others = offered(PLACEMENTS)
    if ":" not in text and text not in others:
        names = ", ".join((*known, *others))
        raise ConfigError(f"unknown policy {text!r}; known: {names}, or module:Name")
    return FleetPolicy(name=text, placement=load_placement(text))


def load_placement(path: str) -> PlacementPolicy:
    """The placement policy at a dotted path or behind an entry point.

    Raises:
        ConfigError: It cannot be imported, or not be called as a ``PlacementPolicy``.
    """
    policy = imported_policy(path, key="--policies", group=PLACEMENTS, like=PlacementPolicy)
    return Stranger(path=path, policy=policy)


def with_recovery(policy: Policy, path: str | None) -> Policy:
    """The same with somebody's recovery policy; models of other systems know none.

    The object that the path names is the same that ``recovery.policy`` takes in a live run.

    Raises:
        ConfigError: It cannot be imported, or not be called as a ``RecoveryPolicy``.
    """
    if path is None or not isinstance(policy, FleetPolicy):
        return policy
    asked = imported_policy(path, key="--recovery", group=RECOVERIES, like=RecoveryPolicy)
    checked = CheckedRecovery(asked, limit_s=None, on_lost_expert="partial")
    return replace(policy, name=f"{policy.name}+{path}", recovery=checked)


def run_one(
    setting: Setting, policy: Policy, *, seed: int,
    on_clock: Callable[[float], None] | None = None,
) -> Row:  # fmt: skip
    """One policy under one seed; ``on_clock`` hears the virtual seconds of a long run."""
    if isinstance(policy, PeerPolicy):
        return PeerRun(setting, policy=policy, seed=seed).run()
    return VirtualRun(setting, policy=policy, seed=seed, on_clock=on_clock).run()


def simulate(
    setting: Setting, *, policies: Sequence[str | Policy], seeds: Sequence[int] = (0,)
) -> list[Row]:
    """Every policy under every seed; rows in that order.

    Raises:
        ConfigError: An unknown policy.
    """
    chosen = [policy_named(p, setting) if isinstance(p, str) else p for p in policies]
    return [run_one(setting, policy, seed=seed) for policy in chosen for seed in seeds]

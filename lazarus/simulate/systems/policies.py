"""The compared policies by name, custom policies by path, and ``simulate``."""

from __future__ import annotations

from collections.abc import Callable
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
    """A baseline placement (such as ``spread``) that plans from scratch at every change."""

    name: str

    def __call__(
        self, request: PlacementRequest, *, previous: Plan | None, lost: frozenset[int]
    ) -> Plan:
        """See ``PlacementPolicy``."""
        del previous, lost
        return baseline(self.name, request)


@dataclass(frozen=True)
class WithoutLoads:
    """The library's policy without load information: all experts get equally many replicas."""

    def __call__(
        self, request: PlacementRequest, *, previous: Plan | None, lost: frozenset[int]
    ) -> Plan:
        """See ``PlacementPolicy``."""
        blind = replace(request, load=np.ones_like(request.load))
        return replan(blind, previous=previous, lost=lost)


@dataclass(frozen=True)
class Stranger:
    """A custom placement policy whose plans are checked.

    An invalid plan is an error here. A live run would fall back to the library's plan, so the
    result would not be that of the custom policy.
    """

    path: str
    policy: PlacementPolicy

    def __call__(
        self, request: PlacementRequest, *, previous: Plan | None, lost: frozenset[int]
    ) -> Plan:
        """Return the policy's plan, after checking it.

        Raises:
            InfeasiblePlacementError: The policy found no plan.
            ConfigError: The policy raised another error, or its plan is invalid.
        """
        try:
            plan = self.policy(request, previous=previous, lost=lost)
            if not isinstance(plan, Plan):
                raise TypeError(f"it returned {type(plan).__name__}, not a placement.Plan")
            assert_valid(plan, request)
        except InfeasiblePlacementError:
            raise
        except Exception as problem:  # custom code may raise anything
            raise ConfigError(
                f"policy {self.path} for {request.num_nodes} nodes without {sorted(lost)}: "
                f"{type(problem).__name__}: {problem}; a live run would take the library's plan "
                f"instead (event plan_fallback)"
            ) from problem
        return plan


def named_policies(setting: Setting) -> dict[str, Policy]:
    """Return all named policies; some depend on the sizes of the setting."""
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
    """Slots chosen by ``placement.slots_per_node = "auto"``: floors still fit after two losses."""
    return slots_for(
        num_nodes=setting.num_nodes,
        num_experts=setting.shape.experts,
        configured=None,
        started_nodes=setting.num_nodes,
        min_replicas=setting.min_replicas,
        spare_losses=2,
    )


def _lean(setting: Setting) -> int:
    """Slots that hold every expert once on half of the nodes."""
    return -(-setting.shape.experts // max(1, setting.num_nodes // 2))


def policy_named(text: str, setting: Setting) -> Policy:
    """Return a policy by name, or a custom placement by ``module:Name`` or entry point.

    Custom placements are given as in ``placement.policy`` of a live run. A class is instantiated
    without arguments.

    Raises:
        ConfigError: There is no policy of that name, or the object is not callable.
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
    """Import a placement policy by path or entry point.

    Raises:
        ConfigError: The policy cannot be imported or called as a ``PlacementPolicy``.
    """
    policy = imported_policy(path, key="--policies", group=PLACEMENTS, like=PlacementPolicy)
    return Stranger(path=path, policy=policy)


def with_recovery(policy: Policy, path: str | None) -> Policy:
    """Return ``policy`` with a custom recovery policy; models of other systems are unchanged.

    The path is given as in ``recovery.policy`` of a live run; None changes nothing.

    Raises:
        ConfigError: The recovery policy cannot be imported or called as a ``RecoveryPolicy``.
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
    """Simulate one policy under one seed.

    ``on_clock`` is called with the virtual time in seconds (not for models of other systems).
    """
    if isinstance(policy, PeerPolicy):
        return PeerRun(setting, policy=policy, seed=seed).run()
    return VirtualRun(setting, policy=policy, seed=seed, on_clock=on_clock).run()

"""The assumptions of simulated results, as plain values to print and store beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from typing import Any

from lazarus.simulate.fleet.training import schedule_of
from lazarus.simulate.inputs.costs import Costs
from lazarus.simulate.inputs.faults import FaultSource, FromTrace, Scripted
from lazarus.simulate.rows import Setting
from lazarus.simulate.systems.peers import MEMORY_OVERHEAD, REDONE_STEPS, PeerPolicy
from lazarus.simulate.systems.policies import named_policies

_PLAIN = (
    "num_nodes", "slots_per_node", "min_replicas", "horizon_s", "steps", "tokens_per_step",
    "placed_layers", "loads_step", "group", "full_checkpoint_every", "ft_checkpoint_every",
    "checkpoint_every", "join_debounce_s", "peer_join_wait_s", "peer_batch_per_node",
)  # fmt: skip


def assumptions(settings: Sequence[Setting], *, policies: Sequence[str]) -> list[dict[str, Any]]:
    """Return each cost model that ``settings`` use, once, with the settings that use it."""
    profiles: dict[str, Costs] = {s.costs.name: s.costs for s in settings}
    return [
        {
            "profile": name,
            "source": costs.source,
            "figures": costs.assumptions(),
            "settings": [of_setting(s, policies) for s in settings if s.costs.name == name],
        }
        for name, costs in profiles.items()
    ]


def of_setting(setting: Setting, policies: Sequence[str]) -> dict[str, Any]:
    """Return the assumptions of one setting: fleet, faults, load, checkpoints, waits, policies."""
    schedule = schedule_of(setting, setting.placed_layers or setting.shape.moe_layers)
    _, layers, experts = setting.load.counts.shape
    load = {
        "name": setting.load.name,
        "steps": len(setting.load.steps),
        "layers": layers,
        "experts": experts,
    }
    return {
        "scenario": setting.name,
        "shape": setting.shape.to_dict(),
        **{name: getattr(setting, name) for name in _PLAIN},
        "snapshot_every": schedule.snapshot_every,
        "k_snapshot": schedule.k_snapshot,
        "k_persist": schedule.k_persist,
        "load": load,
        "faults": _faults(setting.faults),
        "policies": _policies(setting, policies),
    }


def _faults(source: FaultSource) -> dict[str, Any]:
    """Parameters of a fault source; a trace is given by name and number of events."""
    kind = {"kind": type(source).__name__.lower()}
    if isinstance(source, FromTrace):
        return {**kind, "trace": source.trace.name, "events": len(source.trace.events)}
    if isinstance(source, Scripted):
        return {**kind, "events": len(source.script)}
    return {**kind, **{name: _finite(value) for name, value in asdict(source).items()}}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not isfinite(value) else value


def _policies(setting: Setting, names: Sequence[str]) -> dict[str, Any]:
    """For each policy: what it changes in the setting, or the parameters of its model."""
    known = named_policies(setting)
    found: dict[str, Any] = {}
    for name in names:
        policy = known.get(name)
        if isinstance(policy, PeerPolicy):
            found[name] = {"kind": policy.kind, "spares": policy.spares}
            if policy.kind == "peer-memory":
                more = {"redone_steps": REDONE_STEPS, "memory_overhead": MEMORY_OVERHEAD}
                found[name] |= more
        elif policy is not None:
            found[name] = {
                "slots_per_node": policy.slots_per_node or setting.slots_per_node,
                "min_replicas": policy.min_replicas or setting.min_replicas,
                "costs": dict(policy.overrides or {}),
            }
    return found


def setting_line(content: Mapping[str, Any]) -> str:
    """Return the assumptions of one setting as a line of text."""
    return (
        f"{content['scenario']}: load {content['load']['name'] or 'given'}, group of "
        f"{content['group']}, checkpoints every {content['checkpoint_every']} steps (ds "
        f"{content['full_checkpoint_every']}, ds-ft {content['ft_checkpoint_every']}), newcomers "
        f"wait {content['join_debounce_s']:g} s (peers {content['peer_join_wait_s']:g} s)"
    )

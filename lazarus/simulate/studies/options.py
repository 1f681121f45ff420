"""Options of ``lazarus simulate``: default values, and checks that options fit together."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from lazarus.errors import ConfigError
from lazarus.record.loads import is_load_file
from lazarus.simulate.studies.scenarios import scenario_named
from lazarus.simulate.studies.tables import TABLE_FILES, TABLES

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "shape": "gpt-l", "profile": "h200-8x400g", "nodes": (16,), "min_replicas": (2,),
        "load": "zipf:0.5", "time_scale": 1.0, "replace_after": "10min", "zones": 0,
        "hours": 24.0, "tokens_per_node": 65536,
    }
)  # fmt: skip
_OF_A_FLEET = (
    "shape", "profile", "nodes", "slots", "min_replicas", "memory", "mtbf", "period", "time_scale",
    "replace_after", "zones", "zone_mtbf", "hours", "tokens_per_node", "group", "layers",
)  # fmt: skip
_OF_RUNS = ("policies", "recovery", "seeds", "plot", "price")


def refuse_ignored(given: Mapping[str, Any]) -> None:
    """Raise an error for options that would have no effect.

    Args:
        given: Every option by name; None for options that the user did not give.

    Raises:
        ConfigError: An option has no effect; the message names the first one.
    """
    scenario = given["scenario"]
    if scenario is None:
        _refuse_lone_zones(given)
        return
    table = scenario in TABLES
    reads = TABLE_FILES[scenario] if table else scenario_named(scenario).reads
    unused = [*_OF_A_FLEET, *(_OF_RUNS if table else ())]
    unused += [name for name in ("load", "trace") if name not in reads]
    for name in unused:
        if given[name] is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')} means nothing to {scenario}: it brings its own fleet "
                f"and experiment; leave the option or the scenario out"
            )
    load = given["load"]
    if load is not None and not is_load_file(load):
        raise ConfigError(
            f"--load {load} means nothing to {scenario}: it takes an .npz or .npy file only"
        )


def _refuse_lone_zones(given: Mapping[str, Any]) -> None:
    if given["zone_mtbf"] is not None and not given["zones"]:
        raise ConfigError(f"--zone-mtbf {given['zone_mtbf']} does nothing without --zones")
    if given["zones"] and given["zone_mtbf"] is None:
        raise ConfigError(f"--zones {given['zones']} does nothing without --zone-mtbf")
    if given["zones"] and (given["period"] or given["trace"]):
        other = "--period" if given["period"] else "--trace"
        raise ConfigError(f"--zones {given['zones']} does nothing with {other}")

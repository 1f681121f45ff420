"""Calibration: a cost model from records of real runs, and a real run as a setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from lazarus.errors import ConfigError
from lazarus.record.events import Event, moment, of_kind
from lazarus.record.loads import uniform_load
from lazarus.record.metrics import committed_steps, recoveries
from lazarus.simulate.inputs.costs import Costs
from lazarus.simulate.inputs.faults import Scripted, names
from lazarus.simulate.inputs.shapes import Shape
from lazarus.simulate.inputs.traces import FleetEvent
from lazarus.simulate.rows import Setting

Point = tuple[int, float]  # number of nodes, seconds

_WARM_STEPS = 3  # first steps of a run, which allocate and compile and are left out


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Results of a real run, to compare with the simulator's prediction."""

    goodput_tokens_per_s: float
    recovery_median_s: float
    recoveries: int
    wall_s: float
    tokens: int


def calibrated(records: Sequence[Sequence[Event]]) -> Costs:
    """Fit a cost model to the records of real runs.

    Step times are the mean gaps between commits, by number of nodes. The phases of a
    reconfiguration are fitted by lines over the number of nodes, or by medians where the records
    show a single size. Bandwidths are set so high that they do not matter: the measured time of
    transfers is in ``transfer_fixed_s`` instead.

    Args:
        records: Events of each run.

    Raises:
        ConfigError: No record has enough committed steps.
    """
    found: dict[str, list[Point]] = {}
    gaps: dict[int, list[float]] = {}
    for events in records:
        own: dict[int, list[float]] = {}
        for nodes, seconds in _gaps(events):
            own.setdefault(nodes, []).append(seconds)
            gaps.setdefault(nodes, []).append(seconds)
        for change in of_kind(events, "reconfigured"):
            nodes = int(change["num_nodes"])
            usual_s = fmean(own[nodes]) if nodes in own else None
            for part, seconds in _parts(change, usual_s=usual_s).items():
                found.setdefault(part, []).append((nodes, seconds))
    if not gaps:
        raise ConfigError("no committed steps in the records; nothing to calibrate from")
    return Costs(
        name="measured",
        source="measured",
        net_bytes_per_s=1e15,
        storage_bytes_per_s=1e15,
        plan_per_cell_s=0.0,
        start_s=0.0,
        snapshot_overhead=0.0,
        step_table_s=tuple(sorted((nodes, fmean(some)) for nodes, some in gaps.items())),
    ).changed(_figures(found))


def _parts(change: Event, *, usual_s: float | None) -> dict[str, float]:
    """Seconds of one reconfiguration by part; ``usual_s`` is the usual step time at that size."""
    phases = {name: float(seconds) for name, seconds in change["phases"].items()}
    parts = {
        name: phases[name] for name in ("detect", "release", "align", "plan") if name in phases
    }
    if "groups" in phases:
        made = "regrouping" if change["bytes_moved"] else "groups"
        parts[made] = phases["groups"] + phases.get("transfer", 0.0)
    if usual_s is not None and "redo" in phases:
        parts["warmup"] = phases["redo"] - usual_s
    return parts


def _figures(found: Mapping[str, Sequence[Point]]) -> dict[str, float]:
    """Fit figures of the cost model to the measured parts of reconfigurations."""
    figures = {}
    for part in ("detect", "plan"):
        if part in found:
            figures[f"{part}_s"] = median(seconds for _, seconds in found[part])
    for part in ("release", "align", "groups", "warmup"):
        points = found.get(part) or (found.get("regrouping", ()) if part == "groups" else ())
        if points:
            figures[f"{part}_s"], figures[f"{part}_per_node_s"] = line(points)
    if "groups_s" in figures:
        moved = [
            seconds - figures["groups_s"] - figures["groups_per_node_s"] * nodes
            for nodes, seconds in found.get("regrouping", ())
        ]
        figures["transfer_fixed_s"] = max(0.0, median(moved)) if moved else 0.0
    return figures


def line(points: Sequence[Point]) -> tuple[float, float]:
    """Fit seconds = fixed + slope * nodes, both >= 0, to one or more points; robust to outliers.

    Source: the Theil-Sen estimator, the median slope over all pairs of points.
    """
    slopes = [(t - s) / (m - n) for n, s in points for m, t in points if m > n]
    slope = max(0.0, median(slopes)) if slopes else 0.0
    fixed = median(seconds - slope * nodes for nodes, seconds in points)
    if fixed < 0 < slope:
        return 0.0, max(0.0, median(seconds / nodes for nodes, seconds in points))
    return max(0.0, fixed), slope


def _gaps(events: Sequence[Event]) -> list[tuple[int, float]]:
    """(nodes, seconds) for every two consecutive commits of one generation."""
    commits = sorted(committed_steps(events).values(), key=lambda e: int(e["step"]))
    found = []
    for before, after in zip(commits[_WARM_STEPS:], commits[_WARM_STEPS + 1 :], strict=False):
        together = before["generation"] == after["generation"]
        if together and int(after["step"]) == int(before["step"]) + 1:
            found.append((int(after["num_nodes"]), moment(after) - moment(before)))
    return found


def measured(events: Sequence[Event]) -> Measured:
    """Compute the results of a real run: goodput from the first commit on, and recoveries."""
    commits = sorted(committed_steps(events).values(), key=moment)
    start, end = moment(commits[0]), moment(commits[-1])
    tokens = sum(int(e["tokens"]) for e in commits[1:])
    # Nodes that were lost together count as one recovery.
    known = [((r.step, r.rebuild_s), r.back_s) for r in recoveries(events) if r.back_s is not None]
    backs = [max(s for at, s in known if at == one) for one in sorted({at for at, _ in known})]
    return Measured(
        goodput_tokens_per_s=tokens / (end - start),
        recovery_median_s=median(backs) if backs else 0.0,
        recoveries=len(backs),
        wall_s=end - start,
        tokens=tokens,
    )


def as_setting(events: Sequence[Event], costs: Costs, *, name: str) -> Setting:
    """Convert a real run to a setting with the same fleet and faults.

    Time 0 is the run's first commit. A node leaves at the time of its injected fault, or else when
    its loss was noticed. A node joins when the reconfiguration that includes it began.

    Args:
        events: The run's events.
        costs: Cost model of the setting.
        name: Name of the run, for the setting and for errors.

    Raises:
        ConfigError: The record has no ``run_started`` or fewer than two committed steps.
    """
    header = next(iter(of_kind(events, "run_started")), None)
    if header is None:
        raise ConfigError(f"{name}: no run_started in the record")
    commits = sorted(committed_steps(events).values(), key=moment)
    if len(commits) < 2:
        raise ConfigError(f"{name}: fewer than two committed steps in the record")
    start = moment(commits[0])
    plans = of_kind(events, "plan_adopted")
    layers, experts = int(header.get("num_layers", 1)), int(header.get("num_experts", 1))
    shape = Shape(
        name=name, moe_layers=layers, dim=1, hidden=1, matrices=2, experts=experts, top_k=1,
        dense_params=1.0, attention_layers=1, seq_len=1,
    )  # fmt: skip
    return Setting(
        name=name,
        shape=shape,
        costs=costs,
        load=uniform_load(layers, experts),
        faults=Scripted(script=_script(events, start)),
        num_nodes=int(header["num_nodes"]),
        slots_per_node=int(plans[0]["slots_per_node"]) if plans else experts,
        min_replicas=int(plans[0].get("requested_floor", 2)) if plans else 2,
        horizon_s=moment(commits[-1]) - start,
        tokens_per_step=float(commits[0]["tokens"]),
        join_debounce_s=0.0,
    )


def _script(events: Sequence[Event], start: float) -> tuple[FleetEvent, ...]:
    """The run's losses, departures and joins. Node numbers are in join order in both worlds."""
    found = []
    injected = {e["node"]: moment(e) for e in of_kind(events, "fault_injected")}
    for lost in of_kind(events, "node_lost"):
        at_s = min(moment(lost), injected.get(lost["node"], float("inf")))
        found.append((at_s, "remove", int(lost["node"])))
    for change in of_kind(events, "reconfigured"):
        began = moment(change) - float(change["wall_s"])
        found += [(began, "add", int(node)) for node in change.get("joined", ())]
    for left in of_kind(events, "node_left"):
        found.append((moment(left), "remove", int(left["node"])))
    return tuple(
        FleetEvent(at_s=max(0.0, at_s - start), kind=kind, nodes=names(1, first=node))
        for at_s, kind, node in sorted(found)
    )

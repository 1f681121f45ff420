"""Write ``report.html`` from a run's record, expert loads and the last plan's certificate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lazarus.basics.files import replaced
from lazarus.basics.format import bytes_text, count_text, loss_text, seconds_text
from lazarus.errors import LazarusError
from lazarus.record.condensed import condensed_events
from lazarus.record.endings import with_end
from lazarus.record.events import Event, blamed_on_record, of_kind
from lazarus.record.loads import LoadTrace, counts_of_run, load_loads
from lazarus.record.metrics import Summary, lives
from lazarus.report import charts
from lazarus.report.page import Section, page
from lazarus.report.series import RunView, view_of
from placement import Certificate, certificate
from placement.foreign import certified

FILE_NAME = "report.html"
LOADS_NAME = "expert_load.npz"
_MOST_COLUMNS = 150  # points in time of the load heat maps
# A record does not list the experts of larger plans (lazarus.control.plans.planning).
_UNLISTED = "not in the record slot by slot (over 20,000 slots)"
_MOST_NODES = 64  # a certificate for this many nodes takes well under a second


def write_report(run_dir: str | Path, *, out: str | Path | None = None) -> Path:
    """Write the report of one run and return its path.

    Args:
        run_dir: The run's folder. Nothing in the folder changes if ``out`` lies elsewhere.
        out: The HTML file; ``RUN_DIR/report.html`` when None.

    Raises:
        RecordError: There is no record, or the record is damaged.
        OSError: The file cannot be written.
    """
    folder = Path(run_dir)
    events = with_end(condensed_events(folder), folder)
    with blamed_on_record(folder):
        view = view_of(events, name=folder.name)
        text = page(
            title=f"Lazarus run {folder.absolute().name}",
            subtitle=_subtitle(view) + _ending(events),
            tiles=_tiles(view.summary),
            sections=_sections(view, events, _loads(folder)),
        )
    return _written(folder / FILE_NAME if out is None else Path(out), text)


def compare_reports(run_dirs: Sequence[str | Path], *, out: str | Path) -> Path:
    """Write one report that compares several runs, and return its path.

    Args:
        run_dirs: The runs' folders.
        out: The HTML file.

    Raises:
        RecordError: A record is missing or damaged.
        OSError: The file cannot be written.
    """
    names = _names([Path(folder) for folder in run_dirs])
    views = [_view(Path(d), name=n) for d, n in zip(run_dirs, names, strict=True)]
    sections = [
        Section(title="Figures", table=_comparison(views), wide=True),
        Section(title="Loss", figure=charts.loss_chart(views), wide=True),
        Section(title="Throughput", figure=charts.throughput_chart(views)),
        Section(title="Live nodes", figure=charts.nodes_chart(views)),
        Section(
            title="Goodput",
            about="Committed tokens per wall second.",
            figure=charts.bars_chart(
                names, [v.summary.goodput_tokens_per_s for v in views], title="tokens / s"
            ),
        ),
        Section(
            title="ETTR",
            about="Productive time over wall time.",
            figure=charts.bars_chart(names, [v.summary.ettr for v in views], title="ETTR"),
        ),
    ]
    text = page(
        title=f"{len(views)} Lazarus runs", subtitle=", ".join(names), tiles=(), sections=sections
    )
    return _written(Path(out), text)


def _view(folder: Path, *, name: str) -> RunView:
    events = with_end(condensed_events(folder), folder)
    with blamed_on_record(folder):
        return view_of(events, name=name)


def _written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


def _names(folders: Sequence[Path]) -> list[str]:
    short = [folder.absolute().name for folder in folders]
    if len(set(short)) == len(short):
        return short
    return [str(folder) for folder in folders]


def _loads(folder: Path) -> LoadTrace | None:
    """Expert loads from the run's file, else from its journals; None if neither is readable."""
    for read, place in ((load_loads, folder / LOADS_NAME), (counts_of_run, folder)):
        try:
            if place.exists() and (found := read(place)) is not None:
                return found
        except (LazarusError, ValueError, OSError, KeyError):
            continue  # a report without this chart is better than none
    return None


def _subtitle(view: RunView) -> str:
    settings = view.settings
    shape = ""
    if "num_experts" in settings:
        shape = (
            f", {settings.get('num_layers', '?')} MoE layers x {settings['num_experts']} experts"
        )
    return (
        f"{view.summary.steps:,} steps in {seconds_text(view.summary.wall_s)}, "
        f"{settings.get('num_nodes', '?')} nodes at the start{shape}"
    )


def _ending(events: Sequence[Event]) -> str:
    """How the run ended the last time, as text; "not ended" if it has not."""
    ends = of_kind(lives(events)[-1], "run_finished") if events else []
    if not ends:
        return ", not ended"
    status, cause = ends[-1].get("status", "finished"), ends[-1].get("cause", "")
    why = f": {ends[-1]['error']}" if ends[-1].get("error") else ""
    return f", {status}" + (f" ({cause}){why}" if cause else "")


def _tiles(summary: Summary) -> list[tuple[str, str]]:
    backs = [r.back_s for r in summary.recoveries if r.back_s is not None]
    worst = seconds_text(max(backs)) if backs else "none"
    return [
        ("goodput, tokens/s", count_text(summary.goodput_tokens_per_s)),
        ("ETTR", f"{summary.ettr:.3f}"),
        ("PLT", f"{summary.plt * 100:.2g} %"),
        ("last loss", loss_text(summary.final_loss)),
        ("steps lost", f"{summary.steps_lost}"),
        ("nodes lost / joined", f"{summary.losses} / {summary.joins}"),
        ("slowest recovery", worst),
        ("moved", bytes_text(summary.bytes_moved)),
    ]


def _sections(view: RunView, events: Sequence[Event], loads: LoadTrace | None) -> list[Section]:
    found = [
        Section(title="Loss", about="Vertical lines: what happened to nodes.",
                figure=charts.loss_chart([view]), wide=True),
        Section(title="Throughput", about="Committed tokens per second, over ten steps.",
                figure=charts.throughput_chart([view])),
        Section(title="Live nodes", figure=charts.nodes_chart([view])),
    ]  # fmt: skip
    if (figure := charts.recovery_chart(view)) is not None:
        about = "From the fault to the next committed step, by phase; attempts add up."
        found.append(Section(title="Recoveries", about=about, figure=figure, wide=True))
    adopted = of_kind(events, "plan_adopted")
    found += _placement(view, unlisted=sum(not e.get("experts_of_rank") for e in adopted))
    found += _load_sections(loads)
    if (figure := charts.checkpoint_chart(view)) is not None:
        about = "Steps that would have to be done again if every node died."
        found.append(Section(title="Checkpoint age", about=about, figure=figure))
    found += _certificate(adopted)
    return found


def _placement(view: RunView, *, unlisted: int) -> list[Section]:
    """Charts of the first and last plan in the record, and a note on plans that are not listed."""
    missing = []
    if unlisted:
        about = f"Plans that are not drawn: {unlisted}, {_UNLISTED}."
        missing = [Section(title="Placement", about=about)]
    if not view.plans:
        return missing
    chosen = [("Placement at the start", view.plans[0])]
    if len(view.plans) > 1:
        chosen.append(("Placement at the end", view.plans[-1]))
    return [
        Section(
            title=title,
            about=f"Layers (of {plan.num_layers}) in which a node holds an expert, "
            f"from {plan.at_s:.1f} s on.",
            figure=charts.placement_chart(plan),
        )
        for title, plan in chosen
    ] + missing


def _load_sections(loads: LoadTrace | None) -> list[Section]:
    if loads is None or not len(loads.steps):
        return []
    num_layers = loads.counts.shape[1]
    layers = sorted({0, num_layers - 1})
    return [_load_section(loads, layer) for layer in layers]


def _load_section(loads: LoadTrace, layer: int) -> Section:
    bins = np.array_split(np.arange(len(loads.steps)), min(_MOST_COLUMNS, len(loads.steps)))
    sums = np.stack([loads.counts[chunk, layer].sum(0) for chunk in bins]).astype(np.float64)
    share_TE = sums / np.maximum(1.0, sums.sum(1, keepdims=True))
    steps = [int(loads.steps[chunk[-1]]) for chunk in bins]
    return Section(
        title=f"Expert load, MoE layer {layer}",
        about="Each expert's part of the layer's routed copies, committed steps only.",
        figure=charts.load_chart(steps, share_TE.tolist()),
    )


def _certificate(adopted: Sequence[Event]) -> list[Section]:
    """The certificate of the last plan, or a note why there is none."""
    if not adopted:
        return []
    last, why = adopted[-1], ""
    if not last.get("experts_of_rank"):
        why = f"the last plan is {_UNLISTED}"
    elif len(last["nodes"]) > _MOST_NODES:
        why = f"{len(last['nodes'])} nodes; above {_MOST_NODES} it takes too long for a page"
    if why:
        about = f"Not made: {why}. lazarus plan certifies larger ones."
        return [Section(title="Certificate", about=about)]
    found, nodes = _certified(last)
    pairs = [(k, p) for k, p in found.survival.items() if k]
    experts = ", ".join(f"{layer}/{e}" for layer, e in found.fatal_experts[:6])
    fatal = ", ".join(str(nodes[n]) for n in found.fatal_nodes)
    table = [
        ("figure", "value"),
        ("smallest fatal set of nodes", fatal),
        ("it would lose (layer/expert)", experts),
        ("distinct nodes of every expert", f">= {found.min_distinct_nodes}"),
        ("method", found.method),
    ]
    about = "Probability that every expert of the last plan survives k nodes lost at once."
    return [
        Section(title="Certificate", about=about, figure=charts.survival_chart(pairs), table=table)
    ]


def _certified(event: Event) -> tuple[Certificate, list[int]]:
    nodes = [int(n) for n in event["nodes"]]
    ranks: Any = event["experts_of_rank"]
    per_node = max(1, len(ranks[0]) // len(nodes))
    rows = [
        [
            sorted({e for held in layer[n * per_node : (n + 1) * per_node] for e in held})
            for n in range(len(nodes))
        ]
        for layer in ranks
    ]
    plan, _ = certified({"experts_of_node": rows})
    return certificate(plan), nodes


def _comparison(views: Sequence[RunView]) -> list[list[str]]:
    rows = [["run", "steps", "wall", "goodput tok/s", "ETTR", "PLT", "steps lost", "losses",
             "joins", "last loss"]]  # fmt: skip
    for view in views:
        s = view.summary
        rows.append(
            [view.name, f"{s.steps:,}", seconds_text(s.wall_s), f"{s.goodput_tokens_per_s:,.0f}",
             f"{s.ettr:.3f}", f"{s.plt * 100:.2g} %", str(s.steps_lost), str(s.losses),
             str(s.joins), loss_text(s.final_loss)]
        )  # fmt: skip
    return rows

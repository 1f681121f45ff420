"""An HTML page with charts of simulated runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lazarus.basics.files import replaced
from lazarus.report import charts
from lazarus.report.page import Section, page
from lazarus.simulate.rows import Row


def write_plot(rows: Sequence[Row], *, out: str | Path) -> Path:
    """Write charts of goodput, ETTR and stalls by scenario and policy (lowest seed only).

    Args:
        rows: Results of simulated runs, at least one.
        out: The HTML file.

    Returns:
        The path of the file.
    """
    first = [row for row in rows if row.seed == min(r.seed for r in rows)]
    sections = [
        Section(title="Goodput", about="Committed tokens per second.",
                figure=_grouped(first, "goodput_tokens_per_s", "tokens / s"), wide=True),
        Section(title="ETTR", figure=_grouped(first, "ettr", "ETTR"), wide=True),
        Section(title="Stalls", about="Seconds in which no step that counts was computed.",
                figure=_stalls(first), wide=True),
    ]  # fmt: skip
    text = page(title="Simulated fleets", subtitle="", tiles=(), sections=sections)
    path = Path(out)
    with replaced(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


def _grouped(rows: Sequence[Row], key: str, title: str) -> charts.Figure:
    names = list(dict.fromkeys(row.policy for row in rows))
    traces: list[dict[str, Any]] = [
        {
            "type": "bar",
            "name": name,
            "x": [row.scenario for row in rows if row.policy == name],
            "y": [getattr(row, key) for row in rows if row.policy == name],
            "marker": {"color": charts.COLOURS[i % len(charts.COLOURS)]},
        }
        for i, name in enumerate(names)
    ]
    return {"data": traces, "layout": charts.layout(y=title, barmode="group")}


def _stalls(rows: Sequence[Row]) -> charts.Figure:
    labels = [f"{row.scenario} / {row.policy}" for row in rows]
    names = list(dict.fromkeys(name for row in rows for name in row.stall_s))
    traces: list[dict[str, Any]] = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "y": labels,
            "x": [row.stall_s.get(name, 0.0) for row in rows],
            "marker": {"color": charts.COLOURS[i % len(charts.COLOURS)]},
        }
        for i, name in enumerate(names)
    ]
    drawn = charts.layout(x="seconds", barmode="stack", height=140 + 22 * len(labels))
    drawn["yaxis"]["autorange"] = "reversed"
    return {"data": traces, "layout": drawn}

"""Charts as plain Plotly figures: dictionaries with ``data`` and ``layout``. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lazarus.report.series import Holding, Mark, RunView

Figure = dict[str, Any]

# Source: the colour-blind safe palette of Okabe and Ito.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a6a00", "#000000")
_MARK_COLOUR = {
    "node_lost": "#d62728",
    "node_left": "#e69f00",
    "node_joined": "#2ca02c",
    "expert_restored": "#9467bd",
    "quorum_lost": "#000000",
}
_MARK_WORD = {
    "node_lost": "node lost",
    "node_left": "node left",
    "node_joined": "node joined",
    "expert_restored": "expert restored",
    "quorum_lost": "below quorum",
}
_MOST_LINES = 60


def layout(*, x: str = "", y: str = "", height: int = 320, **more: Any) -> dict[str, Any]:
    """Return the layout that all charts share; the legend is below to fit narrow screens."""
    axis = {"gridcolor": "#e6e6e6", "zerolinecolor": "#cccccc", "automargin": True}
    return {
        "height": height,
        "margin": {"l": 50, "r": 12, "t": 12, "b": 44},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#222222"},
        "legend": {"orientation": "h", "y": -0.22, "x": 0},
        "hovermode": "closest",
        "xaxis": {**axis, "title": {"text": x, "standoff": 8}},
        "yaxis": {**axis, "title": {"text": y, "standoff": 6}},
        **more,
    }


def line(name: str, x: Sequence[Any], y: Sequence[Any], *, colour: str, **more: Any) -> Figure:
    """Return one line trace."""
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": list(x),
        "y": list(y),
        "line": {"color": colour, "width": 2, **more.pop("line", {})},
        **more,
    }


def loss_chart(views: Sequence[RunView]) -> Figure:
    """Draw the loss over time, with faults marked."""
    traces = [
        line(v.name, v.time_s, v.loss, colour=_colour(i), customdata=list(v.step),
             hovertemplate="step %{customdata}<br>loss %{y:.4f}<extra></extra>")
        for i, v in enumerate(views)
    ]  # fmt: skip
    return _marked(traces, views, layout(x="seconds", y="loss"))


def throughput_chart(views: Sequence[RunView]) -> Figure:
    """Draw committed tokens per second, averaged over the last steps."""
    traces = [
        line(v.name, v.time_s, v.tokens_per_s, colour=_colour(i)) for i, v in enumerate(views)
    ]
    drawn = layout(x="seconds", y="tokens / s")
    drawn["yaxis"]["rangemode"] = "tozero"
    return _marked(traces, views, drawn)


def nodes_chart(views: Sequence[RunView]) -> Figure:
    """Draw the number of live nodes over time."""
    traces = [
        line(v.name, [t for t, _ in v.nodes], [n for _, n in v.nodes], colour=_colour(i),
             line={"shape": "hv"})
        for i, v in enumerate(views)
    ]  # fmt: skip
    drawn = layout(x="seconds", y="live nodes", height=240)
    drawn["yaxis"] |= {"rangemode": "tozero", "tickformat": "d"}
    return _marked(traces, views, drawn)


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _marked(traces: list[Figure], views: Sequence[RunView], drawn: dict[str, Any]) -> Figure:
    """Add vertical lines at faults and a legend of their kinds; for a single run only."""
    if len(views) != 1:
        return {"data": traces, "layout": {**drawn, "showlegend": True}}
    marks = views[0].marks
    drawn = {**drawn, "shapes": [_rule(mark) for mark in marks[:_MOST_LINES]], "showlegend": True}
    return {"data": traces + _legend(marks, traces), "layout": drawn}


def _rule(mark: Mark) -> dict[str, Any]:
    return {
        "type": "line", "xref": "x", "yref": "paper", "x0": mark.at_s, "x1": mark.at_s,
        "y0": 0, "y1": 1, "layer": "below",
        "line": {"color": _MARK_COLOUR[mark.kind], "width": 1.5, "dash": "dot"},
    }  # fmt: skip


def _legend(marks: Sequence[Mark], traces: list[Figure]) -> list[Figure]:
    low = min((y for t in traces for y in t["y"] if y is not None), default=0)
    found = []
    for kind in dict.fromkeys(mark.kind for mark in marks):
        here = [mark for mark in marks if mark.kind == kind]
        found.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": _MARK_WORD[kind],
                "x": [m.at_s for m in here],
                "y": [low] * len(here),
                "text": [m.text for m in here],
                "hovertemplate": "%{text}<extra></extra>",
                "marker": {"color": _MARK_COLOUR[kind], "size": 9, "symbol": "triangle-up"},
            }
        )
    return found


def recovery_chart(view: RunView) -> Figure | None:
    """Draw every reconfiguration as a bar, divided by phase; None without reconfigurations."""
    if not view.phases:
        return None
    labels = [p.label for p in view.phases]
    names = list(dict.fromkeys(name for p in view.phases for name in p.phases))
    traces = [
        {
            "type": "bar", "orientation": "h", "name": name, "y": labels,
            "x": [round(p.phases.get(name, 0.0), 4) for p in view.phases],
            "marker": {"color": _colour(i)},
            "hovertemplate": f"{name} %{{x:.3f}} s<extra></extra>",
        }
        for i, name in enumerate(names)
    ]  # fmt: skip
    drawn = layout(x="seconds", height=130 + 26 * len(labels), barmode="stack")
    drawn["yaxis"] |= {"autorange": "reversed", "title": {"text": ""}}
    drawn["legend"] = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
    return {"data": traces, "layout": drawn}


def placement_chart(holding: Holding) -> Figure:
    """Draw nodes x experts: the number of layers in which the node holds the expert."""
    drawn = layout(x="expert", y="node", height=150 + 22 * min(30, len(holding.nodes)))
    drawn["yaxis"] |= {"type": "category", "autorange": "reversed"}
    drawn["xaxis"]["dtick"] = max(1, len(holding.counts[0]) // 16)
    return {
        "data": [
            {
                "type": "heatmap",
                "z": [list(row) for row in holding.counts],
                "y": [str(n) for n in holding.nodes],
                "zmin": 0,
                "zmax": holding.num_layers,
                "xgap": 1,
                "ygap": 1,
                "colorscale": [[0, "#f4f6f8"], [1, "#0072b2"]],
                "colorbar": {
                    "title": {"text": "layers"},
                    "thickness": 10,
                    "dtick": -(-holding.num_layers // 6),
                },
                "hovertemplate": "node %{y}, expert %{x}: %{z} layers<extra></extra>",
            }
        ],
        "layout": drawn,
    }


def load_chart(steps: Sequence[int], share_TE: Sequence[Sequence[float]]) -> Figure:
    """Draw each expert's share of a layer's routed copies over time, shares [T][E]."""
    num_experts = len(share_TE[0])
    return {
        "data": [
            {
                "type": "heatmap",
                "x": list(steps),
                "z": [[round(row[e], 4) for row in share_TE] for e in range(num_experts)],
                "zmin": 0,
                "colorscale": "Viridis",
                "colorbar": {"title": {"text": "share"}, "thickness": 10},
                "hovertemplate": "step %{x}, expert %{y}: %{z:.1%}<extra></extra>",
            }
        ],
        "layout": layout(x="step", y="expert", height=300),
    }


def checkpoint_chart(view: RunView) -> Figure | None:
    """Draw the steps since the newest checkpoint over time; None without checkpoints."""
    if not view.checkpoint_age:
        return None
    drawn = layout(x="seconds", y="steps", height=240, showlegend=False)
    x, y = [t for t, _ in view.checkpoint_age], [a for _, a in view.checkpoint_age]
    return {"data": [line("age", x, y, colour=COLOURS[0], fill="tozeroy")], "layout": drawn}


def survival_chart(survival: Sequence[tuple[int, float]]) -> Figure:
    """Draw the probability that every expert survives, for pairs (lost nodes, probability)."""
    drawn = layout(x="nodes lost at once", y="probability", height=260)
    drawn["yaxis"]["range"] = [0, 1.04]
    drawn["xaxis"]["dtick"] = max(1, len(survival) // 12)
    bars = {
        "type": "bar",
        "x": [k for k, _ in survival],
        "y": [p for _, p in survival],
        "marker": {"color": COLOURS[2]},
        "hovertemplate": "%{x} lost: %{y:.1%}<extra></extra>",
    }
    return {"data": [bars], "layout": drawn}


def bars_chart(names: Sequence[str], values: Sequence[float], *, title: str) -> Figure:
    """Draw one bar per run."""
    colours = [_colour(i) for i in range(len(names))]
    bars = {"type": "bar", "x": list(names), "y": list(values), "marker": {"color": colours}}
    return {"data": [bars], "layout": layout(y=title, height=260)}

"""The HTML page around the charts; self-contained, loads nothing from the network."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

_STYLE = """
body{margin:0;background:#f4f6f8;color:#222;font:15px/1.5 system-ui,sans-serif}
main{max-width:1240px;margin:0 auto;padding:16px}
h1{font-size:1.5em;margin:.3em 0 .1em;overflow-wrap:anywhere}
.sub{color:#555;margin:0 0 14px;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:10px;
margin-bottom:14px}
.tile,section{background:#fff;border:1px solid #dde2e7;border-radius:8px}
.tile{padding:8px 12px}.tile b{display:block;font-size:1.3em}.tile span{color:#555;font-size:.9em}
.grid{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:14px}
section{padding:12px 14px;min-width:0}section.wide{grid-column:1/-1}
h2{font-size:1.05em;margin:0 0 2px}section p{color:#555;margin:0 0 6px;font-size:.92em}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%}
td,th{text-align:right;padding:3px 10px;border-bottom:1px solid #e6e6e6;white-space:nowrap}
td:first-child,th:first-child{text-align:left;white-space:normal}
@media (max-width:800px){.grid{grid-template-columns:minmax(0,1fr)}main{padding:8px}}
"""
_NO_REQUESTS = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
)
_SCRIPT = """
const figures = JSON.parse(document.getElementById('figures').textContent);
const narrow = window.innerWidth < 600;
const options = {responsive: true, displayModeBar: false, plotlyServerURL: '', topojsonURL: ''};
for (const [id, figure] of Object.entries(figures)) {
  if (narrow) {
    figure.layout.font.size = 12;
    figure.layout.margin.l = 40;
    figure.layout.xaxis.nticks = 5;
  }
  Plotly.newPlot(id, figure.data, figure.layout, options);
}
document.body.dataset.charts = Object.keys(figures).length;
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """One box of the page: a title, a sentence, and a figure or a table."""

    title: str
    about: str = ""
    figure: Mapping[str, Any] | None = None
    table: Sequence[Sequence[str]] = ()  # first row: the header
    wide: bool = False


def page(
    *, title: str, subtitle: str, tiles: Sequence[tuple[str, str]], sections: Sequence[Section]
) -> str:
    """Return the complete HTML document.

    Args:
        title: Title and heading.
        subtitle: Line below the heading.
        tiles: (value, name) pairs shown at the top.
        sections: The boxes, in order.
    """
    boxes = "".join(_tile(value, name) for name, value in tiles)
    body = "".join(_section(section, f"chart-{i}") for i, section in enumerate(sections))
    figures = {f"chart-{i}": s.figure for i, s in enumerate(sections) if s.figure is not None}
    data = json.dumps(figures, separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_NO_REQUESTS}">'
        '<link rel="icon" href="data:,">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body><main>"
        f'<h1>{html.escape(title)}</h1><p class="sub">{html.escape(subtitle)}</p>'
        f'<div class="tiles">{boxes}</div><div class="grid">{body}</div></main>'
        f'<script type="application/json" id="figures">{data}</script>'
        f"<script>{plotly_source()}</script><script>{_SCRIPT}</script></body></html>\n"
    )


def plotly_source() -> str:
    """Return plotly.js from the installed plotly package, to be embedded in the page."""
    source = (resources.files("plotly") / "package_data" / "plotly.min.js").read_text("utf-8")
    return source.replace("</script>", "<\\/script>")


def _tile(value: str, name: str) -> str:
    return f'<div class="tile"><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>'


def _section(section: Section, key: str) -> str:
    wide = ' class="wide"' if section.wide else ""
    about = f"<p>{html.escape(section.about)}</p>" if section.about else ""
    chart = f'<div class="chart" id="{key}"></div>' if section.figure is not None else ""
    title = html.escape(section.title)
    return f"<section{wide}><h2>{title}</h2>{about}{chart}{_table(section.table)}</section>"


def _table(rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    cells = [
        "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"
        for tag, row in zip(["th"] + ["td"] * len(rows), rows, strict=False)
    ]
    return f'<div class="scroll"><table>{"".join(cells)}</table></div>'

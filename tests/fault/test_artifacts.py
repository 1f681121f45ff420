"""What a real run leaves beside its record: the report, and the loads of all its lives."""

from __future__ import annotations

from typing import Any

from lazarus.record.loads import load_loads

# 11 samples of 16 tokens, each to 2 experts.
ROUTED = 11 * 16 * 2


def test_a_run_and_its_next_life_leave_a_report_and_all_loads(run: Any) -> None:
    settings = ("metrics.report=true", "checkpoint.full_at_end=true")
    first = run("kill:1@3", nodes=3, steps=4, settings=settings)
    page = first.folder / "report.html"
    assert "Expert load, MoE layer 1" in page.read_text() and "4 steps in" in page.read_text()
    loads = load_loads(first.folder / "expert_load.npz")
    assert loads.steps.tolist() == [1, 2, 3, 4]

    again = run(nodes=3, steps=6, settings=settings, resume=first.folder)
    again.assert_exactly_once(6)
    both = load_loads(first.folder / "expert_load.npz")
    assert both.steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert (both.counts[:4] == loads.counts).all()
    assert (both.counts.sum(2) == ROUTED).all()
    assert "6 steps in" in page.read_text()

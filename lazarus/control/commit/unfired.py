"""Reports scripted faults that never fired, so that no fault test passes without one. PURE."""

from __future__ import annotations

import re

from lazarus.control.cluster.state import Control
from lazarus.control.ports import Publish

_SPEC = re.compile(r"(?P<kind>\w+)(?::(?P<node>\d+))?@(?P<step>\d+)(?:/(?P<phase>\w+))?")


def names_a_node(spec: str) -> bool:
    """Whether a scripted fault is for a given node, not for any node."""
    return ":" in spec.partition("@")[0]


def unfired(state: Control, *, at_s: float) -> tuple[Publish, ...]:
    """One event for each scripted fault that has not fired, with the reason."""
    left = [text for text in state.config.faults if text not in state.injected.fired_specs]
    return tuple(
        Publish(
            t=at_s,
            event="fault_not_fired",
            fields={
                "generation": state.resumed,
                "spec": text,
                "reason": _reason(state, text),
            },
        )
        for text in left
    )


def _reason(state: Control, spec: str) -> str:
    found = _SPEC.match(spec)
    if found is None:
        return "it is no scripted fault"
    step, phase = int(found["step"]), found["phase"] or "forward"
    node = -1 if found["node"] is None else int(found["node"])
    if step > state.step + 1 or (step == state.step + 1 and found["kind"] != "leave"):
        return f"the run ended after step {state.step}"
    if node >= state.roster.next_serial:
        return f"there never was a node {node}"
    if node >= 0 and node not in state.standing.members:
        return f"node {node} was gone before"
    if phase in ("reconfigure", "transfer"):
        return f"no {phase} came after step {step}"
    return f"nobody came by phase {phase} of step {step}"

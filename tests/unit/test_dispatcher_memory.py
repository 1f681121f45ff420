"""The exchange holds at most three copies of the rows at a time, counted allocation by allocation.

The output is the caller's. Hidden activations belong to the experts and are made negligible: one
hidden unit. What remains beside rows are indices, at most 64 bytes for each copy.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dispatcher import (
    Exchange,
    ExpertLayout,
    PathOptions,
    RoutingTable,
    SharedExchange,
    SplitRule,
    expert_path,
    route,
    within_machine,
)
from dispatcher.local.shared import STAGE_BYTES
from dispatcher.processes import run_processes

TOKENS, EXPERTS, DIM = 4096, 6, 512
INDEX_BYTES = 64
SLOTS = [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 0, 1]]


def peak_in_rows(
    exchange: Exchange, mode: str, top_k: int, masked: int, transport: str
) -> tuple[float, int]:
    """Peak of a forward and backward in copies of this rank's rows, and bytes of shared blocks."""
    if transport == "shared memory":
        exchange = within_machine(exchange)
        assert isinstance(exchange, SharedExchange)
    random = torch.Generator().manual_seed(exchange.rank)
    layout = ExpertLayout(activation="gelu", dim=DIM, hidden=1)
    x = torch.randn(TOKENS, DIM, generator=random, requires_grad=True)
    popularity = torch.linspace(3.0, 1.0, EXPERTS).expand(TOKENS, EXPERTS)
    choice = torch.multinomial(popularity, top_k, generator=random)
    choice[:masked, 0] = -1
    gate = torch.rand(TOKENS, top_k, generator=random).requires_grad_()
    weight = torch.randn(4, layout.row_numel, generator=random).requires_grad_()
    table = RoutingTable.from_plan_arrays(SLOTS, rank=exchange.rank)
    upstream = torch.ones(TOKENS, DIM)

    def step() -> int:
        """Rows sent or received, whichever are more."""
        x.grad = gate.grad = None
        routed = route(x, choice, table=table, exchange=exchange, rule=SplitRule(mode=mode))
        y = expert_path(x, gate, weight, routed, PathOptions(layout=layout), written=set())
        y.backward(upstream)
        return max(routed.num_sent, routed.num_received)

    rows = step()  # buffers that stay exist from now on
    peak = min(peak_of(step) for _ in range(3))
    output = TOKENS * DIM * 4
    staged = exchange.staged_bytes if isinstance(exchange, SharedExchange) else 0
    return (peak - output - INDEX_BYTES * rows) / (rows * DIM * 4), staged


def peak_of(step: Callable[[], object]) -> int:
    """Bytes allocated at a time. Gloo's threads drop a tensor when they please: take the least."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as watch:
        step()
    live = peak = 0
    for event in watch.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize("transport", ["gloo", "shared memory"])
@pytest.mark.parametrize(
    ("mode", "top_k", "masked"),
    [
        pytest.param("home", 2, 0, marks=pytest.mark.slow),
        ("shares", 2, 1),
        pytest.param("shares", 2, 0, marks=pytest.mark.slow),
        pytest.param("balanced", 2, 0, marks=pytest.mark.slow),
        pytest.param("balanced", 1, 0, marks=pytest.mark.slow),
    ],
)
def test_no_more_than_three_copies_of_the_rows_live_at_once(
    mode: str, top_k: int, masked: int, transport: str
) -> None:
    args = (mode, top_k, masked, transport)
    for peak, staged in run_processes(peak_in_rows, size=3, args=args):
        assert 1.5 < peak <= 3.0
        assert staged <= 3 * STAGE_BYTES

"""Local repair of balance: replicate an expert of the overloaded nodes on the idlest node.

Only fill moves (replicas beyond the template's blocks). The core stays, and with it the survival
of losses. Each layer keeps its best placement, so no layer gets worse.

Shapes: L layers, E experts, N nodes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from placement.balance.shares import dense_shares, loads_of_nodes, max_over_mean, node_factors
from placement.request import Bools, Floats

TOLERANCE = 0.002
ROUNDS = 8
_LARGEST = 2_000_000  # layers x experts x nodes; larger placements are level already
_FIRST_ROUNDS, _NEXT_ROUNDS = 8, 4


def levelled(
    load_LE: Floats,
    member: Bools,
    core: Bools,
    *,
    slots_per_node: int,
    rounds: int = ROUNDS,
    targets: npt.NDArray[np.bool_] | None = None,
) -> tuple[Bools, Floats | None]:
    """Move fill in the layers whose max/mean node load exceeds 1 + ``TOLERANCE``.

    Args:
        load_LE: Tokens per expert, [L, E].
        member: The placement, bool [L, E, N]; not changed.
        core: Replicas that must stay, bool [L, E, N].
        slots_per_node: Slots per node and layer.
        rounds: Moves tried per layer.
        targets: Nodes that may receive copies, bool [N]; all when None.

    Returns:
        The new placement, and the approximate max/mean of each layer, [L]; None (and the
        placement unchanged) for a very large placement.
    """
    if member.size > _LARGEST:
        return member, None
    factor = node_factors(load_LE, member, rounds=_FIRST_ROUNDS)
    best_L = max_over_mean(loads_of_nodes(load_LE, member, factor))
    rows = np.flatnonzero(best_L > 1.0 + TOLERANCE)
    if not len(rows):
        return member, best_L
    member = member.copy()
    trial, factor = member[rows], factor[rows]
    uses = dense_shares(trial, factor) * load_LE[rows][:, :, None]
    for _ in range(rounds):
        moved_L = _move(trial, core[rows], uses, slots_per_node, targets)
        rows, trial, factor = rows[moved_L], trial[moved_L], factor[moved_L]
        if not len(rows):
            break
        factor = node_factors(load_LE[rows], trial, rounds=_NEXT_ROUNDS, start=factor)
        uses = dense_shares(trial, factor) * load_LE[rows][:, :, None]
        ratio_L = max_over_mean(uses.sum(1))
        better_L = ratio_L < best_L[rows] - 1e-6
        member[rows[better_L]] = trial[better_L]
        best_L[rows] = np.minimum(best_L[rows], ratio_L)
        # A trial may pass through worse placements; ``member`` keeps the best of each layer.
        open_L = best_L[rows] > 1.0 + TOLERANCE
        rows, trial, uses, factor = rows[open_L], trial[open_L], uses[open_L], factor[open_L]
        if not len(rows):
            break
    return member, best_L


def _move(
    member: Bools,
    core: Bools,
    uses: Floats,
    slots_per_node: int,
    targets: npt.NDArray[np.bool_] | None,
) -> npt.NDArray[np.bool_]:
    """Add one replica per layer, evicting the least used fill if needed; return who moved, [L]."""
    rows_L = np.arange(len(member))
    node_load = uses.sum(1)
    peak_L = node_load.max(1)
    idle_L = (node_load if targets is None else np.where(targets, node_load, np.inf)).argmin(1)
    hot_LN = node_load >= (peak_L * (1.0 - 1e-3))[:, None]
    pressure = np.einsum("len,ln->le", uses, hot_LN)
    pressure[member[rows_L, :, idle_L]] = -1.0
    expert_L = pressure.argmax(1)
    ok_L = pressure[rows_L, expert_L] > 0
    there = member[rows_L, :, idle_L]
    full_L = there.sum(1) >= slots_per_node
    loose = there & ~core[rows_L, :, idle_L] & (member.sum(2) > 1)
    given = np.where(loose, uses[rows_L, :, idle_L], np.inf)
    victim_L = given.argmin(1)
    ok_L &= ~full_L | np.isfinite(given[rows_L, victim_L])
    out_L = ok_L & full_L
    member[rows_L[out_L], victim_L[out_L], idle_L[out_L]] = False
    member[rows_L[ok_L], expert_L[ok_L], idle_L[ok_L]] = True
    moved_L: npt.NDArray[np.bool_] = ok_L
    return moved_L

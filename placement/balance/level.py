"""Local repair of balance: give the overloaded nodes' experts a copy on the idlest node.

Only fill moves; the core, and with it the survival of losses, stays. Layers are independent and
each keeps its best placement, so nothing gets worse. Shapes: L layers, E experts, N nodes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from placement.balance.shares import dense_shares, loads_of_nodes, max_over_mean, node_factors
from placement.request import Bools, Floats

TOLERANCE = 0.002
ROUNDS = 8
_LARGEST = 2_000_000  # layers x experts x nodes; beyond it there is fill enough to be level
_FIRST_ROUNDS, _NEXT_ROUNDS = 8, 4


def levelled(
    load_LE: Floats,
    member: Bools,
    core: Bools,
    *,
    slots_per_node: int,
    rounds: int = ROUNDS,
    tolerance: float = TOLERANCE,
    targets: npt.NDArray[np.bool_] | None = None,
) -> tuple[Bools, Floats | None]:
    """``member`` with fill moved in layers whose max/mean exceeds 1 + ``tolerance``.

    Args:
        core: Replicas that must stay, bool [L, E, N].
        rounds: Moves tried per layer; each costs one levelling of the open layers' shares.
        tolerance: Excess of max/mean that is left alone.
        targets: Nodes that may receive copies, bool [N]; all when None.

    Returns:
        The placement, and max/mean of each layer after a few rounds of levelling shares (None for
        a placement too large to be worth it).
    """
    if member.size > _LARGEST:
        return member, None
    factor = node_factors(load_LE, member, rounds=_FIRST_ROUNDS)
    best_L = max_over_mean(loads_of_nodes(load_LE, member, factor))
    rows = np.flatnonzero(best_L > 1.0 + tolerance)
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
        # A worse step may still lead on; the best placement of each layer is what counts.
        open_L = best_L[rows] > 1.0 + tolerance
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
    """One added copy per layer, in place of the least used fill there; which layers moved."""
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

"""Homes: the rank that serves all tokens of an expert in home mode (no spreading).

Shapes: L layers, E experts, R ranks.
"""

from __future__ import annotations

import numpy as np

from placement.request import Bools, Floats, Ints

_FLEET = 1000  # number of ranks above which only the ranks that hold an expert are scanned


def choose_homes(load_LE: Floats, expert_of_slot: Ints) -> Ints:
    """Choose one serving rank per expert so that the ranks' loads are level; int32 [L, E].

    Each expert, hottest first, goes to the least loaded rank that holds a replica. Then single
    experts move off the busiest rank while that lowers its load.
    """
    num_layers, num_ranks, _ = expert_of_slot.shape
    num_experts = load_LE.shape[1]
    holds = np.zeros((num_layers, num_experts, num_ranks), dtype=np.bool_)
    layer, rank, slot = np.nonzero(expert_of_slot >= 0)
    holds[layer, expert_of_slot[layer, rank, slot], rank] = True
    rows_L = np.arange(num_layers)
    home = np.full((num_layers, num_experts), -1, dtype=np.int32)
    # Among ranks of equal load, the rank with fewer homes wins.
    step_L = 1e-9 * np.maximum(load_LE.sum(1), 1e-300) / num_ranks
    load = np.zeros((num_layers, num_ranks))
    order = np.argsort(-load_LE, axis=1, kind="stable")
    if num_ranks >= _FLEET:
        for at in range(num_layers):
            _homes_of_layer(order[at], load_LE[at], holds[at], home[at], load[at], step_L[at])
        return _improved(load_LE, holds, home, load)
    for step in range(num_experts):
        expert_L = order[:, step]
        rank_L = np.where(holds[rows_L, expert_L], load, np.inf).argmin(1)
        home[rows_L, expert_L] = rank_L
        load[rows_L, rank_L] += load_LE[rows_L, expert_L] + step_L
    return _improved(load_LE, holds, home, load)


def _homes_of_layer(
    order_E: Ints, load_E: Floats, holds_ER: Bools, home_E: Ints, load_R: Floats, step: float
) -> None:
    """First pass of ``choose_homes`` for one layer, in place; scans only the holding ranks."""
    for expert in order_E.tolist():
        ranks = np.flatnonzero(holds_ER[expert])
        rank = ranks[load_R[ranks].argmin()]
        home_E[expert] = rank
        load_R[rank] += load_E[expert] + step


def _improved(load_LE: Floats, holds: Bools, home: Ints, load: Floats) -> Ints:
    """Second pass: per round, move one expert off each layer's busiest rank to another holder."""
    num_layers, num_experts, _ = holds.shape
    rows_L = np.arange(num_layers)
    for _ in range(num_experts):
        busiest_L = load.argmax(1)
        peak_L = load[rows_L, busiest_L]
        there = np.full(load_LE.shape, np.inf)
        layer, expert = np.nonzero((home == busiest_L[:, None]) & (load_LE > 0))
        options = np.where(holds[layer, expert], load[layer], np.inf)
        options[np.arange(len(layer)), busiest_L[layer]] = np.inf
        target = options.argmin(1)
        there[layer, expert] = options[np.arange(len(layer)), target] + load_LE[layer, expert]
        movable = there < (peak_L * (1.0 - 1e-9))[:, None]
        if not movable.any():
            break
        rank_of = np.zeros(load_LE.shape, dtype=np.int32)
        rank_of[layer, expert] = target
        expert_L = np.where(movable, there, np.inf).argmin(1)
        go = np.flatnonzero(movable[rows_L, expert_L])
        moving = expert_L[go]
        load[go, busiest_L[go]] -= load_LE[go, moving]
        load[go, rank_of[go, moving]] += load_LE[go, moving]
        home[go, moving] = rank_of[go, moving]
    return home

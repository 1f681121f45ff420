"""Choose the template: exact failure score against balance on a few typical layers.

Shapes: L layers, E experts, T candidate templates.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from placement.assignment.build import Draft, draft_of, frame_of, place, place_frame, plan_of
from placement.balance.allocate import allocate_replicas
from placement.balance.level import ROUNDS
from placement.balance.shares import balance_of
from placement.plan import Plan
from placement.request import Floats, Ints, PlacementRequest
from placement.survival.resilience import survival
from placement.survival.truth import level_tables, surviving_counts
from placement.templates.family import family
from placement.templates.order import ordered_template
from placement.templates.template import Template, masks, segment_candidates, wrap

_MOST_LOSSES = 12
_TABLE_NODES = 14
_TINY = 48  # nodes x experts up to which the whole family is tried
_FREE_CORE = 0.78  # fraction of slots that floors may take at no price
_PER_CORE = 0.08  # price of the fraction above that, in excess load
_TYPICAL_LAYERS = 3
_MOST_TRIED = 3
_LEVEL_ENOUGH = 0.004  # excess below which the first candidate is taken without a comparison
_SMALL = 60_000  # candidates x layers x experts x nodes up to which all layers are tried
_TRIAL_MOVES = 2
_TRIAL_ROUNDS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A candidate template with its name, failure score and expected excess load.

    Attributes:
        failure: Failure score of the template; see ``failure_score``.
        core: Fraction of all slots that the template's floors take.
        excess: max/mean node load, averaged over layers, minus 1.
        draft: Placement of all layers on the template; None before ``place``.
        block: Block of each expert, int32 [L, E]; None before ``place``.
    """

    template: Template
    name: str
    failure: float
    core: float
    excess: float = 0.0
    draft: Draft | None = None
    block: Ints | None = None


@lru_cache(maxsize=4096)
def failure_score(template: Template, *, num_nodes: int) -> float:
    """Return the sum over k < N of 2^-k times the probability that k losses destroy an expert.

    A smaller score is safer. The weights reflect that few losses are likelier than many.
    """
    if num_nodes <= _TABLE_NODES:
        counts = surviving_counts(masks(template), num_nodes=num_nodes)
        levels = [level.bit_count() for level in level_tables(num_nodes)]
        lost = [1.0 - c / n for c, n in zip(counts, levels, strict=True)]
    else:
        chance = survival(masks(template), num_nodes=num_nodes, max_losses=_MOST_LOSSES)
        lost = [1.0 - p for p in chance.probability]
    return sum(x * 0.5**k for k, x in enumerate(lost) if k < num_nodes)


def load_profile(load_LE: Floats) -> Floats:
    """Return the mean load share of the coldest, second coldest, ... expert; [E], sum 1."""
    total_L = load_LE.sum(1)
    share = np.where((total_L > 0)[:, None], load_LE, 1.0)
    share = np.sort(share / share.sum(1)[:, None], axis=1)
    profile: Floats = share.mean(0)
    return profile


def price_of(request: PlacementRequest, choice: Choice) -> float:
    """Price of a candidate: excess load, priced failure score, and slots bound by floors."""
    tied = _PER_CORE * max(0.0, choice.core - _FREE_CORE)
    return choice.excess + request.failure_price * choice.failure + tied


def plan_of_choice(request: PlacementRequest, choice: Choice, *, notes: tuple[str, ...]) -> Plan:
    """Make the plan of a candidate with all layers placed."""
    assert choice.draft is not None, "the choice is placed"
    return plan_of(
        request,
        choice.draft,
        template=choice.template,
        block=choice.block,
        method=choice.name,
        notes=notes,
    )


def best_template(request: PlacementRequest, floor: int) -> Choice:
    """Return the cheapest candidate by ``price_of``, with all layers placed on its template.

    Candidates are ranked by exact failure score and by the excess that their replica counts force;
    the first few are placed on a few typical layers, and the winner on all of them.
    """
    profile = load_profile(request.load)
    fair = _fair(profile, request, floor)
    found = [
        Choice(
            template=template,
            name=name,
            failure=failure_score(template, num_nodes=request.num_nodes),
            core=_core(template, request.num_nodes, request.slots_per_node),
        )
        for template, name in _candidates(profile, fair, request, floor)
    ]
    hoped = _least_excess(request, found, profile) + [price_of(request, c) for c in found]
    short = [found[i] for i in np.argsort(hoped, kind="stable")[:_MOST_TRIED]]
    best = _best_of(request, short)
    ordered = ordered_template(
        best.template,
        num_nodes=request.num_nodes,
        domains=request.domains,
        hazards=request.hazards,
    )
    if best.draft is not None and ordered == best.template:
        return best
    return _placed(request, replace(best, template=ordered))


def _best_of(request: PlacementRequest, choices: list[Choice]) -> Choice:
    """Place the candidates and return the cheapest; the first one at once if it is level.

    All layers are placed in one go, or a few typical ones where the problem is large.
    """
    all_layers = request.load.size * request.num_nodes * len(choices) <= _SMALL
    if all_layers:
        first = _placed(request, choices[0])
        if first.excess <= _LEVEL_ENOUGH or len(choices) == 1:
            return first
    if len(choices) == 1:
        return choices[0]
    layers = request.load if all_layers else _typical_layers(request)
    rows = np.tile(layers, (len(choices), 1))
    frame = frame_of(
        [c.template for c in choices for _ in range(len(layers))], num_nodes=request.num_nodes
    )
    rounds = ROUNDS if all_layers else _TRIAL_MOVES
    placed = place_frame(rows, frame, slots_per_node=request.slots_per_node, rounds=rounds)
    ratio = placed.ratio
    if ratio is None:
        ratio = balance_of(rows, placed.member, rounds=_TRIAL_ROUNDS)
    excess_T = ratio.reshape(len(choices), len(layers)).mean(1) - 1.0
    prices = [
        round(price_of(request, replace(choice, excess=float(excess))), 9)
        for excess, choice in zip(excess_T, choices, strict=True)
    ]
    best = int(np.argmin(prices))
    if not all_layers:
        return choices[best]
    mine = slice(best * len(layers), (best + 1) * len(layers))
    draft = draft_of(request, placed.member[mine])
    return replace(choices[best], draft=draft, block=placed.block[mine], excess=draft.excess)


def _placed(request: PlacementRequest, choice: Choice) -> Choice:
    placed = place(request, choice.template)
    draft = draft_of(request, placed.member)
    return replace(choice, draft=draft, block=placed.block, excess=draft.excess)


def _fair(profile: Floats, request: PlacementRequest, floor: int) -> Floats:
    """Replica counts that follow load and floor alone, ascending, [E]."""
    counts = allocate_replicas(
        profile,
        num_slots=request.num_nodes * request.slots_per_node,
        min_replicas=floor,
        max_replicas=request.num_nodes,
    )
    return np.sort(counts[0]).astype(np.float64)


def _candidates(
    profile: Floats, fair: Floats, request: PlacementRequest, floor: int
) -> Iterable[tuple[Template, str]]:
    nodes, slots = request.num_nodes, request.slots_per_node
    seen: dict[Template, str] = {}
    found = segment_candidates(profile, num_nodes=nodes, slots_per_node=slots, floor=floor)
    for template in found:
        seen.setdefault(template, f"template({len(template)} segments)")
    if nodes <= _TABLE_NODES or not found:
        counts = tuple(int(r) for r in fair)
        quick = nodes * len(fair) > _TINY
        for vector in (counts, _even(len(fair), nodes, slots), (floor,) * len(fair)):
            for member in family(vector, num_nodes=nodes, slots_per_node=slots, quick=quick):
                seen.setdefault(member.blocks, f"mixed({member.name})")
    seen.setdefault(wrap((floor,) * len(fair), num_nodes=nodes), "wrap")
    for template, name in seen.items():
        smallest = min(len(ns) for ns, _ in template)
        if smallest >= floor and _facts(template, nodes, slots).fits:
            yield template, name


def _even(num_experts: int, num_nodes: int, slots_per_node: int) -> tuple[int, ...]:
    """Replicas as equal as the slots allow, ascending."""
    each, more = divmod(min(num_nodes * slots_per_node, num_experts * num_nodes), num_experts)
    return (each,) * (num_experts - more) + (each + 1,) * more


def _core(template: Template, num_nodes: int, slots: int) -> float:
    """Fraction of all slots that the template's floors take; the others can follow the load."""
    return float(_facts(template, num_nodes, slots).sizes.sum()) / (num_nodes * slots)


def _least_excess(request: PlacementRequest, choices: list[Choice], profile: Floats) -> Floats:
    """Excess load that replica counts and full nodes force on the mean layer; float64 [T].

    An expert with r replicas loads its nodes with at least 1/r of its tokens. Nodes without a
    free slot serve only experts of their own blocks, so the other nodes must serve the rest.
    """
    nodes = request.num_nodes
    frames = [_facts(c.template, nodes, request.slots_per_node) for c in choices]
    rows = np.repeat(profile[None], len(choices), axis=0)
    replicas = allocate_replicas(
        rows,
        num_slots=nodes * request.slots_per_node,
        min_replicas=np.stack([f.sizes for f in frames]),
        max_replicas=nodes,
    )
    forced = (rows / replicas).max(1) * nodes
    full = np.array([f.full for f in frames], dtype=np.float64)
    inside = np.minimum(np.stack([f.confined for f in frames]) @ profile, full / nodes)
    left = np.where(full < nodes, (1.0 - inside) * nodes / np.maximum(nodes - full, 1.0), 1.0)
    excess: Floats = np.maximum(np.maximum(forced, left) - 1.0, 0.0)
    return excess


@dataclass(frozen=True, slots=True)
class _Facts:
    """Properties of a template that do not depend on the loads.

    Attributes:
        sizes: Number of nodes of each expert's block, experts by load, int32 [E].
        full: Number of nodes without a free slot.
        confined: 1.0 for experts whose block has a full node, experts by load, float64 [E].
        fits: Whether every node has enough slots.
    """

    sizes: Ints
    full: int
    confined: Floats
    fits: bool


@lru_cache(maxsize=4096)
def _facts(template: Template, num_nodes: int, slots: int) -> _Facts:
    used = np.zeros(num_nodes, dtype=np.int32)
    for nodes, width in template:
        used[list(nodes)] += width
    widths = [width for _, width in template]
    shut = used >= slots
    return _Facts(
        sizes=np.repeat(np.array([len(ns) for ns, _ in template], dtype=np.int32), widths),
        full=int(shut.sum()),
        confined=np.repeat([float(shut[list(ns)].any()) for ns, _ in template], widths),
        fits=bool((used <= slots).all()),
    )


def _typical_layers(request: PlacementRequest) -> Floats:
    """Loads of a few layers, chosen evenly from the least to the most skewed one."""
    load = request.load
    wanted = min(len(load), _TYPICAL_LAYERS)
    total_L = load.sum(1)
    skew = ((load / np.where(total_L > 0, total_L, 1.0)[:, None]) ** 2).sum(1)
    by_skew = np.argsort(skew, kind="stable")
    at = ((np.arange(wanted) + 0.5) * len(load) / wanted).astype(int)
    typical: Floats = load[by_skew[at]]
    return typical

"""Detection of ranks that run different collectives or start with different models.

All ranks must run the same exchanges in the same order. If user code runs a layer on one rank and
not on another, the ranks wait for each other for ever, or fail, and no node is at fault. The run
then ends with an error that names the ranks and lines of both sides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from lazarus.control.cluster.state import Control
from lazarus.control.messages import Aligned, Report, Tail, TensorSum
from lazarus.control.ports import Publish
from lazarus.failure import Cause, Failure

STALLED = "collective_stalled"  # reason of a fence because all ranks were waiting

_SAME_MODEL = (
    "build the same model on every rank: torch is seeded before the builder is called, so do not "
    "seed it by process, time or rank"
)
_SAME_LAYERS = (
    "let every rank run the same layers in the same order: draw what may be skipped from (seed, "
    "step), not per rank or sample; to skip a sample, mask its labels"
)


def ranks_parted(reports: Mapping[str, Report], seats: Sequence[str]) -> Failure | None:
    """The failure that ends the run if ranks ran different exchanges, else None.

    Args:
        reports: Frozen answers to a fence, by worker.
        seats: Workers of the fenced generation, in rank order.
    """
    seated = {worker: rank for rank, worker in enumerate(seats)}
    groups = Counter(r.tail.group for w, r in reports.items() if w in seated and r.tail.labels)
    if not groups:
        return None
    group = max(groups, key=lambda name: (groups[name], name))
    found: dict[int, dict[str, list[int]]] = {}
    for worker, report in reports.items():
        tail = report.tail
        if worker in seated and tail.group == group:
            first = tail.last - len(tail.labels) + 1
            for number, label in enumerate(tail.labels, first):
                found.setdefault(number, {}).setdefault(label, []).append(seated[worker])
    for number in sorted(found):
        if len(found[number]) > 1:
            return _parted(found[number], reports, seats, number=number)
    return None


def _parted(
    sides: Mapping[str, Sequence[int]],
    reports: Mapping[str, Report],
    seats: Sequence[str],
    *,
    number: int,
) -> Failure:
    ordered = sorted(sides.items(), key=lambda side: min(side[1]))
    tails = {rank: reports[seats[rank]].tail for _, ranks in ordered for rank in ranks}
    places = {rank: _place_of(tail, number) for rank, tail in tails.items()}
    said = []
    for label, ranks in ordered:
        place = places[min(ranks)]
        where = f" ({place})" if place else ""
        said.append(f"{_ranks(ranks)} at {label.rpartition(' #')[0]}{where}")
    odd = min(sorted(sides.values(), key=lambda ranks: (len(ranks), -min(ranks)))[0])
    return Failure(
        cause=Cause.USER_CODE,
        error="UserCodeError",
        message=f"ranks do not run the same layers: {'; '.join(said)}",
        way_out=_SAME_LAYERS,
        rank=odd,
        step=reports[seats[odd]].tail.step,
        place=places[odd],
    )


def _place_of(tail: Tail, number: int) -> str:
    """The line of user code that led to an exchange; if not known, the line the rank is in."""
    index = number - 1 - tail.last + len(tail.labels)
    led = tail.places[index] if 0 <= index < len(tail.places) else ""
    return led or tail.place


def models_differ(aligned: Mapping[str, Aligned], workers: Sequence[str]) -> Failure | None:
    """The failure that ends the run if ranks begin with different models, else None.

    Args:
        aligned: Answer of each worker before the first step, with the checksums of its tensors.
        workers: All workers, in rank order.
    """
    by_rank = [{t.name: t for t in aligned[worker].tensors} for worker in workers]
    names = list(dict.fromkeys(name for tensors in by_rank for name in tensors))
    for name in names:
        held = [tensors.get(name) for tensors in by_rank]
        if len(set(held)) > 1:
            text = f"the model differs between ranks at the start: {name} {_difference(held)}"
            return Failure(
                cause=Cause.USER_CODE,
                error="UserCodeError",
                message=text,
                way_out=_SAME_MODEL,
                phase="build",
                step=aligned[workers[0]].step,
                place=aligned[workers[0]].place,
            )
    return None


def _difference(held: Sequence[TensorSum | None]) -> str:
    """How one tensor differs between ranks, as the end of a sentence; ``held`` is in rank order."""
    kinds: dict[str, list[int]] = {}
    for rank, tensor in enumerate(held):
        kinds.setdefault("missing" if tensor is None else tensor.kind, []).append(rank)
    if len(kinds) > 1:
        return "is " + ", ".join(f"{kind} on {_ranks(ranks)}" for kind, ranks in kinds.items())
    sums: dict[int, list[int]] = {}
    for rank, tensor in enumerate(held):
        sums.setdefault(0 if tensor is None else tensor.sum, []).append(rank)
    sides = sorted(sums.values(), key=lambda ranks: (-len(ranks), ranks))
    return "has other values on " + " than on ".join(_ranks(ranks) for ranks in reversed(sides))


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, sorted(ranks)[:8]))
    more = f", ... ({len(ranks)} in all)" if len(ranks) > 8 else ""
    return f"rank{'s' * (len(ranks) > 1)} {shown}{more}"


def judge_stall(
    state: Control, reports: Mapping[str, Report], *, at_s: float
) -> tuple[Control, Publish]:
    """Publish where all ranks were waiting, with the nodes of the broken link if one is found.

    A broken link takes the place of the newest entry of ``state.blame.errors``.
    """
    pair = broken_pair(reports, state.standing.seat_nodes)
    if pair and state.blame.errors:
        state = replace(state, blame=replace(state.blame, errors=(*state.blame.errors[:-1], pair)))
    labels = [r.tail.labels[-1] for r in reports.values() if r.tail.labels]
    fields = {
        "generation": state.resumed,
        "step": max((r.tail.step for r in reports.values()), default=-1),
        "where": min(labels, default="").rpartition(" #")[0],
        "nodes": list(pair),
    }
    return state, Publish(t=at_s, event=STALLED, fields=fields)


def broken_pair(reports: Mapping[str, Report], nodes: Sequence[int]) -> tuple[int, ...]:
    """The nodes at both ends of a link that carries no data.

    Args:
        reports: Reports by worker; ``tail.mute`` has the ranks to which its links are mute.
        nodes: The node of each rank.

    Returns:
        Two nodes; one node if that node has more mute links than any other; empty if there are no
        mute links.
    """
    links: set[tuple[int, int]] = set()
    for report in reports.values():
        own = report.tail.rank
        for peer in report.tail.mute:
            if 0 <= own < len(nodes) and 0 <= peer < len(nodes) and nodes[own] != nodes[peer]:
                first, second = sorted((nodes[own], nodes[peer]))
                links.add((first, second))
    times = Counter(node for link in links for node in link)
    ranked = sorted(times, key=lambda node: (-times[node], node))
    if len(ranked) > 2 and times[ranked[0]] > times[ranked[1]]:
        return (ranked[0],)
    return next((link for link in sorted(links) if set(link) <= set(ranked[:2])), ())

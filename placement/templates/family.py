"""A family of candidate templates for given replica counts.

A candidate consists of segments (maximum rank overlap) of some width and number, followed by a tail
for the remaining experts: a cyclic wrap, a complementary tail or a nested tail. Nodes are positions
0..N-1; experts are in ascending order of replicas.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from placement.templates.template import Block, Template, wrap


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A candidate template, and a short name of its construction."""

    blocks: Template
    name: str


@lru_cache(maxsize=256)
def family(
    replicas: tuple[int, ...], *, num_nodes: int, slots_per_node: int, quick: bool = False
) -> tuple[Candidate, ...]:
    """Return all candidates for replica counts in ascending order, without duplicates.

    Blocks cover the experts in order. A block spans at most as many nodes as its first expert has
    replicas.

    Args:
        replicas: Replicas of each expert, ascending.
        num_nodes: Number of nodes, N.
        slots_per_node: Slots per node.
        quick: Use full-width segments of the coldest experts only; about ten times as fast.
    """
    seen: dict[Template, Candidate] = {}
    num_experts = len(replicas)
    widest = min(slots_per_node, num_experts)
    for width in range(widest, widest - 1 if quick else 0, -1):
        for groups in range(-(-num_experts // width) + 1):
            last = max(num_experts - groups * width, 0) if groups and not quick else 0
            for skip in range(last + 1):
                own = replicas[skip : skip + groups * width]
                head, used = _segments(own, width, groups, num_nodes, clip=len(own) == num_experts)
                if head is None:
                    continue
                rest = (*replicas[:skip], *replicas[skip + len(own) :])
                for tail, name in _tails(rest, used, num_nodes, slots_per_node):
                    blocks = ordered((*head, *tail), replicas)
                    if blocks is not None and blocks not in seen:
                        label = f"c'={width},g={groups}" + (f",skip={skip}" if skip else "") + name
                        seen[blocks] = Candidate(blocks=blocks, name=label)
    return tuple(seen.values())


def ordered(blocks: Template, replicas: Sequence[int]) -> Template | None:
    """Sort blocks by size to match the experts' order; None if a block has too many nodes."""
    by_size = merged(tuple(sorted(blocks, key=lambda b: len(b[0]))))
    first = 0
    for nodes, width in by_size:
        if len(nodes) > replicas[first]:
            return None
        first += width
    return by_size


def mro(replicas: Sequence[int], *, num_nodes: int, slots_per_node: int) -> Template:
    """Return the paper's maximum rank overlap: full-width segments, the last one clipped.

    If no node is left for the last segment, it shares the last node.

    Source: Lazarus, section 4.1.
    """
    groups = -(-len(replicas) // slots_per_node)
    blocks: list[Block] = []
    start = 0
    for group in range(groups):
        first = group * slots_per_node
        width = min(slots_per_node, len(replicas) - first)
        size = min(replicas[first], num_nodes - start)
        nodes = tuple(range(start, start + size)) if size > 0 else (num_nodes - 1,)
        blocks.append((nodes, width))
        start += max(size, 0)
    return tuple(blocks)


def _segments(
    replicas: Sequence[int], width: int, groups: int, num_nodes: int, *, clip: bool
) -> tuple[Template | None, int]:
    """``groups`` segments (None if they do not fit) and the number of nodes they use."""
    blocks: list[Block] = []
    start = 0
    for first in range(0, groups * width, width):
        if first >= len(replicas):
            return None, start
        size = replicas[first]
        if start + size > num_nodes:
            size = num_nodes - start if clip and first + width >= len(replicas) else 0
        if size <= 0:
            return None, start
        blocks.append((tuple(range(start, start + size)), min(width, len(replicas) - first)))
        start += size
    return tuple(blocks), start


def _tails(
    rest: Sequence[int], used: int, num_nodes: int, slots_per_node: int
) -> Iterator[tuple[Template, str]]:
    """Yield named placements of the other experts on the nodes after the first ``used``."""
    if not rest:
        yield (), ""
        return
    nodes = num_nodes - used
    if nodes * slots_per_node < len(rest):
        return
    fitted = trimmed(rest, num_nodes=nodes, slots=nodes * slots_per_node)
    yield wrap(fitted, num_nodes=nodes, first_node=used), "+wrap"
    excess = len(rest) - slots_per_node
    if excess > 0:
        for parts in range(2, len(rest) // excess + 1):
            tail = complementary_tail(rest, num_nodes=nodes, excess=excess, parts=parts)
            if tail is not None:
                shifted = tuple((tuple(n + used for n in ns), w) for ns, w in tail)
                yield shifted, f",m={parts}"
    for cold in range(max(1, excess), min(slots_per_node, len(rest))):
        nest = nested_tail(rest, num_nodes=nodes, cold=cold, slots_per_node=slots_per_node)
        if nest is not None:
            yield tuple((tuple(n + used for n in ns), w) for ns, w in nest), f",nest={cold}"


def trimmed(replicas: Sequence[int], *, num_nodes: int, slots: int) -> tuple[int, ...]:
    """Reduce replica counts, largest first, until they fit nodes and slots."""
    counts = [min(r, num_nodes) for r in replicas]
    while sum(counts) > slots:
        top = max(counts)
        at = max(i for i, c in enumerate(counts) if c == top)
        counts[at] -= 1
    return tuple(counts)


def complementary_tail(
    replicas: Sequence[int], *, num_nodes: int, excess: int, parts: int
) -> Template | None:
    """Return blocks such that part i of the nodes holds every block except block i.

    Every node lacks ``excess`` experts: the hottest ``parts - 1`` blocks have that many experts
    each, the coldest block has the rest. If the parts need more nodes than there are, they overlap
    at the ends of the ring and slots remain free. None if a block would have no node.
    """
    cold = len(replicas) - (parts - 1) * excess
    widths = [cold] + [excess] * (parts - 1)
    firsts = [0] + [cold + i * excess for i in range(parts - 1)]
    sizes = [max(0, num_nodes - replicas[first]) for first in firsts]
    while sum(sizes) < num_nodes:
        sizes[min(range(parts), key=lambda i: (sizes[i], i))] += 1
    blocks: list[Block] = []
    start = 0
    for size, width in zip(sizes, widths, strict=True):
        own = {n % num_nodes for n in range(start, start + size)}
        nodes = tuple(n for n in range(num_nodes) if n not in own)
        if not nodes:
            return None
        blocks.append((nodes, width))
        start += size
    return tuple(blocks)


def nested_tail(
    replicas: Sequence[int], *, num_nodes: int, cold: int, slots_per_node: int
) -> Template | None:
    """Put the ``cold`` coldest experts on one part of the nodes, all others on the rest.

    The slots that the cold block leaves free on its own nodes go to the other experts cyclically,
    so that these overlap the cold block on different nodes. None if the rest of the nodes is empty
    or larger than an expert's replica count.
    """
    own = min(replicas[0], num_nodes)
    others = replicas[cold:]
    common = tuple(range(own, num_nodes))
    if not common or any(r < len(common) for r in others):
        return None
    extra = [min(r - len(common), own) for r in others]
    extra = list(trimmed(extra, num_nodes=own, slots=own * (slots_per_node - cold)))
    blocks: list[Block] = [(tuple(range(own)), cold)]
    start = 0
    for count in extra:
        inside = sorted((start + i) % own for i in range(count))
        blocks.append(((*inside, *common), 1))
        start += count
    return tuple(blocks)


def merged(blocks: Template) -> Template:
    """Merge consecutive blocks on the same nodes."""
    joined: list[Block] = []
    for nodes, width in blocks:
        if joined and joined[-1][0] == nodes:
            joined[-1] = (nodes, joined[-1][1] + width)
        else:
            joined.append((nodes, width))
    return tuple(joined)

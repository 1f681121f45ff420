"""Which nodes and workers there are, and what may be expected of them. PURE."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

from lazarus.control.cluster.remembered import remembered
from lazarus.control.cluster.state import Control, Node


def workers_of(state: Control, nodes: tuple[int, ...]) -> tuple[str, ...]:
    """Workers of nodes in rank order."""
    return _workers_of(state.nodes, nodes)


@remembered
def _workers_of(known: Mapping[int, Node], nodes: tuple[int, ...]) -> tuple[str, ...]:
    return tuple(chain.from_iterable([known[node].workers for node in nodes]))


def all_in(state: Control, nodes: tuple[int, ...], answers: Mapping[str, Any]) -> bool:
    """Whether every worker of the nodes has answered."""
    if len(answers) < len(nodes) * state.config.ranks_per_node:
        return False
    return all(map(answers.__contains__, workers_of(state, nodes)))


def leaving(state: Control, nodes: tuple[int, ...]) -> tuple[int, ...]:
    """Those of the nodes that will go, in the same order."""
    return _leaving(state.nodes, nodes)


@remembered
def _leaving(known: Mapping[int, Node], nodes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple([node for node in nodes if known[node].leaving])


def candidates(state: Control) -> tuple[int, ...]:
    """Complete nodes that are no members and stay, by serial."""
    if len(state.nodes) == len(state.members):  # members are nodes
        return ()
    fresh = sorted(state.nodes.keys() - set(state.members))
    nodes = ((serial, state.nodes[serial]) for serial in fresh)
    return tuple(serial for serial, node in nodes if node.complete and not node.leaving)


def staying(state: Control) -> tuple[int, ...]:
    """Complete nodes that could take part in a next generation, by serial."""
    there = (n for n, node in state.nodes.items() if node.complete and not node.leaving)
    return tuple(sorted(there))


def node_of(state: Control, key: str) -> tuple[int, Node] | None:
    """The living node of that name."""
    for serial, node in state.nodes.items():
        if node.key == key:
            return serial, node
    return None

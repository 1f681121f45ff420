"""Queries about the nodes and workers of the run: members, candidates, leavers. PURE."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

from lazarus.control.cluster.remembered import remembered
from lazarus.control.cluster.state import Control
from lazarus.control.parts.roster import Node


def workers_of(state: Control, nodes: tuple[int, ...]) -> tuple[str, ...]:
    """The workers of the given nodes, in rank order."""
    return _workers_of(state.roster.nodes, nodes)


@remembered
def _workers_of(known: Mapping[int, Node], nodes: tuple[int, ...]) -> tuple[str, ...]:
    return tuple(chain.from_iterable([known[node].workers for node in nodes]))


def all_in(state: Control, nodes: tuple[int, ...], answers: Mapping[str, Any]) -> bool:
    """Whether ``answers`` (keyed by worker) has an entry for every worker of the given nodes."""
    if len(answers) < len(nodes) * state.config.ranks_per_node:
        return False
    return all(map(answers.__contains__, workers_of(state, nodes)))


def leaving(state: Control, nodes: tuple[int, ...]) -> tuple[int, ...]:
    """The given nodes that are marked as leaving, in the same order."""
    return _leaving(state.roster.nodes, nodes)


@remembered
def _leaving(known: Mapping[int, Node], nodes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple([node for node in nodes if known[node].leaving])


def candidates(state: Control) -> tuple[int, ...]:
    """Complete nodes that are not members and are not leaving, by ascending serial."""
    if len(state.roster.nodes) == len(state.standing.members):  # every node is a member
        return ()
    fresh = sorted(state.roster.nodes.keys() - set(state.standing.members))
    nodes = ((serial, state.roster.nodes[serial]) for serial in fresh)
    return tuple(serial for serial, node in nodes if node.complete and not node.leaving)


def staying(state: Control) -> tuple[int, ...]:
    """Complete nodes, members or not, that are not leaving, by ascending serial."""
    there = (n for n, node in state.roster.nodes.items() if node.complete and not node.leaving)
    return tuple(sorted(there))


def node_of(state: Control, key: str) -> tuple[int, Node] | None:
    """The serial and the node with this key; None if no such node is alive."""
    for serial, node in state.roster.nodes.items():
        if node.key == key:
            return serial, node
    return None

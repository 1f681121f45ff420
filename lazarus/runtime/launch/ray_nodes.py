"""Which Ray node (machine) each node of the run is placed on. Pure bookkeeping; imports no Ray."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lazarus.basics.format import bytes_text
from lazarus.control.cluster.replacing import Machine
from lazarus.errors import ConfigError, StartupError

_SLACK = 1e-6  # Ray's resources are fixed-point numbers


@dataclass(frozen=True, kw_only=True, slots=True)
class RayNode:
    """The current state of one machine of a Ray cluster."""

    id: str
    host: str  # address that its processes bind to
    free: Mapping[str, float]  # unused resources by Ray's names; memory in bytes
    labels: Mapping[str, str]
    port: int = 0  # port of its raylet


class Places:
    """Which machines have room for nodes of the run, and which machine each node is on.

    Room is computed from a machine's free resources, minus those promised to nodes that have not
    reserved them yet. Not thread-safe.

    Args:
        need: Resources of one node of the run, by Ray's names; memory in bytes.
        labels: Labels that a machine must have.
    """

    def __init__(self, need: Mapping[str, float], *, labels: Mapping[str, str]) -> None:
        self._need = {name: amount for name, amount in need.items() if amount > 0}
        self._labels = labels
        self._nodes: dict[str, RayNode] = {}
        self._draining: set[str] = set()
        self._seen: set[str] = set()
        self._home: dict[str, str] = {}  # node key -> Ray node id
        self._promised: set[str] = set()  # keys of nodes whose room is not reserved yet

    def num_on(self, node_id: str) -> int:
        """Number of the run's nodes on one Ray node."""
        return sum(home == node_id for home in self._home.values())

    def see(self, nodes: Iterable[RayNode]) -> tuple[str, ...]:
        """Update the live Ray nodes. Returns the ids of new ones that have room for a node."""
        self.update(nodes)
        # A Ray node that has not reported its resources yet counts as new later.
        known = (id for id, node in self._nodes.items() if node.free)
        fresh = tuple(sorted(id for id in known if id not in self._seen))
        self._seen.update(fresh)
        return tuple(id for id in fresh if self.room_on(id))

    def update(self, nodes: Iterable[RayNode]) -> None:
        """Replace the known Ray nodes by ``nodes``, all that live now."""
        self._nodes = {node.id: node for node in nodes}

    def drain(self, node_id: str) -> tuple[str, ...]:
        """Place nothing more on a Ray node that will go away.

        Returns:
            Keys of the run's nodes there, sorted; empty if the Ray node was draining already.
        """
        if node_id in self._draining:
            return ()
        self._draining.add(node_id)
        return tuple(sorted(key for key, home in self._home.items() if home == node_id))

    def room_on(self, node_id: str) -> int:
        """How many more nodes of the run fit on one Ray node now; 0 for an unknown one."""
        node = self._nodes.get(node_id)
        if node is None or node_id in self._draining or not self._fits_labels(node):
            return 0
        fit = min(
            (node.free.get(name, 0.0) / amount for name, amount in self._need.items()),
            default=math.inf,
        )
        whole = 10**6 if math.isinf(fit) else math.floor(fit + _SLACK)
        promised = sum(self._home[key] == node_id for key in self._promised)
        return max(0, whole - promised)

    def machines(self) -> tuple[Machine, ...]:
        """Every machine that has the labels and is not draining, with its current room."""
        return tuple(
            Machine(id=node.id, name=node.host, room=self.room_on(node.id))
            for node in self._nodes.values()
            if node.id not in self._draining and self._fits_labels(node)
        )

    def _fits_labels(self, node: RayNode) -> bool:
        return all(node.labels.get(name) == value for name, value in self._labels.items())

    def node(self, node_id: str) -> RayNode | None:
        """The live Ray node of this id; None if there is none."""
        return self._nodes.get(node_id)

    def home(self, key: str) -> str:
        """Id of the Ray node that a node of the run is on.

        Raises:
            StartupError: The node has been closed in the meantime.
        """
        if key not in self._home:
            raise StartupError(f"{key} was given up")
        return self._home[key]

    def promise(self, key: str, node_id: str) -> None:
        """Count room on a Ray node as used by ``key`` until the resources are reserved."""
        self._home[key] = node_id
        self._promised.add(key)

    def reserved(self, key: str) -> None:
        """Note that the node holds its resources, so that ``RayNode.free`` no longer has them."""
        self._promised.discard(key)

    def close(self, key: str) -> None:
        """Forget a node of the run and free its room."""
        self._home.pop(key, None)
        self._promised.discard(key)

    def shortage(self) -> str:
        """Message that says why no further node fits, with the numbers and what to change."""
        need = ", ".join(_amount(name, amount) for name, amount in self._need.items())
        lines = [f"a node needs {need}; the cluster has {self._listing()}"]
        if self._labels:
            labels = ", ".join(f"{k}={v}" for k, v in self._labels.items())
            lines.append(f"with the labels {labels} (cluster.node_labels)")
        lines.append("add Ray nodes, wait, or lower cluster.nodes or cluster.cpus_per_rank")
        return "; ".join(lines)

    def _listing(self) -> str:
        able = [node for node in self._nodes.values() if self._fits_labels(node)]
        if not able:
            return "no Ray node"
        kinds = Counter(
            ", ".join(_amount(name, node.free.get(name, 0.0)) for name in self._need)
            for node in able
        )
        return "; ".join(
            f"{count} Ray node{'s' if count > 1 else ''} with {text} free"
            for text, count in sorted(kinds.items())
        )


def _amount(name: str, amount: float) -> str:
    if name == "memory":
        return f"{bytes_text(int(amount))} of memory"
    text = f"{amount:g} {name}"
    return text if amount == 1 else f"{text}s"


def parse_bytes(text: str) -> float:
    """Convert a size such as "8GiB" or "500MB" to bytes.

    Raises:
        ConfigError: ``text`` is not a size.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?)(i?)B?\s*", text)
    if match is None or match[1].count(".") > 1 or not match[1].strip("."):
        raise ConfigError(f'cluster.memory_per_rank = "{text}" is no size; write it as "8GiB"')
    base = 1024 if match[3] else 1000
    return float(match[1]) * float(base ** " KMGT".index(match[2] or " "))

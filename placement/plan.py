"""The plan: the expert in every slot, each replica's share of tokens, and each expert's home rank.

Shapes: L layers, E experts, N nodes, R = N * ranks_per_node ranks, S slots per rank.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from placement.errors import InvalidRequestError
from placement.request import Bools, Floats, Ints

FORMAT = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """An immutable placement of the experts of all layers. Plans with equal digests are equal.

    Attributes:
        node_ids: Stable id of each node position, ascending.
        ranks_per_node: Rank r runs on node position ``r // ranks_per_node``.
        slots_per_node: Slots of one layer on a node, over all its ranks.
        num_experts: Experts per layer, E.
        expert_of_slot: int32 [L, R, S], read-only: the expert in each slot, ascending within a
            rank; empty slots are -1 and come last.
        share_of_slot: float64 [L, R, S]: fraction of the expert's tokens that this slot serves.
        home: int32 [L, E]: the rank that serves all tokens of the expert in home mode; it holds a
            replica.
        template: (node positions, width) of each block; see ``templates.template``. The same in
            every layer; empty if the plan has no template.
        block: int32 [L, E]: index of the expert's block in ``template``; every node of the block
            holds the expert. -1 without a template.
        floor: Fewest distinct nodes that hold any expert.
        requested_floor: ``min_replicas`` of the request.
        method: How the plan was found, in words.
        notes: Remarks for people, such as a lowered floor.
        fallback: Why a custom policy's plan was replaced by this one; empty if it was not.
    """

    node_ids: tuple[int, ...]
    ranks_per_node: int
    slots_per_node: int
    num_experts: int
    expert_of_slot: Ints
    share_of_slot: Floats
    home: Ints
    block: Ints
    template: tuple[tuple[tuple[int, ...], int], ...] = ()
    floor: int
    requested_floor: int
    method: str
    notes: tuple[str, ...] = ()
    fallback: str = ""

    def __post_init__(self) -> None:
        for array in (self.expert_of_slot, self.share_of_slot, self.home, self.block):
            array.setflags(write=False)

    @property
    def num_layers(self) -> int:
        """Number of MoE layers, L."""
        return int(self.expert_of_slot.shape[0])

    @property
    def num_nodes(self) -> int:
        """Number of nodes, N."""
        return len(self.node_ids)

    @property
    def num_ranks(self) -> int:
        """Number of ranks, R."""
        return int(self.expert_of_slot.shape[1])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the plan's content; ``method``, ``notes`` and ``fallback`` do not count."""
        head = [
            FORMAT, list(self.node_ids), self.ranks_per_node, self.slots_per_node,
            self.num_experts, list(self.expert_of_slot.shape), self.floor, self.requested_floor,
            [[list(nodes), width] for nodes, width in self.template],
        ]  # fmt: skip
        state = hashlib.sha256(json.dumps(head, separators=(",", ":")).encode())
        state.update(np.ascontiguousarray(self.expert_of_slot, dtype="<i4").tobytes())
        state.update(np.ascontiguousarray(self.share_of_slot, dtype="<f8").tobytes())
        state.update(np.ascontiguousarray(self.home, dtype="<i4").tobytes())
        state.update(np.ascontiguousarray(self.block, dtype="<i4").tobytes())
        return state.hexdigest()

    @cached_property
    def shares(self) -> Floats:
        """float64 [L, E, R]: share of each expert's tokens that each rank serves; R sums to 1."""
        dense = np.zeros((self.num_layers, self.num_experts, self.num_ranks))
        layer, rank, slot = np.nonzero(self.expert_of_slot >= 0)
        dense[layer, self.expert_of_slot[layer, rank, slot], rank] = self.share_of_slot[
            layer, rank, slot
        ]
        dense.setflags(write=False)
        return dense

    @cached_property
    def node_member(self) -> Bools:
        """bool [L, E, N]: whether the node holds a replica of the expert."""
        member = np.zeros((self.num_layers, self.num_experts, self.num_nodes), dtype=np.bool_)
        used = np.flatnonzero(self.expert_of_slot >= 0)
        row, expert = used // self.expert_of_slot.shape[2], self.expert_of_slot.reshape(-1)[used]
        layer, rank = np.divmod(row, self.num_ranks)
        member[layer, expert, rank // self.ranks_per_node] = True
        member.setflags(write=False)
        return member

    @cached_property
    def node_shares(self) -> Floats:
        """float64 [L, E, N]: share of each expert's tokens that each node serves."""
        shape = (self.num_layers, self.num_experts, self.num_nodes, self.ranks_per_node)
        summed: Floats = self.shares.reshape(shape).sum(3)
        return summed

    def loads_of_nodes(self, load_LE: Floats) -> Floats:
        """Return the tokens that each node serves, float64 [L, N], for loads [L, E]."""
        layer = np.arange(self.num_layers)[:, None, None]
        use = load_LE[layer, np.maximum(self.expert_of_slot, 0)] * self.share_of_slot
        loads: Floats = use.reshape(self.num_layers, self.num_nodes, -1).sum(2)
        return loads

    @cached_property
    def replicas(self) -> Ints:
        """int32 [L, E]: number of distinct nodes that hold each expert."""
        counts: Ints = self.node_member.sum(2, dtype=np.int32)
        return counts

    def ranks_of(self, layer: int, expert: int) -> tuple[int, ...]:
        """Return the ranks that hold ``expert`` in ``layer``, ascending."""
        held = (self.expert_of_slot[layer] == expert).any(1)
        return tuple(int(r) for r in np.nonzero(held)[0])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as a JSON-serializable dictionary; ``from_dict`` is the inverse."""
        return {
            "format": FORMAT,
            "node_ids": list(self.node_ids),
            "ranks_per_node": self.ranks_per_node,
            "slots_per_node": self.slots_per_node,
            "num_experts": self.num_experts,
            "expert_of_slot": self.expert_of_slot.tolist(),
            "share_of_slot": self.share_of_slot.tolist(),
            "home": self.home.tolist(),
            "block": self.block.tolist(),
            "template": [[list(nodes), width] for nodes, width in self.template],
            "floor": self.floor,
            "requested_floor": self.requested_floor,
            "method": self.method,
            "notes": list(self.notes),
            "fallback": self.fallback,
            "digest": self.digest,
        }

    def to_json(self) -> str:
        """Return ``to_dict()`` as JSON text."""
        return json.dumps(self.to_dict(), separators=(",", ":"))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Rebuild a plan from the dictionary that ``to_dict`` made.

        Raises:
            InvalidRequestError: Unknown format, a missing field, node ids that do not ascend, or a
                digest that does not match.
        """
        if data.get("format") != FORMAT:
            raise InvalidRequestError(f"plan format {data.get('format')!r}; this reads {FORMAT}")
        try:
            plan = cls(
                node_ids=tuple(int(i) for i in data["node_ids"]),
                ranks_per_node=int(data["ranks_per_node"]),
                slots_per_node=int(data["slots_per_node"]),
                num_experts=int(data["num_experts"]),
                expert_of_slot=np.array(data["expert_of_slot"], dtype=np.int32),
                share_of_slot=np.array(data["share_of_slot"], dtype=np.float64),
                home=np.array(data["home"], dtype=np.int32),
                block=np.array(data["block"], dtype=np.int32),
                template=tuple((tuple(nodes), int(width)) for nodes, width in data["template"]),
                floor=int(data["floor"]),
                requested_floor=int(data["requested_floor"]),
                method=str(data["method"]),
                notes=tuple(str(n) for n in data["notes"]),
                fallback=str(data.get("fallback", "")),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidRequestError(f"not a plan: {error!r}") from error
        if any(after <= before for before, after in pairwise(plan.node_ids)):
            raise InvalidRequestError(f"node_ids {list(plan.node_ids)[:16]} must ascend, each once")
        if plan.digest != data.get("digest", plan.digest):
            raise InvalidRequestError(
                f"plan digest {plan.digest[:12]} differs from the recorded "
                f"{str(data['digest'])[:12]}: the plan was altered"
            )
        return plan

    @classmethod
    def from_json(cls, text: str | Mapping[str, Any]) -> Plan:
        """Rebuild a plan from the text of ``to_json`` or the dictionary of ``to_dict``."""
        return cls.from_dict(json.loads(text) if isinstance(text, str) else text)

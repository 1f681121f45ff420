"""Bit-for-bit comparison of replicas, to detect silent corruption (invariant I17 of protocol.md).

Shapes: R ranks, N = 1 + layers * experts checksums: the dense state, then every expert.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dispatcher.exchange import Exchange
from lazarus.control.messages import Repaired, TensorSum
from lazarus.errors import LazarusError
from lazarus.runtime.state.checksums import checksum_of
from lazarus.runtime.state.replica import Replica

MOST_REPORTED = 16  # differences of one comparison that are recorded


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """The dense state (layer and expert -1) or one expert whose copies differ.

    ``odd`` are the ranks outvoted by a majority; without a majority, all ranks that hold a copy.
    """

    layer: int
    expert: int
    odd: tuple[int, ...]
    holders: tuple[int, ...]
    is_majority: bool

    def repaired(self, *, generation: int, step: int) -> Repaired:
        """Message to the controller that the odd copies now have the majority's bits."""
        return Repaired(
            generation=generation, step=step, layer=self.layer, expert=self.expert, ranks=self.odd
        )

    def to_json(self, *, step: int, nodes: Sequence[int]) -> str:
        """Fields of the recorded event, as JSON. ``nodes`` gives each rank's node."""
        name = "dense state" if self.layer < 0 else f"L{self.layer}/E{self.expert}"
        ranks = ", ".join(map(str, self.odd))
        verdict = f"differs on rank {ranks}" if self.is_majority else f"differs between {ranks}"
        fields: dict[str, Any] = {
            "layer": self.layer,
            "expert": self.expert,
            "what": f"{name} {verdict} after step {step}",
            "ranks": list(self.odd),
            "nodes": sorted({nodes[rank] for rank in self.odd}),
            "majority": self.is_majority,
        }
        return json.dumps(fields)


def checksums(replica: Replica, *, common: int) -> NDArray[np.int64]:
    """Checksums of the dense state and of every expert, int64 [N]; 0 for experts not held here.

    Args:
        replica: This rank's state.
        common: Checksum of the state that all ranks hold, which becomes entry 0.
    """
    sums = np.zeros(1 + len(replica.layers) * replica.num_experts, dtype=np.int64)
    sums[0] = common
    for layer, bank in enumerate(replica.banks):
        for expert in (e for e in bank.expert_of_slot if e >= 0):
            at = 1 + layer * replica.num_experts + expert
            sums[at] = replica.record_checksum(layer, expert)
    return sums


def tensor_sums(replica: Replica) -> tuple[TensorSum, ...]:
    """Name, type and checksum of each dense tensor of the model, as this rank has built it."""
    return tuple(
        TensorSum(
            name=name.removeprefix("model."),
            kind=f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}",
            sum=checksum_of([tensor]),
        )
        for name, tensor in replica.dense_tensors()
        if name.startswith("model.")
    )


def compare(replica: Replica, exchange: Exchange, *, common: int) -> list[Difference]:
    """Gather the checksums of all ranks; every rank finds the same differences."""
    own = torch.from_numpy(checksums(replica, common=common)).to(replica.device)
    gathered = torch.empty(exchange.size * own.numel(), dtype=torch.int64, device=replica.device)
    exchange.all_gather(gathered, own, label="digest")
    rows = gathered.cpu().view(exchange.size, own.numel()).numpy()
    return differences(rows, num_experts=replica.num_experts)


def differences(sums_RN: NDArray[np.int64], *, num_experts: int) -> list[Difference]:
    """Find the experts or dense state whose copies differ, and the ranks that are odd.

    Args:
        sums_RN: Checksums of every rank, int64 [R, N]; 0 where a rank holds no copy.
        num_experts: Experts of each layer.
    """
    highest = sums_RN.max(axis=0)
    lowest = np.where(sums_RN == 0, highest, sums_RN).min(axis=0)
    found = []
    for index in np.flatnonzero(lowest != highest).tolist():
        column = sums_RN[:, index].tolist()
        holders = tuple(rank for rank, value in enumerate(column) if value)
        (usual, votes), *_ = Counter(column[rank] for rank in holders).most_common(1)
        is_majority = 2 * votes > len(holders)
        layer, expert = divmod(index - 1, num_experts) if index else (-1, -1)
        found.append(
            Difference(
                layer=layer,
                expert=expert,
                odd=tuple(r for r in holders if not is_majority or column[r] != usual),
                holders=holders,
                is_majority=is_majority,
            )
        )
    return found


def require_equal(words: Mapping[str, str], exchange: Exchange, *, device: torch.device) -> None:
    """Check that all ranks have the same ``words`` before RESUME (rule 24 of docs/protocol.md).

    Args:
        words: What must be equal, by a name for the error message.
        exchange: The group of all ranks.
        device: Device of the tensors that are exchanged.

    Raises:
        LazarusError: Something differs; the message names it.
    """
    sums = [zlib.crc32(word.encode()) for word in words.values()]
    own = torch.tensor(sums, dtype=torch.int64, device=device)
    everybody = own.new_empty(len(words) * exchange.size)
    exchange.all_gather(everybody, own, label="digest")
    rows = everybody.cpu().view(exchange.size, len(words))
    same = (rows == rows[0]).all(0).tolist()
    if not all(same):
        wrong = [name for name, equal in zip(words, same, strict=True) if not equal]
        raise LazarusError(f"ranks disagree on {', '.join(wrong)} before RESUME")

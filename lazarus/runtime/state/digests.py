"""One rank's part of the state digest; every tensor's name is on exactly one rank."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lazarus.control.messages import DigestItem
from lazarus.runtime.state.flat_bytes import as_bytes
from lazarus.runtime.state.replica import Replica


def digest_items(
    replica: Replica, home_LE: NDArray[np.int32], rank: int, *, moved: Callable[[], None]
) -> tuple[DigestItem, ...]:
    """Digests of the experts whose home is this rank; on rank 0 also of the dense state.

    Args:
        replica: This rank's state.
        home_LE: Home rank of each expert, shape [layers, experts].
        rank: This rank.
        moved: Called after every tensor or expert to report progress: all may take minutes.
    """
    items: list[DigestItem] = []
    if rank == 0:
        for name, tensor in replica.dense_tensors():
            items.append(_item(name, tensor))
            moved()
        scalars = replica.scalars().encode()
        items.append(DigestItem(name="optimizer.scalars", sha256=hashlib.sha256(scalars).digest()))
        items.append(_item("load_history", torch.from_numpy(replica.history)))
    for layer in range(len(replica.layers)):
        for expert in range(replica.num_experts):
            if home_LE[layer, expert] == rank:
                items += [_item(n, t) for n, t in replica.expert_tensors(layer, expert)]
                moved()
    return tuple(items)


def _item(name: str, tensor: Tensor) -> DigestItem:
    """SHA-256 of name, dtype, shape and little-endian bytes."""
    head = f"{name}|{str(tensor.dtype).removeprefix('torch.')}|{tuple(tensor.shape)}|"
    digest = hashlib.sha256(head.encode())
    digest.update(as_bytes(tensor.contiguous()).cpu().numpy().data)
    return DigestItem(name=name, sha256=digest.digest())

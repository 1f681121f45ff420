"""Checks for what users plug in: each raises with the place where a promise is broken."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lazarus.data.stream import ShardIterator, StreamSource
from lazarus.errors import DataError


def check_stream(
    source: StreamSource, *, num_shards: int = 4, items: int = 64, tries: int = 8, seed: int = 0
) -> None:
    """Interrupt and resume each shard at random places; what follows must be what would have.

    Args:
        source: The stream.
        num_shards: Into how many shards it is cut for the check.
        items: Items of each shard that are looked at, at most.
        tries: Interruptions of each shard.
        seed: Of the random places.

    Raises:
        DataError: A shard reads differently the second time, its state is not made of JSON values
            and tensors, or what follows a resumed state is not what would have followed.
    """
    rng = random.Random(f"check_stream {seed}")
    for i in range(num_shards):
        straight = list(itertools.islice(source.shard(i, num_shards), items))
        again = list(itertools.islice(source.shard(i, num_shards), items))
        if not same(straight, again):
            raise DataError(f"shard {i} of {num_shards} reads differently the second time")
        for _ in range(tries):
            place = rng.randint(0, len(straight))
            state = _state_at(source.shard(i, num_shards), place, shard=i)
            resumed = source.shard(i, num_shards)
            resumed.load_state_dict(state)
            rest = list(itertools.islice(resumed, len(straight) - place))
            if not same(rest, straight[place:]):
                raise DataError(
                    f"shard {i} of {num_shards}, interrupted after {place} items and resumed from "
                    f"its state, goes on differently"
                )


def _state_at(iterator: ShardIterator, place: int, *, shard: int) -> Mapping[str, Any]:
    for _ in range(place):
        next(iterator)
    state = iterator.state_dict()
    if (wrong := _not_plain(state, "state")) is not None:
        raise DataError(f"shard {shard}: {wrong}; a state is made of JSON values and tensors")
    kept = copy.deepcopy(state)
    next(iterator, None)  # a state that is a live view of the iterator changes here
    if not same(kept, state):
        raise DataError(f"shard {shard}: its state changes after it was taken; return a copy")
    return kept


def same(one: Any, other: Any) -> bool:
    """Whether two nested values are equal, tensors and arrays bit for bit in value and type."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)


def _not_plain(value: Any, path: str) -> str | None:
    if value is None or isinstance(value, bool | int | float | str | torch.Tensor | np.ndarray):
        return None
    if isinstance(value, Mapping):
        inside: Sequence[tuple[str, Any]] = [(f"{path}[{k!r}]", v) for k, v in value.items()]
    elif isinstance(value, list | tuple):
        inside = [(f"{path}[{i}]", v) for i, v in enumerate(value)]
    else:
        return f"{path} is a {type(value).__name__}"
    return next((wrong for where, v in inside if (wrong := _not_plain(v, where))), None)

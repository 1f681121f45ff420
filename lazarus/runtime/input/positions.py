"""Positions in shards as JSON, for joining ranks and checkpoints. Decoding never runs code."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from lazarus.data.stream import Position
from lazarus.errors import DataError


def encoded_positions(positions: Mapping[int, Position]) -> dict[str, Any]:
    """Encode positions as JSON values; tensors and arrays become base64.

    Raises:
        DataError: A shard's state holds something other than JSON values, tensors and arrays.
    """
    return {
        str(shard): [p.consumed, p.state_at, p.passes, _encoded(p.state)]
        for shard, p in sorted(positions.items())
    }


def decoded_positions(text: Mapping[str, Any]) -> dict[int, Position]:
    """Decode what ``encoded_positions`` returned."""
    return {
        int(shard): Position(
            consumed=int(consumed),
            state_at=int(state_at),
            passes=int(passes),
            state=_decoded(state),
        )
        for shard, (consumed, state_at, passes, state) in text.items()
    }


_TENSOR, _ARRAY, _TUPLE = "__tensor__", "__array__", "__tuple__"


def _encoded(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return {_TENSOR: _encoded(value.detach().cpu().numpy())}
    if isinstance(value, np.ndarray):
        content = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return {_ARRAY: [value.dtype.str, list(value.shape), content]}
    if isinstance(value, Mapping):
        return {str(key): _encoded(inside) for key, inside in value.items()}
    if isinstance(value, tuple):
        return {_TUPLE: [_encoded(inside) for inside in value]}
    if isinstance(value, list):
        return [_encoded(inside) for inside in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise DataError(
        f"a shard's state holds a {type(value).__name__}; it is made of JSON values and tensors"
    )


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(inside) for inside in value]
    if not isinstance(value, Mapping):
        return value
    if _TENSOR in value:
        return torch.from_numpy(_decoded(value[_TENSOR]))
    if _ARRAY in value:
        dtype, shape, content = value[_ARRAY]
        flat = np.frombuffer(base64.b64decode(content), dtype=np.dtype(str(dtype)))
        return flat.reshape([int(n) for n in shape]).copy()
    if _TUPLE in value:
        return tuple(_decoded(inside) for inside in value[_TUPLE])
    return {key: _decoded(inside) for key, inside in value.items()}

"""Bytes that are nearly messages: real ones cut, flipped, filled with nonsense, or none at all."""

from __future__ import annotations

from random import Random

import msgspec

_VALUES = (None, True, -1, 1 << 63, 1.5, float("nan"), "", "x" * 10_000, b"", b"\xff" * 100, [], {})


def odd_bytes(rng: Random, good: bytes) -> bytes:
    """A mutation of a good message."""
    kind = rng.randrange(6)
    if kind == 0:
        return good[: rng.randrange(len(good) + 1)]
    if kind == 1:
        return rng.randbytes(rng.choice([0, 1, 10, 1000]))
    if kind == 2:
        flipped = bytearray(good)
        for _ in range(rng.randrange(1, 5)):
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if kind == 3:
        return b"\x91" * rng.choice([10, 100_000]) + good
    return msgspec.msgpack.encode(_bent(rng, msgspec.msgpack.decode(good)))


def _bent(rng: Random, value: object) -> object:
    """Plain data with one thing in it that is something else, missing, or there too often."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        name = rng.choice(sorted(value))
        changed = dict(value)
        if rng.random() < 0.2:
            del changed[name]
        else:
            changed[name] = _bent(rng, changed[name])
        return changed
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], _bent(rng, value[at]), *value[at:]]
    return rng.choice(_VALUES)

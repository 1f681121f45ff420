"""Damage to text files, drawn from a seed: flipped bits, cut and doubled parts, nasty values."""

from __future__ import annotations

from random import Random

_NASTY = (
    b"NaN", b"-Infinity", b"1e999", b"9" * 400, b"9" * 5000, b"[" * 3000, b'{"a":' * 3000,
    b"\xff\xfe", b"\x00", b'"\\ud800"', b"null", b"{}", b"[]", b"-1", b'""', b"1e308", b"true",
    b"\xe2\x80\xa8", b"0", b"18446744073709551616", b"'", b"\r", b"=", b"[[x]]",
)  # fmt: skip


def mutated(data: bytes, rng: Random) -> bytes:
    """The content after one to three blows."""
    for _ in range(rng.randint(1, 3)):
        data = rng.choice(_BLOWS)(data or b" ", rng)
    return data


def _flip(data: bytes, rng: Random) -> bytes:
    at, changed = rng.randrange(len(data)), bytearray(data)
    changed[at] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(data: bytes, rng: Random) -> bytes:
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:a] + data[b:]


def _end(data: bytes, rng: Random) -> bytes:
    return data[: rng.randrange(len(data))]


def _double(data: bytes, rng: Random) -> bytes:
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:b] + data[a:b] + data[b:]


def _insert(data: bytes, rng: Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice(_NASTY) + data[at:]


def _value(data: bytes, rng: Random) -> bytes:
    """Something else in place of a value of JSON, TOML or CSV."""
    starts = [i + 1 for i, byte in enumerate(data[:-1]) if byte in b":=,["]
    if not starts:
        return _insert(data, rng)
    start = rng.choice(starts)
    end = start
    while end < len(data) and data[end] not in b",]}\n":
        end += 1
    return data[:start] + rng.choice(_NASTY) + data[end:]


_BLOWS = (_flip, _cut, _end, _double, _insert, _value, _value)

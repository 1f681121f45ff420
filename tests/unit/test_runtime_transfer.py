"""Healing rounds over the loopback exchange: every piece arrives whole, or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dispatcher.exchange import Exchange
from dispatcher.loopback import LoopbackWorld
from lazarus.control.messages import Move, Prepare
from lazarus.errors import TransferError
from lazarus.runtime.healing import transfer
from lazarus.runtime.healing.transfer import TransferRun, dense_pieces, expert_pieces, rounds_of
from lazarus.runtime.state.flat_bytes import DenseImage

RECORD = 40


def loopback(size: int) -> list[Exchange]:
    world = LoopbackWorld(size, timeout_s=30)
    return [world.exchange(rank) for rank in range(size)]


def record(layer: int, expert: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * layer + expert)
    return torch.randint(0, 256, (RECORD,), dtype=torch.uint8, generator=generator)


def order(moves: Sequence[Move], *, step: int = 7, **dense: tuple[int, ...]) -> Prepare:
    return Prepare(
        generation=3, step=step, seats=(), feeders=(), plan="", moves=tuple(moves), **dense
    )


def image(seed: int) -> DenseImage:
    generator = torch.Generator().manual_seed(seed)
    return DenseImage(
        [
            torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
            for size in (5, 33, 0, 71)
        ]
    )


def feed_all(
    orders: Sequence[Prepare], exchanges: Sequence[Any], images: Sequence[DenseImage]
) -> list[TransferRun]:
    feeds = [
        TransferRun(
            prepare, exchange, read_record=record, dense=dense, record_bytes=lambda layer: RECORD
        )
        for prepare, exchange, dense in zip(orders, exchanges, images, strict=True)
    ]
    with ThreadPoolExecutor(len(feeds)) as pool:
        for done in [pool.submit(feed.run) for feed in feeds]:
            done.result(timeout=60)
    return feeds


def test_every_piece_arrives_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "ROUND_BYTES", 64)
    moves = [Move(layer=e % 2, expert=e, source=e % 3, target=3) for e in range(6)]
    moves += [Move(layer=0, expert=9, source=3, target=0)]
    images = [image(1), image(1), image(1), image(2)]
    prepare = order(moves, dense_sources=(0, 1, 2), dense_targets=(3,))
    feeds = feed_all([prepare] * 4, loopback(4), images)
    expected = {(e % 2, e): record(e % 2, e).tolist() for e in range(6)}
    assert {k: v.tolist() for k, v in feeds[3].staged.items()} == expected
    assert feeds[0].staged[(0, 9)].equal(record(0, 9))
    total = images[0].num_bytes
    assert images[3].read(0, total).equal(images[0].read(0, total))
    assert feeds[3].bytes_received == 6 * RECORD + total


class Flipped:
    """One bit of what this rank receives is wrong."""

    def __init__(self, inner: Exchange, at: int) -> None:
        self._inner, self._at = inner, at
        self.rank, self.size = inner.rank, inner.size

    def all_to_all(self, output: Tensor, input: Tensor, **more: Any) -> None:
        self._inner.all_to_all(output, input, **more)
        output[self._at] ^= 1


@pytest.mark.parametrize("at", [0, 8, 20, 40, 64, 64 + RECORD - 1])
def test_a_flipped_bit_anywhere_is_refused(at: int) -> None:
    exchanges = loopback(2)
    bad = [exchanges[0], Flipped(exchanges[1], at)]
    prepare = order([Move(layer=1, expert=4, source=0, target=1)])
    with pytest.raises(TransferError, match="L1/E4"):
        feed_all([prepare] * 2, bad, [image(1), image(1)])


def test_a_sender_at_another_step_is_refused() -> None:
    moves = [Move(layer=1, expert=4, source=0, target=1)]
    with pytest.raises(TransferError, match="step 7"):
        feed_all([order(moves, step=6), order(moves)], loopback(2), [image(1), image(1)])


@settings(max_examples=50)
@given(
    ends=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=40),
    num_bytes=st.integers(1, 50 << 20),
)
def test_rounds_keep_the_order_and_the_bound(ends: list[tuple[int, int]], num_bytes: int) -> None:
    moves = [Move(layer=0, expert=i, source=a, target=b) for i, (a, b) in enumerate(ends) if a != b]
    pieces = expert_pieces(moves, record_bytes=lambda layer: num_bytes)
    rounds = list(rounds_of(pieces))
    assert [p for r in rounds for p in r] == pieces
    for batch in rounds:
        for rank in range(5):
            sent = sum(p.num_bytes for p in batch if p.source == rank)
            assert sent <= max(transfer.ROUND_BYTES, num_bytes)


@settings(max_examples=50)
@given(num_bytes=st.integers(0, 200), sources=st.integers(1, 5), targets=st.integers(0, 3))
def test_dense_pieces_cover_the_image_once_for_each_target(
    num_bytes: int, sources: int, targets: int
) -> None:
    aims = range(sources, sources + targets)
    pieces = dense_pieces(range(sources), aims, num_bytes=num_bytes)
    for target in aims:
        mine = [p for p in pieces if p.target == target]
        covered = [i for p in mine for i in range(p.offset, p.offset + p.num_bytes)]
        assert sorted(covered) == list(range(num_bytes))

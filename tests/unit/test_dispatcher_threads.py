"""The exchange through shared memory between threads: the same code as between processes, quickly.

Blocks are made small, so that a few kilobytes go in many pieces. ``test_dispatcher_shared.py`` has
the same between real processes, and what happens when one of them dies.
"""

from __future__ import annotations

import gc
import os
import random
import socket
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dispatcher import (
    Exchange,
    LinkError,
    RanksPartedError,
    SharedExchange,
    run_ranks,
    shared_zeros,
    within_machine,
)
from dispatcher.local import blocks, shared
from dispatcher.local.blocks import BlockPool, aligned, standing
from dispatcher.local.links import INLINE_BYTES, Door, Link, Message

SMALL_BLOCK = 1 << 14


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "STAGE_BYTES", SMALL_BLOCK)
    monkeypatch.setattr(shared, "_ONE_PHASE_BYTES", 1 << 11)
    monkeypatch.setattr(shared, "_CHUNK", 100)
    monkeypatch.setattr(blocks, "_LEAST", 1 << 12)


def shared_of(exchange: Exchange) -> SharedExchange:
    found = within_machine(exchange, timeout_s=20)
    assert isinstance(found, SharedExchange)
    return found


def numbers(count: int, *, seed: int) -> Tensor:
    return torch.randint(0, 99, (count,), generator=torch.Generator().manual_seed(seed)) / 7


def stood(tensor: Tensor) -> Tensor:
    where = shared_zeros(tensor.shape, tensor.dtype)
    where.copy_(tensor)
    return where


@pytest.mark.parametrize("size", [2, 3, 4])
def test_rows_of_any_number_arrive_whole_and_in_order(size: int) -> None:
    def body(exchange: Exchange) -> int:
        via, common, own = shared_of(exchange), random.Random(size), random.Random(exchange.rank)
        for turn in range(25):
            rows = [[common.choice([0, 1, 40, 300, 1300]) for _ in range(size)]
                    for _ in range(size)]  # fmt: skip
            if turn == 0:
                rows = [[0] * size for _ in range(size)]
            parts = [[numbers(5 * n, seed=97 * turn + 10 * i + j).view(n, 5)
                      for j, n in enumerate(row)] for i, row in enumerate(rows)]  # fmt: skip
            sent = torch.cat(parts[via.rank])
            sent = stood(sent) if own.random() < 0.4 else sent
            got = torch.full((sum(row[via.rank] for row in rows), 5), torch.nan)
            via.all_to_all(
                got, sent, output_splits=[row[via.rank] for row in rows],
                input_splits=rows[via.rank], label="dispatch",
            )  # fmt: skip
            sent.zero_()  # a peer that still read it would see zeros
            assert torch.equal(got, torch.cat([row[via.rank] for row in parts]))
        held = via.staged_bytes
        via.close()
        assert via.staged_bytes == 0
        return held

    # Two blocks for pieces, and smaller ones for what goes at once.
    assert max(run_ranks(body, size=size, timeout_s=30)) <= 8 * SMALL_BLOCK


@pytest.mark.parametrize("size", [2, 3, 5])
def test_sums_run_in_rank_order_whatever_their_size(size: int) -> None:
    def body(exchange: Exchange) -> None:
        via, own = shared_of(exchange), random.Random(exchange.rank)
        for turn, count in enumerate([0, 1, 16, 511, 512, 513, 5000, 16 * size * 30, 9999, 7]):
            terms = [numbers(count, seed=turn + 50 * i) for i in range(size)]
            mine = terms[via.rank].clone()
            mine = stood(mine) if own.random() < 0.5 else mine
            under_way = via.start_all_reduce(mine, label="dense_grad")
            gathered = torch.empty(size, count)
            via.all_gather(gathered, terms[via.rank], label="digest")
            assert torch.equal(gathered, torch.stack(terms))
            under_way.wait()
            expected = terms[0].clone()
            for term in terms[1:]:
                expected += term
            assert torch.equal(mine, expected)
            mine.zero_()
        half = torch.full((3000,), 0.1, dtype=torch.bfloat16)
        via.all_reduce(half, label="dense_grad")
        total = torch.full((1,), 0.1, dtype=torch.bfloat16)
        for _ in range(size - 1):
            total = total + torch.full((1,), 0.1, dtype=torch.bfloat16)
        assert torch.equal(half, total.expand(3000))
        via.close()

    run_ranks(body, size=size, timeout_s=30)


def test_memory_is_used_again_and_no_sooner_than_all_have_read_it() -> None:
    def body(exchange: Exchange) -> list[int]:
        via = shared_of(exchange)
        held = []
        for turn in range(12):
            for count in (2000, 700):
                gathered = torch.empty(3, count)
                mine = numbers(count, seed=turn + 9 * via.rank)
                via.all_gather(gathered, mine, label="digest")
                assert torch.equal(gathered[2], numbers(count, seed=turn + 18))
            held.append(via.staged_bytes)
        via.close()
        return held

    for held in run_ranks(body, size=3, timeout_s=30):
        assert held[-1] == held[3] <= 3 * (1 << 13) + 3 * (1 << 12)


def test_a_pool_gives_the_smallest_block_that_is_free_and_fits() -> None:
    pool = BlockPool()
    large = pool.take(9000, ended_everywhere=0)
    large.busy_until = 1
    small = pool.take(5000, ended_everywhere=0)
    assert (large.size, small.size) == (1 << 14, 1 << 13)
    large.busy_until = small.busy_until = 0
    assert pool.take(1 << 13, ended_everywhere=0) is small
    assert pool.take((1 << 13) + 1, ended_everywhere=0) is large
    small.busy_until = 5
    assert pool.take(10, ended_everywhere=4) is large
    assert pool.take(10, ended_everywhere=5) is small
    assert pool.take(1, ended_everywhere=9) is small and len(pool.blocks) == 2
    assert pool.take(1 << 15, ended_everywhere=9).size == 1 << 15
    least = BlockPool().take(1, ended_everywhere=0)
    assert least.size == 1 << 12
    least.close()
    assert least.fd == -1
    least.close()  # no descriptor of somebody else is closed
    pool.close()
    assert pool.blocks == [] and large.fd == -1


def test_parts_of_blocks_start_on_lines_and_parts_of_buffers_are_found() -> None:
    assert [aligned(n) for n in (0, 1, 64, 65)] == [0, 64, 64, 128]
    buffer = shared_zeros((64,), torch.uint8)
    found = standing(buffer)
    assert found is not None and found[1] == 0 and found[0].size == 64
    last = standing(buffer[63:])
    assert last is not None and last == (found[0], 63)
    block = found[0]
    inside = torch.empty(0, dtype=torch.uint8).set_(  # type: ignore[call-overload]
        buffer.untyped_storage(), 60, (4,), (1,)
    )
    assert standing(inside) == (block, 60)
    assert standing(torch.zeros(8, dtype=torch.uint8)) is None
    assert shared_zeros((0, 3)).shape == (0, 3) and standing(shared_zeros((0,))) is None
    assert not shared_zeros((5, 7), torch.float64).any()
    number, address = block.fd, buffer.data_ptr()
    os.fstat(number)
    del buffer, found, last, inside
    gc.collect()
    assert block.fd == -1 and address not in blocks._standing


def test_slices_of_a_sum_are_whole_lines_and_cover_it() -> None:
    for numel, size in ((0, 3), (1, 3), (48, 3), (49, 3), (1000, 4)):
        slices = shared._slices(numel, size)
        assert slices[0][0] == 0 and slices[-1][1] == numel
        assert all(a[1] == b[0] and a[1] % 16 in (0, numel % 16) for a, b in pairwise(slices))
        assert max(end - begin for begin, end in slices) <= -(-numel // (16 * size)) * 16


def disagreeing(exchange: Exchange, kind: str) -> tuple[str, str, SharedExchange]:
    """Rank 1 does something else than the others; says what it met, then and at its next call.

    The exchange is returned so that it lives on: to close it early would be another way to fail.
    """
    via, odd = shared_of(exchange), exchange.rank == 1
    ones = torch.ones(6)

    def all_to_all(splits: list[int], wanted: list[int], label: str = "dispatch") -> None:
        via.all_to_all(torch.empty(6), ones, output_splits=wanted, input_splits=splits, label=label)

    even = [2, 2, 2]
    try:
        if kind == "label":
            via.all_reduce(ones, label="layer 2" if odd else "layer 1")
        elif kind == "size":
            all_to_all([3, 2, 1] if odd else even, even)
        elif kind == "own size":
            all_to_all([2, 3, 1] if odd else even, even)
        elif kind == "sum":
            via.all_reduce(torch.ones(7 if odd else 6), label="commit")
        via.all_reduce(ones, label="commit")
        said = "nothing"
    except LinkError as problem:
        said = f"{type(problem).__name__}: {problem}"
    try:
        via.all_reduce(ones, label="commit")
        again = "nothing"
    except LinkError as problem:
        again = f"{type(problem).__name__}: {problem}"
    return said, again, via


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("label", "is at layer 1"),
        ("size", "exchange with rank 1 failed: it sends"),
        ("own size", "exchange with rank 1 failed: it sends"),
        ("sum", "bytes for 'commit'"),
    ],
)
def test_ranks_that_disagree_all_stop_for_one_reason(kind: str, text: str) -> None:
    met = run_ranks(lambda e: disagreeing(e, kind), size=3, timeout_s=30)
    for said, again, _ in met:
        assert "LinkError" in said and again == said
        # Whoever finds out tells the others; of sizes, its own link may break before that.
        assert ("PartedLinkError" in said) == (kind == "label")
    assert any(text in said for said, _, _ in met)
    for _, _, via in met:
        via.close()


def test_an_abort_ends_the_waits_of_all_and_every_later_call() -> None:
    def body(exchange: Exchange) -> tuple[list[str], SharedExchange]:
        via = shared_of(exchange)
        said: list[str] = []
        for _ in range(2):
            try:
                if exchange.rank == 0:
                    via.abort()
                via.all_reduce(torch.ones(4), label="commit")
            except LinkError as problem:
                said.append(str(problem))
        return said, via

    (first, _), (second, _), (third, _) = run_ranks(body, size=3, timeout_s=30)
    assert first == ["exchange with rank -1 failed: aborted"] * 2
    for said in (second, third):
        assert len(said) == 2 and said[0] == said[1] and "exchange with rank" in said[0]


def test_one_rank_alone_and_odd_tensors_need_no_peer() -> None:
    alone = run_ranks(lambda e: within_machine(e), size=1)[0]
    assert not isinstance(alone, SharedExchange)
    via = SharedExchange(0, 1)
    ones = torch.ones(4)
    via.start_all_reduce(ones, label="commit").wait()
    assert ones.tolist() == [1.0] * 4
    for odd, text in ((torch.ones(4, 4).t(), "contiguous"), (torch.ones(4, device="meta"), "meta")):
        with pytest.raises(ValueError, match=text):
            via.all_reduce(odd, label="commit")
    with pytest.raises(ValueError, match=r"splits \[3\] for 4 rows"):
        via.all_to_all(ones, torch.ones(4), output_splits=[4], input_splits=[3], label="dispatch")
    with pytest.raises(ValueError, match="make room for all"):
        via.all_gather(torch.empty(5), ones, label="digest")


def test_messages_that_come_early_are_kept_and_a_silent_peer_has_a_limit() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    near, far = Link(1, ours), Link(0, theirs)

    def message(number: int, phase: int, text: bytes = b"") -> None:
        sent = Message(number, number - 1, b"x" * 64, phase, -1, 0, len(text), len(text), 0,
                       False, text)  # fmt: skip
        far.send(sent, None)

    message(2, 0, b"second")
    message(1, 3)
    message(1, 0, b"first" * 800)
    assert near.receive(1, 0).content == b"first" * 800
    assert near.ended == 1
    assert near.receive(2, 0).content == b"second" and near.receive(1, 3).size == 0
    assert not near.early and INLINE_BYTES >= 4000
    ours.settimeout(0.05)
    with pytest.raises(LinkError, match="rank 1 failed: it was silent for the time limit"):
        near.receive(3, 0)
    far.part(LinkError(peer=7, reason="its disk is full"))
    with pytest.raises(LinkError, match="rank 7 failed: its disk is full") as told:
        near.receive(3, 0)
    assert told.value.peer == 7
    far.close()
    with pytest.raises(LinkError, match="rank 1 failed"):
        near.receive(3, 0)
    near.close()


def test_a_rank_that_gives_up_because_of_its_peer_says_nothing_to_it() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    near, far = Link(1, ours), Link(0, theirs)
    far.part(LinkError(peer=0, reason="it left"))
    with pytest.raises(LinkError, match="rank 1 failed: it left or died"):
        near.receive(1, 0)
    near.close()
    far.close()


def test_a_door_that_nobody_comes_through_closes_and_names_the_first_who_is_missing() -> None:
    door = Door()
    kept: list[Link] = []
    with pytest.raises(LinkError) as caught:
        door.links([door.name] * 3, rank=0, timeout_s=0.05, kept=kept.append)
    assert caught.value.peer == 1 and kept == []


def test_parted_ranks_raise_what_callers_of_any_exchange_catch() -> None:
    def body(exchange: Exchange) -> tuple[str, SharedExchange]:
        via = shared_of(exchange)
        with pytest.raises(RanksPartedError) as caught:
            via.all_reduce(torch.ones(2), label=f"layer {exchange.rank}")
        return str(caught.value), via

    assert {said for said, _ in run_ranks(body, size=2, timeout_s=30)} <= {
        "ranks do not run the same layers: rank 0 is at layer 0; rank 1 is at layer 1",
        "ranks do not run the same layers: rank 1 is at layer 1; rank 0 is at layer 0",
    }

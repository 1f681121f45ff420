"""The exchange through shared memory: exact, no hang, and nothing left over."""

from __future__ import annotations

import gc
import os
import random
import socket
import struct
import threading
import time
from contextlib import suppress

import pytest
import torch
from torch import Tensor

import dispatcher.local.wire
from dispatcher import (
    Exchange,
    LinkError,
    RanksPartedError,
    SharedExchange,
    shared_zeros,
    within_machine,
)
from dispatcher.local.blocks import standing
from dispatcher.local.links import Door, Link, is_own
from dispatcher.local.shared import STAGE_BYTES
from dispatcher.processes import run_processes

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.uint8)


def shared(exchange: Exchange) -> SharedExchange:
    found = within_machine(exchange, timeout_s=60)
    assert isinstance(found, SharedExchange)
    return found


def placed(tensor: Tensor, *, stand: bool) -> Tensor:
    """The same content, where peers can read it if it is to stand."""
    if not stand:
        return tensor
    where = shared_zeros(tensor.shape, tensor.dtype)
    where.copy_(tensor)
    return where


def drawn(shape: tuple[int, ...], dtype: torch.dtype, *, seed: int) -> Tensor:
    values = torch.randint(0, 99, shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype) / 7 if dtype.is_floating_point else values.to(dtype)


def many_collectives(gloo: Exchange, seed: int) -> int:
    """Sums in flight beside all-to-alls, buffers reused and overwritten at once."""
    via = shared(gloo)
    common, own = random.Random(seed), random.Random(via.rank)
    for turn in range(40):
        dtype = common.choice(DTYPES)
        width = common.choice([1, 3, 64])
        rows = [
            [common.choice([0, 0, 1, 7, 300]) for _ in range(via.size)] for _ in range(via.size)
        ]
        parts = [
            [drawn((n, width), dtype, seed=1000 * turn + 10 * i + j) for j, n in enumerate(row)]
            for i, row in enumerate(rows)
        ]
        numel = common.choice([0, 1, 5, 1000, 70_000, 200_001])
        terms = [drawn((numel,), torch.float32, seed=turn + 77 * i) for i in range(via.size)]
        summed = placed(terms[via.rank].clone(), stand=own.random() < 0.5)
        under_way = via.start_all_reduce(summed, label="dense_grad")
        sent = placed(torch.cat(parts[via.rank]), stand=own.random() < 0.5)
        got = torch.empty(sum(r[via.rank] for r in rows), width, dtype=dtype)
        via.all_to_all(
            got, sent, output_splits=[r[via.rank] for r in rows], input_splits=rows[via.rank],
            label="dispatch",
        )  # fmt: skip
        sent.zero_()  # a peer that still read it would see zeros
        assert torch.equal(got, torch.cat([p[via.rank] for p in parts]))
        under_way.wait()
        expected = terms[0].clone()
        for term in terms[1:]:
            expected += term
        assert torch.equal(summed, expected)  # equal bits: the sum runs in rank order
        summed.zero_()
        gathered = torch.empty(via.size * numel)
        via.all_gather(gathered, terms[via.rank], label="digest")
        assert torch.equal(gathered, torch.cat(terms))
    return via.staged_bytes


def in_pieces(gloo: Exchange) -> int:
    """More than fits a block, unevenly: rank 0 gets most, and nobody sends to the last."""
    via = shared(gloo)
    rows = [[9000 + 700 * i, 300 * i] + [0] * (via.size - 2) for i in range(via.size)]
    parts = [[drawn((n, 300), torch.float32, seed=i) for n in row] for i, row in enumerate(rows)]
    for _ in range(2):
        got = torch.empty(sum(row[via.rank] for row in rows), 300)
        via.all_to_all(
            got, torch.cat(parts[via.rank]), output_splits=[row[via.rank] for row in rows],
            input_splits=rows[via.rank], label="dispatch",
        )  # fmt: skip
        assert torch.equal(got, torch.cat([part[via.rank] for part in parts]))
    return via.staged_bytes


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_what_is_larger_than_a_block_goes_in_pieces_through_two(ranks: int) -> None:
    assert max(run_processes(in_pieces, size=ranks)) <= 2 * STAGE_BYTES


@pytest.mark.parametrize("ranks", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 7))])
def test_collectives_are_exact_and_their_memory_is_used_again(ranks: int) -> None:
    for held in run_processes(many_collectives, size=ranks, args=(ranks,)):
        assert held < 12 << 20  # the largest message is 0.8 MB; 40 turns would hold over 60


def waits_for_the_dead(gloo: Exchange) -> tuple[str, float]:
    via = shared(gloo)
    if via.rank == 1:
        via.close()
        return "", 0.0
    begin = time.monotonic()
    with pytest.raises(LinkError) as caught:
        via.all_reduce(torch.ones(4), label="commit")
    return str(caught.value), time.monotonic() - begin


def test_who_waits_for_a_rank_that_left_is_told() -> None:
    for rank, (said, spent) in enumerate(run_processes(waits_for_the_dead, size=3)):
        if rank != 1:
            assert "rank 1 failed" in said
            assert spent < 50  # the time limit is 60


def leaves_one_first(gloo: Exchange, first: int) -> str:
    """Rank 1 leaves rank ``first``, and the others when that one has given up."""
    via = shared(gloo)
    if via.rank == 1:
        left = via._wire._links[first].socket
        left.shutdown(socket.SHUT_WR)
        while left.recv(9999):
            continue
        via.close()
        return ""
    with pytest.raises(LinkError) as caught:
        even(via)
    with pytest.raises(LinkError, match="rank 1 failed"):
        via.all_reduce(torch.ones(1), label="commit")
    return str(caught.value)


@pytest.mark.parametrize("first", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 3))])
def test_who_waits_for_a_rank_that_gave_up_is_told_for_whom(first: int) -> None:
    for rank, said in enumerate(run_processes(leaves_one_first, size=4, args=(first,))):
        if rank != 1:
            assert "rank 1 failed" in said
            assert "silent" not in said


def even(via: Exchange, *, splits: list[int] | None = None) -> None:
    """An all-to-all of two floats for each, unless this rank says otherwise."""
    parts = [2] * via.size
    via.all_to_all(
        torch.empty(2 * via.size), torch.ones(2 * via.size), output_splits=parts,
        input_splits=splits or parts, label="dispatch",
    )  # fmt: skip


def freed(gloo: Exchange) -> None:
    via = shared(gloo)
    if via.rank == 0:  # it never comes; 1 and 2 wait for it
        threading.Thread(target=via.abort).start()
    else:
        with pytest.raises(LinkError):
            even(via)
    via.abort()
    with pytest.raises(LinkError, match="aborted"):
        via.all_reduce(torch.ones(1), label="commit")


def test_abort_from_another_thread_ends_the_wait_everywhere() -> None:
    assert len(run_processes(freed, size=3)) == 3


def other_sizes(via: Exchange) -> None:
    even(via, splits=[1, 3] if via.rank == 0 else None)
    via.all_reduce(torch.ones(1), label="commit")


def other_label(via: Exchange) -> None:
    via.all_reduce(torch.ones(4), label="commit" if via.rank == 0 else "dense_grad")


def disagree(gloo: Exchange, kind: str) -> str:
    via = shared(gloo)
    with pytest.raises(LinkError) as caught:
        {"size": other_sizes, "label": other_label}[kind](via)
    via.abort()
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("size", "bytes for 'dispatch'"),
        ("label", "rank 0 is at commit; rank 1 is at dense_grad"),
    ],
)
def test_ranks_that_disagree_get_an_error_instead_of_wrong_numbers(kind: str, message: str) -> None:
    said = run_processes(disagree, size=2, args=(kind,))
    assert any(message in text for text in said)


def part_ways(gloo: Exchange, odd: int) -> tuple[str, str, str]:
    """Rank ``odd`` skips a layer; what the others do then is the same on all of them."""
    via = shared(gloo)
    first, *_ = labels = ["layer 2", "layer 3"] if via.rank == odd else ["layer 1", "layer 2"]
    with pytest.raises(RanksPartedError) as caught:
        via.all_reduce(torch.ones(4), label=first)
    with pytest.raises(RanksPartedError) as again:
        via.all_reduce(torch.ones(4), label=labels[1])
    via.abort()
    return type(caught.value).__name__, str(caught.value), str(again.value)


@pytest.mark.parametrize("odd", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 2))])
def test_ranks_that_part_ways_all_hear_of_both_sides(odd: int) -> None:
    for kind, text, again in run_processes(part_ways, size=3, args=(odd,)):
        assert kind == "PartedLinkError" and text == again
        assert f"rank {odd} is at layer 2" in text and "is at layer 1" in text


def forbidden(*_: object) -> int:
    raise PermissionError("not in this sandbox")


def elsewhere(gloo: Exchange, why: str) -> bool:
    if gloo.rank == 1 and why == "machine":
        dispatcher.local.wire.machine = lambda: "another machine"
    if gloo.rank == 1 and why == "sandbox":
        os.memfd_create = forbidden
    kept = within_machine(gloo) is gloo
    gloo.all_reduce(torch.ones(1), label="commit")
    return kept


@pytest.mark.parametrize("why", ["machine", "sandbox"])
def test_ranks_that_cannot_share_memory_all_keep_the_exchange_they_have(why: str) -> None:
    assert run_processes(elsewhere, size=3, args=(why,)) == [True] * 3


def identity(fd: int) -> tuple[int, int]:
    """What no other open file has, whatever its descriptor's number."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def open_files() -> set[tuple[int, int]]:
    """All open files of this process. Other tests' files may close at any time."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found.add(identity(int(name)))
    return found


def test_a_standing_buffer_is_found_by_its_parts_and_goes_with_its_last_view() -> None:
    buffer = shared_zeros((3, 5))
    part = buffer[1]
    found = standing(part.view(torch.uint8))
    assert found is not None
    assert found[1] == 20
    file = identity(found[0].fd)
    assert file in open_files()
    assert standing(torch.zeros(5).view(torch.uint8)) is None
    del buffer, found
    gc.collect()
    assert standing(part.view(torch.uint8)) is not None
    address = part.data_ptr()
    del part
    gc.collect()
    assert file not in open_files()
    assert address not in dispatcher.local.blocks._standing


def test_a_buffer_is_forgotten_before_its_memory_is_given_back() -> None:
    """Threads that make and drop buffers get each other's addresses: none finds an old block."""
    wrong: list[str] = []

    def come_and_go() -> None:
        for _ in range(3000):
            buffer = shared_zeros((40_000,))
            block, at = standing(buffer.view(torch.uint8)) or (None, -1)
            if block is None or block.fd < 0 or at != 0:
                wrong.append(f"{block}, {at}")

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_stranger_at_the_door_is_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    door, other = Door(), Door()
    stranger, peer = (socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2))
    for caller in (stranger, peer):
        caller.connect(b"\0" + door.name)
        caller.send(struct.pack("i", 1))
    assert is_own(peer)
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 12345)
        assert not is_own(peer)
    verdicts = iter([False, True])
    monkeypatch.setattr(dispatcher.local.links, "is_own", lambda _: next(verdicts))
    kept: list[Link] = []
    door.links([door.name, other.name], rank=0, timeout_s=20, kept=kept.append)
    assert [link.peer for link in kept] == [1]
    with pytest.raises(ConnectionResetError):
        stranger.recv(1)
    kept[0].socket.send(b"x")
    assert peer.recv(1) == b"x"


@pytest.mark.parametrize(
    ("tensor", "message"),
    [(torch.ones(4, 4).t(), "contiguous"), (torch.empty(2, device="meta"), "meta")],
)
def test_what_cannot_be_sent_is_refused(tensor: Tensor, message: str) -> None:
    via = SharedExchange(0, 2)
    with pytest.raises(ValueError, match=message):
        via.all_reduce(tensor, label="commit")

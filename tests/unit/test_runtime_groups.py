"""Groups that are released from outside: real processes, a stopped peer, and nothing left over."""

from __future__ import annotations

import os
import queue
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from group_ranks import RankProcess
from store_door import StoreDoor

from lazarus.runtime.comm import groups
from lazarus.runtime.controller.rendezvous import RendezvousStore, listen

SIZE = 3


@pytest.fixture(scope="module")
def store() -> RendezvousStore:
    return RendezvousStore("127.0.0.1", timeout_s=60).open()


@pytest.fixture
def ranks() -> Iterator[list[RankProcess]]:
    made = [RankProcess() for _ in range(SIZE)]
    yield made
    for rank in made:
        rank.end()


GENERATIONS = iter(range(1, 10_000))


def build(ranks: list[RankProcess], store: RendezvousStore, *, shared: bool = False) -> int:
    generation = next(GENERATIONS)
    for index, rank in enumerate(ranks):
        rank.tell(
            "build",
            store=store.address,
            generation=generation,
            rank=index,
            size=len(ranks),
            answer=True,
            shared=shared,
        )
    assert [rank.answer() for rank in ranks] == ["done"] * len(ranks)
    return generation


def collective(ranks: list[RankProcess], kind: str) -> None:
    for rank in ranks:
        rank.tell("collective", kind=kind)


def finish(ranks: list[RankProcess]) -> list[str]:
    for rank in ranks:
        rank.tell("join")
    return [rank.answer() for rank in ranks]


@pytest.mark.parametrize("shared", [False, True], ids=["gloo", "shared memory"])
@pytest.mark.parametrize("kind", ["all_reduce", "all_to_all"])
def test_a_rank_in_a_collective_with_a_stopped_peer_is_freed_at_once(
    ranks: list[RankProcess], store: RendezvousStore, kind: str, shared: bool
) -> None:
    build(ranks, store, shared=shared)
    collective(ranks, kind)
    assert finish(ranks) == ["done"] * SIZE
    *living, stopped = ranks
    assert stopped.process.pid is not None
    os.kill(stopped.process.pid, signal.SIGSTOP)
    collective(living, kind)
    for rank in living:
        rank.tell("release")
    for rank in living:
        outcome, took_s = rank.answer()
        wanted = "LinkError" if shared else "RuntimeError"
        assert outcome == wanted, "the collective must have raised, not ended or hung"
        assert took_s < 2.0
    for rank in living:
        rank.tell("close")
        assert rank.answer() == "closed"
    build(living, store, shared=shared)
    collective(living, kind)
    assert finish(living) == ["done"] * len(living)


def test_a_rank_that_waits_for_a_group_that_never_gets_whole_is_freed_at_once(
    ranks: list[RankProcess], store: RendezvousStore
) -> None:
    generation = next(GENERATIONS)
    *there, _ = ranks
    for index, rank in enumerate(there):
        rank.tell(
            "build",
            store=store.address,
            generation=generation,
            rank=index,
            size=SIZE,
            answer=False,
        )
    for rank in there:
        rank.tell("release")
    for rank in there:
        outcome, took_s = rank.answer()
        assert outcome in ("FencedError", "RuntimeError", "DistNetworkError", "DistStoreError")
        assert took_s < 3.0
    for rank in there:
        rank.tell("close")
        assert rank.answer() == "closed"
    build(ranks, store)


def test_a_store_that_is_gone_is_an_error_of_its_own_within_the_bound(
    ranks: list[RankProcess],
) -> None:
    first, *_ = ranks
    again = {"generation": 1, "rank": 0, "size": 2, "answer": True}
    first.tell("build", store="127.0.0.1:1", connect_s=0.5, **again)
    assert first.answer() == "StoreUnreachableError"


@pytest.mark.parametrize(
    ("drops", "stalls"), [(2, 0), (0, 2), (1, 1)], ids=["refused", "slow", "both"]
)
def test_connections_to_the_store_are_tried_again(
    ranks: list[RankProcess], store: RendezvousStore, drops: int, stalls: int
) -> None:
    """A8: the first connections are refused, or nobody answers them."""
    door = StoreDoor(store.address, drops=drops, stalls=stalls)
    generation = next(GENERATIONS)
    for index, rank in enumerate(ranks):
        place = door.address if index == 1 else store.address
        again = {"generation": generation, "rank": index, "size": SIZE, "answer": True}
        rank.tell("build", store=place, **again)
    assert [rank.answer() for rank in ranks] == ["done"] * SIZE
    assert (door.dropped, door.stalled) == (drops, stalls) and door.forwarded >= 1
    collective(ranks, "all_to_all")
    assert finish(ranks) == ["done"] * SIZE
    door.close()


def test_release_spares_what_another_thread_opened_while_the_group_was_built(
    ranks: list[RankProcess], store: RendezvousStore
) -> None:
    """E5: a client of user code connects while the ranks are still meeting."""
    generation = next(GENERATIONS)
    first, *others = ranks
    first.tell("build", store=store.address, generation=generation, rank=0, size=SIZE, answer=False)
    first.tell("reach_gloo")
    assert first.answer() == "in gloo"
    first.tell("open_own_socket")
    assert first.answer() == "open"
    for index, rank in enumerate(others, 1):
        again = {"generation": generation, "rank": index, "size": SIZE, "answer": True}
        rank.tell("build", store=store.address, **again)
    assert finish([first]) == ["done"] and [r.answer() for r in others] == ["done"] * len(others)
    collective(ranks, "all_reduce")
    assert finish(ranks) == ["done"] * SIZE
    assert others[-1].process.pid is not None
    os.kill(others[-1].process.pid, signal.SIGSTOP)
    collective(ranks[:-1], "all_reduce")
    first.tell("release")
    outcome, _ = first.answer()
    assert outcome == "RuntimeError", "the fence must have freed the collective"
    first.tell("own_socket_works")
    assert first.answer() is True


def test_a_store_that_does_not_answer_any_more_keeps_nobody(ranks: list[RankProcess]) -> None:
    """The client of a controller that dies right then tries on for itself."""
    first, *_ = ranks
    with listen("127.0.0.1") as deaf:
        port = deaf.getsockname()[1]
        first.tell("build", store=f"127.0.0.1:{port}", generation=1, rank=0, size=2, answer=False)
        for _ in range(2):  # the look whether somebody listens, and the client
            deaf.accept()
        first.tell("release")
        outcome, took_s = first.answer()
    assert outcome == "FencedError"
    assert took_s < 3.0


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_rank_that_waits_for_a_peer_to_connect_is_freed_at_once(
    ranks: list[RankProcess], store: RendezvousStore, index: int
) -> None:
    """All addresses are in the store, but the peers behind them are gone."""
    generation = build(ranks, store)
    waiting = ranks[index]
    for rank in ranks:
        if rank is not waiting:
            rank.end()
    waiting.tell("close")
    assert waiting.answer() == "closed"
    again = {"generation": generation, "rank": index, "size": SIZE}
    waiting.tell("build", store=store.address, answer=False, **again)
    waiting.tell("reach_gloo")
    assert waiting.answer() == "in gloo"
    waiting.tell("release")
    outcome, took_s = waiting.answer()
    assert outcome in ("FencedError", "RuntimeError")
    assert took_s < 3.0


def test_release_spares_the_sockets_of_user_code(
    ranks: list[RankProcess], store: RendezvousStore
) -> None:
    build(ranks, store)
    first, *_ = ranks
    first.tell("open_own_socket")
    assert first.answer() == "open"
    first.tell("release")
    first.answer()
    first.tell("own_socket_works")
    assert first.answer() is True


@pytest.mark.parametrize("shared", [False, True], ids=["gloo", "shared memory"])
def test_twenty_regenerations_leave_fds_and_threads_flat(
    ranks: list[RankProcess], store: RendezvousStore, shared: bool
) -> None:
    counts = []
    for _ in range(22):
        build(ranks, store, shared=shared)
        collective(ranks, "all_reduce")
        assert finish(ranks) == ["done"] * SIZE
        for rank in ranks:
            rank.tell("close")
            assert rank.answer() == "closed"
        ranks[0].tell("count")
        counts.append(ranks[0].answer())
    settled = counts[1]
    assert counts[-1][0] <= settled[0] and counts[-1][1] <= settled[1] + 1, counts


def test_who_connects_before_the_store_has_loaded_torch_is_served_once_it_has() -> None:
    late = RendezvousStore("127.0.0.1", timeout_s=60)
    host, port = late.address.split(":")
    made: queue.SimpleQueue[Any] = queue.SimpleQueue()
    over = threading.Event()

    def connect() -> None:
        made.put(groups._open_client(host, int(port), timeout_s=30, over=over)[0])

    client = threading.Thread(target=connect, daemon=True)
    client.start()
    with socket.create_connection((host, int(port)), timeout=30):
        pass  # the port answers; the store does not yet
    assert made.empty()
    late.open()
    store = made.get(timeout=30)
    store.set("there", "yes")
    assert store.get("there") == b"yes"

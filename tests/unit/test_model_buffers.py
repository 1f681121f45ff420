"""What a step makes of buffers that forward passes write."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lazarus.errors import UserMistakeError
from lazarus.runtime.state.buffers import Buffers


class Meeting:
    """Ranks as threads of this process: collectives in memory."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier = size, threading.Barrier(size)
        self.parts: dict[int, Tensor] = {}

    def gathered(self, rank: int, part: Tensor) -> list[Tensor]:
        self.parts[rank] = part.clone()
        self.barrier.wait(30)
        found = [self.parts[r] for r in range(self.size)]
        self.barrier.wait(30)
        return found


class RankExchange:
    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting, self.rank, self.size = meeting, rank, meeting.size
        self.calls: list[str] = []

    def all_reduce(self, tensor: Tensor, *, label: str) -> None:
        self.calls.append(label)
        tensor.copy_(torch.stack(self.meeting.gathered(self.rank, tensor)).sum(0))

    def all_gather(self, output: Tensor, input: Tensor, *, label: str) -> None:
        self.calls.append(label)
        output.copy_(torch.cat(self.meeting.gathered(self.rank, input)))


class Counting(nn.Module):
    """Statistics, a counter, a constant, and a cache that is made anew."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mask", torch.ones(2, 2).tril())
        self.register_buffer("cache", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + len(x)  # another tensor, as users write it
        self.cache = torch.zeros(len(x))
        return self.norm(x)


def on_ranks(size: int, work: Callable[[int, Any], Any]) -> list[Any]:
    meeting, found = Meeting(size), [None] * size

    def body(rank: int) -> None:
        found[rank] = work(rank, RankExchange(meeting, rank))

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_statistics_are_the_mean_weighted_by_samples_and_counters_the_largest() -> None:
    torch.manual_seed(0)
    data = torch.randn(9, 3)
    shares = [data[:4], data[4:9], data[:0]]

    def work(rank: int, exchange: Any) -> Any:
        model = Counting().train()
        buffers = Buffers(model)
        mine = shares[rank]
        if len(mine):
            model(mine)
        else:
            with buffers.untouched():
                model(torch.full((2, 3), float("nan")))
        buffers.exchange(exchange, samples=len(mine), total=9, agree=True)
        buffers.fold(is_taken=True)
        buffers.keep()
        return dict(model.named_buffers()), exchange.calls

    found = on_ranks(3, work)
    alone = []
    for mine in shares[:2]:
        one = Counting().train()
        one(mine)
        alone.append(dict(one.named_buffers()))
    for name in ("norm.running_mean", "norm.running_var"):
        wide = [state[name].double() for state in alone]
        want = ((4 * wide[0] + 5 * wide[1]) / 9).float()
        for state, _ in found:
            assert torch.equal(state[name], want)
    for state, _ in found:
        assert int(state["seen"]) == 5 and int(state["norm.num_batches_tracked"]) == 1
        assert torch.equal(state["mask"], torch.ones(2, 2).tril())
    assert {tuple(calls) for _, calls in found} == {("buffers",) * 3}


def test_a_model_whose_buffers_nobody_writes_exchanges_nothing_after_the_first_step() -> None:
    def work(rank: int, exchange: Any) -> list[int]:
        model = Counting().eval()
        buffers = Buffers(model, scratch=["se*"])
        counts = []
        for step in range(3):
            model(torch.ones(2, 3))
            buffers.exchange(exchange, samples=2, total=4, agree=step == 0)
            buffers.fold(is_taken=True)
            buffers.keep()
            counts.append(len(exchange.calls))
        assert not buffers.has_unknown
        return counts

    assert on_ranks(2, work) == [[1, 1, 1]] * 2, "one agreement; then nothing"


def test_a_buffer_first_written_later_is_noticed_before_the_step_counts() -> None:
    def work(rank: int, exchange: Any) -> tuple[bool, bool, int]:
        model = Counting().eval()
        buffers = Buffers(model, scratch=["seen"])
        buffers.exchange(exchange, samples=2, total=4, agree=True)
        model.train()
        model(torch.randn(2, 3))
        buffers.exchange(exchange, samples=2, total=4, agree=False)
        noticed = buffers.has_unknown
        buffers.restore()
        model(torch.randn(2, 3))
        buffers.exchange(exchange, samples=2, total=4, agree=True)
        buffers.fold(is_taken=True)
        return noticed, buffers.has_unknown, int(model.norm.num_batches_tracked)

    assert on_ranks(2, work) == [(True, False, 1)] * 2


def test_an_abandoned_or_skipped_step_leaves_the_bits_of_before() -> None:
    class Alone:
        rank, size = 0, 1

    model = Counting().train()
    buffers = Buffers(model)
    seen = model.seen
    model(torch.randn(4, 3))
    buffers.exchange(Alone(), samples=4, total=4, agree=True)
    assert model.seen is not seen
    buffers.restore()
    assert model.seen is seen and int(seen) == 0
    assert torch.equal(model.norm.running_mean, torch.zeros(3))
    model(torch.randn(4, 3))
    buffers.exchange(Alone(), samples=4, total=4, agree=False)
    buffers.fold(is_taken=False)
    assert model.seen is seen and int(seen) == 0
    model(torch.randn(4, 3))
    buffers.exchange(Alone(), samples=4, total=4, agree=False)
    buffers.fold(is_taken=True)
    buffers.keep()
    assert model.seen is seen and int(seen) == 4
    assert dict(buffers.state())["seen"] is seen
    assert "cache" not in dict(buffers.state())


@pytest.mark.parametrize("what", ["shape", "None", "new"])
def test_state_that_changes_its_shape_is_refused_in_a_sentence(what: str) -> None:
    class Alone:
        rank, size = 0, 1

    model = Counting()
    buffers = Buffers(model)
    if what == "shape":
        model.mask = torch.ones(3, 3)
    elif what == "None":
        model.mask = None
    else:
        model.register_buffer("late", torch.zeros(1))
    with pytest.raises(UserMistakeError, match="persistent=False"):
        buffers.exchange(Alone(), samples=4, total=4, agree=True)


def test_complex_and_half_buffers_are_averaged_in_double_precision() -> None:
    def work(rank: int, exchange: Any) -> tuple[Tensor, Tensor]:
        model = nn.Module()
        model.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
        model.register_buffer("thin", torch.zeros(2, dtype=torch.bfloat16))
        model.register_buffer("hit", torch.zeros(2, dtype=torch.bool))
        buffers = Buffers(model)
        model.phase += complex(rank + 1, -rank)
        model.thin += 1.0 + rank
        model.hit[rank] = True
        buffers.exchange(exchange, samples=1 + 2 * rank, total=4, agree=True)
        buffers.fold(is_taken=True)
        assert model.hit.all()
        return model.phase, model.thin

    for phase, half in on_ranks(2, work):
        assert phase.tolist() == [1.75 - 0.75j] * 2
        assert half.tolist() == [1.75] * 2

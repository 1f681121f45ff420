"""Dense gradients in buckets: the same sums and bits, whether they travel during the backward."""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from dispatcher import Exchange, run_ranks
from dispatcher.exchange import Pending
from dispatcher.processes import run_processes
from lazarus.errors import ConfigError
from lazarus.runtime.state.dense_sync import DenseSync

WIDTHS = (6, 8, 4, 10, 3)


class Noting:
    """An exchange that notes how many elements each sum of dense gradients has."""

    def __init__(self, inner: Exchange, notes: list[object]) -> None:
        self._inner, self._notes, self.rank, self.size = inner, notes, inner.rank, inner.size

    def start_all_reduce(self, tensor: Tensor, *, label: str) -> Pending:
        assert label == "dense_grad"
        self._notes.append(tensor.numel())
        return self._inner.start_all_reduce(tensor, label=label)

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)


def model_of() -> tuple[nn.Sequential, Tensor]:
    """Layers, the same on every rank, whose gradients are views of one buffer."""
    random = torch.Generator().manual_seed(0)
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(WIDTHS)))
    for p in model.parameters():
        p.data.normal_(generator=random)
    flat = torch.zeros(sum(p.numel() for p in model.parameters()))
    start = 0
    for p in model.parameters():
        p.grad = flat[start : start + p.numel()].view(p.shape)
        start += p.numel()
    return model, flat


def step(
    exchange: Exchange, *, overlaps: bool, bucket_bytes: int, steps: int = 2,
    unused: Collection[int] = (), frozen: bool = False, turned: bool = False,
) -> tuple[Tensor, list[object]]:  # fmt: skip
    """Gradients of the last of some steps, and what happened in which order, step by step.

    Every layer but the first is followed by one that all ranks wait in, as MoE layers are.

    Args:
        unused: Ranks whose graph lacks the last layer.
        frozen: The second layer's weights take no gradient.
        turned: From the second step on the last layer serves before the first one as well.
    """
    if not isinstance(exchange, Noting):
        exchange = Noting(exchange, [])  # type: ignore[assignment]
    notes: list[object] = exchange._notes  # type: ignore[attr-defined]
    model, flat = model_of()
    parameters = list(model.parameters())
    parameters[2].requires_grad_(not frozen)
    parameters[0].register_post_accumulate_grad_hook(lambda _: notes.append("first layer"))
    sync = DenseSync(parameters, flat, overlaps=overlaps, bucket_bytes=bucket_bytes)
    random = torch.Generator().manual_seed(exchange.rank)
    for number in range(steps):
        flat.zero_()
        sync.start_step()
        notes.append(f"step {number}")
        for last_round in (False, True):
            if last_round:
                sync.arm()
            x = torch.randn(5, WIDTHS[0], generator=random)
            if turned and number:
                x = x + model[-1](torch.ones(1, WIDTHS[-2])).mean()
            for index, layer in enumerate(list(model)[:-1] if exchange.rank in unused else model):
                x = layer(x).tanh()
                if index:
                    x.register_hook(lambda _: sync.pass_layer(exchange))
            x.square().sum().backward()
        sync.finish(exchange).wait()
        sync.agree(exchange)
    return flat, notes


@pytest.mark.parametrize("bucket_bytes", [1, 100, 10_000])
@pytest.mark.parametrize("unused", [(), (0, 1, 2), (1,)])
@pytest.mark.parametrize("frozen", [False, True])
def test_overlapped_equals_not_overlapped(
    bucket_bytes: int, unused: tuple[int, ...], frozen: bool
) -> None:
    def both(exchange: Exchange) -> tuple[Tensor, Tensor]:
        return tuple(  # type: ignore[return-value]
            step(exchange, overlaps=on, bucket_bytes=bucket_bytes, unused=unused, frozen=frozen)[0]
            for on in (True, False)
        )

    alone = [step_alone(rank, unused=unused, frozen=frozen) for rank in range(3)]
    for early, late in run_ranks(both, size=3):
        assert torch.equal(early, late)
        torch.testing.assert_close(early, alone[0] + alone[1] + alone[2])


def step_alone(rank: int, *, unused: Collection[int], frozen: bool) -> Tensor:
    class Solo:
        size = 1

        def __init__(self) -> None:
            self.rank = rank

        def start_all_reduce(self, tensor: Tensor, *, label: str) -> Pending:
            return self  # type: ignore[return-value]

        def wait(self) -> None: ...

    solo: Exchange = Solo()  # type: ignore[assignment]
    return step(solo, overlaps=False, bucket_bytes=1, unused=unused, frozen=frozen)[0]


def both_over_gloo(exchange: Exchange) -> list[bool]:
    same = []
    for unused in ((), (1,)):
        early, notes = step(exchange, overlaps=True, bucket_bytes=100, unused=unused)
        late, _ = step(exchange, overlaps=False, bucket_bytes=100, unused=unused)
        same.append(torch.equal(early, late) and len(notes) > 3)
    return same


def test_over_gloo_processes_too() -> None:
    assert run_processes(both_over_gloo, size=3) == [[True, True]] * 3


def parts(notes: list[object]) -> list[list[object]]:
    """What happened, by step."""
    starts = [i for i, what in enumerate(notes) if str(what).startswith("step")]
    return [notes[a + 1 : b] for a, b in pairwise([*starts, len(notes)])]


def test_buckets_start_within_the_last_backward_from_the_second_step_on() -> None:
    results = run_ranks(lambda e: step(e, overlaps=True, bucket_bytes=100, steps=3), size=2)
    (_, notes), (_, same) = results
    assert notes == same
    first, second, third = parts(notes)
    assert first[:2] == ["first layer"] * 2  # of both rounds: where to start is not known yet
    assert second == third
    before, during = (i for i, what in enumerate(second) if what == "first layer")
    assert before == 0  # nothing travels in a round that is not the last
    assert 1 < during < len(second) - 1  # some before the backward is over, the last after it
    sizes = [n for n in second if isinstance(n, int)]
    assert sum(sizes) == model_of()[1].numel() and len(sizes) > 3


def test_without_overlap_all_start_at_the_end() -> None:
    ((_, notes),) = run_ranks(lambda e: step(e, overlaps=False, bucket_bytes=100), size=1)
    assert all(part[:2] == ["first layer"] * 2 and len(part) > 5 for part in parts(notes))


@pytest.mark.parametrize("unused", [(0, 1), (1,)])
def test_what_has_no_gradient_on_some_rank_holds_up_its_buckets_to_the_end(
    unused: tuple[int, ...],
) -> None:
    results = run_ranks(
        lambda e: step(e, overlaps=True, bucket_bytes=1, unused=unused, steps=3), size=2
    )
    for _, notes in results:  # the last layer is in the first bucket: none may start before it
        assert all(part[:2] == ["first layer"] * 2 for part in parts(notes))


def test_a_gradient_that_comes_after_its_bucket_is_named_and_nothing_is_summed_twice() -> None:
    def body(exchange: Exchange) -> str:
        try:
            step(exchange, overlaps=True, bucket_bytes=1, turned=True)
        except ConfigError as error:
            return str(error)
        return "went through"

    for said in run_ranks(body, size=2):
        assert "came later in the backward than in the first step" in said
        assert 'dispatch.overlap = "off"' in said


def test_an_attempt_that_was_given_up_leaves_nothing_behind() -> None:
    class Fenced(RuntimeError): ...

    def body(exchange: Exchange) -> tuple[Tensor, Tensor]:
        model, flat = model_of()
        sync = DenseSync(list(model.parameters()), flat, overlaps=True, bucket_bytes=100)
        x = torch.randn(5, WIDTHS[0], generator=torch.Generator().manual_seed(exchange.rank))
        started: list[object] = []

        class Fails(Noting):
            def start_all_reduce(self, tensor: Tensor, *, label: str) -> Pending:
                if len(started) == 2:
                    raise Fenced("given up")
                started.append(tensor)
                return exchange.start_all_reduce(tensor, label=label)

        def backward(over: Exchange) -> None:
            sync.arm()
            out = x
            for layer in model:
                out = layer(out)
                out.register_hook(lambda _: sync.pass_layer(over))
            out.square().sum().backward()

        sync.start_step()
        backward(exchange)
        sync.finish(exchange).wait()
        sync.agree(exchange)
        sync.start_step()
        with pytest.raises(Fenced, match="given up"):
            backward(Fails(exchange, []))  # type: ignore[arg-type]
        flat.zero_()
        sync.begin_generation()
        backward(exchange)
        sync.finish(exchange).wait()
        again, fresh = flat.clone(), list(model.parameters())
        for p in fresh:
            p.grad = None
        model(x).square().sum().backward()
        wanted = torch.cat([p.grad.flatten() for p in fresh if p.grad is not None])
        exchange.all_reduce(wanted, label="digest")
        return again, wanted

    for again, wanted in run_ranks(body, size=2):
        assert torch.equal(again, wanted)

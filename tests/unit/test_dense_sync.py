"""Dense gradients in buckets: the same sums and bits, whether they travel during the backward."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from dispatcher import Exchange, run_ranks
from dispatcher.exchange import Pending
from dispatcher.processes import run_processes
from lazarus.runtime.dense_sync import DenseSync

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
    exchange: Exchange, *, overlaps: bool, bucket_bytes: int, rounds: int = 2, unused: bool = False
) -> tuple[Tensor, list[object]]:
    """Gradients of one step, and what happened in which order."""
    if not isinstance(exchange, Noting):
        exchange = Noting(exchange, [])  # type: ignore[assignment]
    notes: list[object] = exchange._notes  # type: ignore[attr-defined]
    model, flat = model_of()
    used: Sequence[nn.Module] = list(model)[:-1] if unused else list(model)
    parameters = list(model.parameters())
    parameters[0].register_post_accumulate_grad_hook(lambda _: notes.append("first layer"))
    sync = DenseSync(parameters, flat, overlaps=overlaps, bucket_bytes=bucket_bytes)
    sync.start_step()
    random = torch.Generator().manual_seed(exchange.rank)
    for number in range(rounds):
        if number + 1 == rounds:
            sync.arm(exchange)
        x = torch.randn(5, WIDTHS[0], generator=random)
        for layer in used:
            x = layer(x).tanh()
        x.square().sum().backward()
    sync.finish(exchange).wait()
    return flat, notes


@pytest.mark.parametrize("bucket_bytes", [1, 100, 10_000])
@pytest.mark.parametrize("unused", [False, True])
def test_overlapped_equals_not_overlapped(bucket_bytes: int, unused: bool) -> None:
    def both(exchange: Exchange) -> tuple[Tensor, Tensor]:
        early, _ = step(exchange, overlaps=True, bucket_bytes=bucket_bytes, unused=unused)
        late, _ = step(exchange, overlaps=False, bucket_bytes=bucket_bytes, unused=unused)
        return early, late

    alone = [step_alone(rank, unused=unused) for rank in range(3)]
    for early, late in run_ranks(both, size=3):
        assert torch.equal(early, late)
        torch.testing.assert_close(early, alone[0] + alone[1] + alone[2])


def step_alone(rank: int, *, unused: bool) -> Tensor:
    class Solo:
        size = 1

        def __init__(self) -> None:
            self.rank = rank

        def start_all_reduce(self, tensor: Tensor, *, label: str) -> Pending:
            return self  # type: ignore[return-value]

        def wait(self) -> None: ...

    return step(Solo(), overlaps=False, bucket_bytes=1, unused=unused)[0]  # type: ignore[arg-type]


def both_over_gloo(exchange: Exchange) -> bool:
    early, notes = step(exchange, overlaps=True, bucket_bytes=100)
    late, _ = step(exchange, overlaps=False, bucket_bytes=100)
    return torch.equal(early, late) and len(notes) > 3


def test_over_gloo_processes_too() -> None:
    assert run_processes(both_over_gloo, size=3) == [True] * 3


def test_buckets_start_within_the_last_backward_and_in_one_order() -> None:
    (_, notes), (_, same) = run_ranks(
        lambda exchange: step(exchange, overlaps=True, bucket_bytes=100), size=2
    )
    assert notes == same
    first_round, second = (i for i, what in enumerate(notes) if what == "first layer")
    assert first_round == 0  # nothing travels in a round that is not the last
    assert 1 < second < len(notes) - 1  # some before the backward is over, the last after it
    sizes = [n for n in notes if isinstance(n, int)]
    assert sum(sizes) == model_of()[1].numel() and len(sizes) > 3


def test_without_overlap_all_start_at_the_end() -> None:
    ((_, notes),) = run_ranks(lambda e: step(e, overlaps=False, bucket_bytes=100), size=1)
    assert notes[:2] == ["first layer"] * 2 and len(notes) > 5


def test_what_never_gets_a_gradient_holds_up_its_buckets_to_the_end() -> None:
    ((_, notes),) = run_ranks(lambda e: step(e, overlaps=True, bucket_bytes=1, unused=True), size=1)
    # The last layer is in the first bucket: none may start before it, so that all ranks agree.
    assert notes[:2] == ["first layer"] * 2


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

        sync.start_step()
        sync.arm(Fails(exchange, []))  # type: ignore[arg-type]
        with pytest.raises(Fenced, match="given up"):
            model(x).square().sum().backward()
        flat.zero_()
        sync.start_step()
        sync.arm(exchange)
        model(x).square().sum().backward()
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

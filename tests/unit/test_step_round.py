"""One step on several ranks: shares, empty rounds, losses that skip layers, seeds, precision."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from step_ranks import one_step, ranks, stepped
from torch import Tensor, nn

from dispatcher import Exchange, RanksPartedError, run_ranks
from lazarus.data.sampler import share, split_rounds
from lazarus.model import gpt
from lazarus.model.loss import LossSum
from lazarus.model.moe import MoELayer
from lazarus.runtime.comm.guarded_exchange import GuardedExchange
from lazarus.runtime.fence.ledger import StepLedger
from lazarus.runtime.input.randomness import fingerprint, reseed, undisturbed
from lazarus.runtime.training.hooks import Hooks
from lazarus.runtime.training.step import autocast, checked_loss, move_to

# ---- what a loss may return ----------------------------------------------------------------------


def test_a_mean_is_refused_with_the_two_line_fix() -> None:
    mean = F.cross_entropy(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))
    for wrong in (mean, (mean, 2), float(mean), {"loss": mean}):
        with pytest.raises(TypeError) as caught:
            checked_loss(wrong)
        lines = str(caught.value).splitlines()
        assert lines[1:] == [
            '    total = F.cross_entropy(logits, targets, reduction="sum")',
            "    return LossSum(total, targets.numel())",
        ]
        assert "a mean of means is wrong" in lines[0].replace("\n", " ")
    total, count = checked_loss(LossSum(mean, torch.tensor(7)))
    assert total is mean and count == 7.0


# ---- nobody idle ---------------------------------------------------------------------------------


def busiest_rows(batch: int, num_ranks: int, micro_batch: int) -> int:
    """What a step takes, in samples: round by round those of the rank that has most."""
    rounds = split_rounds(share(batch, num_ranks), micro_batch)
    assert max(max(sizes) for sizes in rounds) <= micro_batch
    assert len({len(sizes) for sizes in rounds}) == 1
    return sum(max(column) for column in zip(*rounds, strict=True))


@pytest.mark.parametrize("micro_batch", [1, 3, 4, 5, 8, 20])
def test_with_20_samples_a_rank_nobody_idles_after_a_loss(micro_batch: int) -> None:
    for nodes in range(2, 65):
        batch = 20 * nodes
        with_all, with_one_less = (
            batch / busiest_rows(batch, alive, micro_batch) for alive in (nodes, nodes - 1)
        )
        assert with_one_less >= 0.95 * (nodes - 1) * with_all / nodes


# ---- empty rounds --------------------------------------------------------------------------------


def test_ranks_without_samples_take_part_and_change_nothing() -> None:
    """Global batch 11 on 13 ranks: two are empty; the step is that of one rank."""

    def body(exchange: Exchange) -> Any:
        replica, step = stepped(exchange)
        _, sums = one_step(step)
        assert step.shared is not None
        return len(step.shared.mine), sums.loss, sums.counts, replica.flat_grad.clone()

    many, alone = run_ranks(body, size=13), run_ranks(body, size=1)
    assert [own for own, *_ in many] == [1] * 11 + [0, 0]
    for _, loss, counts, grad in many:
        assert loss == pytest.approx(alone[0][1], rel=1e-6)
        np.testing.assert_array_equal(counts, alone[0][2])
        assert float((grad - alone[0][3]).norm() / alone[0][3].norm()) < 1e-5


# ---- losses that do not reach every layer -------------------------------------------------------


def uneven(model: nn.Module, batch: Any) -> LossSum:
    """By its sample the usual loss, a constant, a detached one, or one of the first layer only."""
    found: list[Tensor] = []
    first = next(m for m in model.modules() if isinstance(m, MoELayer))
    handle = first.register_forward_hook(lambda module, args, out: found.append(out))
    usual = gpt.loss(model, batch)
    handle.remove()
    match int(batch["tokens"].sum()) % 4:
        case 0:
            return LossSum(torch.zeros(()), 0)
        case 1:
            return LossSum(usual.total.detach(), usual.count)
        case 2:
            return LossSum(found[0].square().sum(), usual.count)
    return usual


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("balance", ["aux", "none"])
def test_a_loss_may_depend_on_no_layer_or_on_some_and_the_step_is_that_of_one_rank(
    balance: str, overlaps: bool
) -> None:
    """C1: a rank whose loss is a constant still serves the tokens of the others."""
    kinds = set()

    def body(exchange: Exchange) -> Any:
        replica, step = stepped(exchange, balance=balance, overlaps=overlaps)
        step._batching = replace(step._batching, micro_batch_size=1)

        def loss(model: nn.Module, batch: Any) -> LossSum:
            kinds.add(int(batch["tokens"].sum()) % 4)
            return uneven(model, batch)

        step._loss = loss
        found = []
        for number in (1, 2, 3):
            _, sums = one_step(step, number)
            found.append((sums.loss, sums.count, replica.flat_grad.clone()))
            replica.apply(sums, dense_square=step.dense_square)
        for context in step._world.contexts:
            assert context._open == 0 and context.anchors == []
        return found

    alone = run_ranks(body, size=1)[0]
    assert kinds == {0, 1, 2, 3}
    for many in run_ranks(body, size=3):
        for (loss, count, grad), (wanted, same, wanted_grad) in zip(many, alone, strict=True):
            assert loss == pytest.approx(wanted, rel=1e-5) and count == same
            assert float((grad - wanted_grad).norm() / wanted_grad.norm()) < 1e-4


def test_a_forward_that_one_rank_skips_is_an_error_with_both_sides_on_all_ranks() -> None:
    """C2: user code draws whether a layer runs, and ranks draw differently."""
    said: dict[int, str] = {}

    def body(exchange: Exchange) -> None:
        _, step = stepped(exchange)
        if exchange.rank == 1:
            step._replica.model.blocks[0].ffn = nn.Identity()
        with pytest.raises(RanksPartedError) as caught:
            one_step(step)
        said[exchange.rank] = str(caught.value)

    run_ranks(body, size=3)
    for text in said.values():
        assert "layer 0 forward" in text and "layer 1 forward" in text and "rank 1 " in text


def test_a_step_whose_exchanges_fitted_by_chance_is_not_committed() -> None:
    """C2: the labels of all exchanges are summed up with the commit."""
    said: dict[int, str] = {}

    def body(exchange: Exchange) -> None:
        ledger = StepLedger()
        guarded = GuardedExchange(exchange, ledger=ledger, observer=ranks.quiet_observer(ledger))
        _, step = stepped(guarded)
        trail = guarded.trail

        class Slips:
            def on_gradients(self, ctx: Any, named_grads: Any) -> None:
                trail._checksum += 1

        one_step(step)
        step._hooks = Hooks([Slips()] if exchange.rank == 1 else ())
        with pytest.raises(RanksPartedError) as caught:
            one_step(step, 2)
        said[exchange.rank] = str(caught.value)

    run_ranks(body, size=3)
    assert set(said) == {0, 1, 2}
    assert all("exchanges of step 2 that differ" in text for text in said.values())


# ---- randomness ----------------------------------------------------------------------------------


def drawn() -> list[float]:
    import random

    return [float(torch.rand(())), float(np.random.rand()), random.random()]


def test_every_micro_batch_draws_as_a_function_of_seed_step_and_first_sample() -> None:
    seen = {}
    for key in ((1, 2, 3), (1, 2, 4), (1, 3, 3), (2, 2, 3)):
        reseed(*key)
        seen[key] = drawn()
        drawn()
        reseed(*key)
        assert drawn() == seen[key]
    for generator in zip(*seen.values(), strict=True):
        assert len(set(generator)) == len(seen)


def test_what_is_drawn_inside_undisturbed_leaves_no_trace() -> None:
    reseed(1, 1, 1)
    before = fingerprint()
    with undisturbed():
        drawn()
        assert fingerprint() != before
    assert fingerprint() == before


def test_the_loss_sees_the_same_random_numbers_in_a_redo_whatever_came_before() -> None:
    noise: list[list[float]] = []

    def noisy(model: nn.Module, batch: Any) -> LossSum:
        noise[-1].append(float(torch.rand(())))
        return gpt.loss(model, batch)

    def body(exchange: Exchange) -> None:
        _, step = stepped(exchange)
        step._loss = noisy
        for _ in range(2):
            noise.append([])
            drawn()
            one_step(step)

    run_ranks(body, size=1)
    assert noise[0] == noise[1] and len(set(noise[0])) == len(noise[0]) == 6


# ---- precision -----------------------------------------------------------------------------------


def test_bf16_computes_in_bf16_and_keeps_sums_in_fp32() -> None:
    seen = []

    def watching(model: nn.Module, batch: Any) -> LossSum:
        seen.append(torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype)
        return gpt.loss(model, batch)

    def body(exchange: Exchange, precision: str) -> Any:
        replica, step = stepped(exchange, precision=precision)
        step._loss = watching
        _, sums = one_step(step)
        assert replica.flat_grad.dtype == torch.float32
        return sums.loss

    low = run_ranks(lambda exchange: body(exchange, "bf16"), size=2)
    assert set(seen) == {torch.bfloat16}
    seen.clear()
    full = run_ranks(lambda exchange: body(exchange, "fp32"), size=2)
    assert set(seen) == {torch.float32}
    assert low[0] != full[0] and low[0] == pytest.approx(full[0], rel=2e-2)


def test_autocast_is_off_for_fp32() -> None:
    with autocast("fp32", torch.device("cpu")):
        assert not torch.is_autocast_enabled("cpu")
    with autocast("bf16", torch.device("cpu")):
        assert torch.is_autocast_enabled("cpu")


def test_batches_of_any_nesting_are_moved_whole() -> None:
    batch = {"a": torch.ones(2), "b": [torch.ones(1), "text"], "c": (1, torch.ones(3))}
    moved = move_to(batch, torch.device("meta"))
    assert moved["a"].is_meta and moved["b"][0].is_meta and moved["c"][1].is_meta
    assert moved["b"][1] == "text" and moved["c"][0] == 1

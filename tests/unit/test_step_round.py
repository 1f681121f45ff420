"""One step on several ranks: shares, empty rounds, reseeding, precision, hooks, evaluation."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dispatcher import Exchange, RanksPartedError, run_ranks
from lazarus.control.commit.measures import measures_of
from lazarus.data.sampler import share, split_rounds
from lazarus.errors import DataError
from lazarus.model import gpt
from lazarus.model.loss import LossSum
from lazarus.model.moe import MoELayer
from lazarus.runtime.comm.guarded_exchange import GuardedExchange
from lazarus.runtime.fence.ledger import StepLedger
from lazarus.runtime.input.randomness import fingerprint, reseed, undisturbed
from lazarus.runtime.state.checksums import text_checksum
from lazarus.runtime.state.compare import compare
from lazarus.runtime.state.replica import Replica
from lazarus.runtime.training import defaults
from lazarus.runtime.training.evaluation import Evaluator
from lazarus.runtime.training.hooks import Hooks
from lazarus.runtime.training.step import Step, autocast, checked_loss, move_to

INTEGRATION = Path(__file__).resolve().parents[1] / "integration"
ranks = SimpleNamespace(**runpy.run_path(str(INTEGRATION / "reference_rank.py")))


def stepped(exchange: Exchange, **options: Any) -> tuple[Replica, Step]:
    replica, step = ranks.make_step(exchange, top_k=1, ledger=StepLedger(), **options)
    exchange.all_reduce(torch.zeros(1), label="digest")  # threads share the generator of weights
    return replica, step


def common_of(replica: Replica) -> int:
    """Checksum of what all ranks have in common."""
    return text_checksum(replica.dense_digest(), replica.history_digest())


def one_step(step: Step, number: int = 1) -> Any:
    lanes = step.compute(number, pause=lambda: False, prepared=lambda: None)
    return lanes, step.check(lanes, step=number)


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


# ---- hooks and measures --------------------------------------------------------------------------


class Halving:
    """Halves every gradient, once each, and says how many there are."""

    def on_gradients(self, ctx: Any, named_grads: dict[str, Tensor]) -> None:
        for grad in named_grads.values():
            grad.mul_(0.5)
        ctx.log("names", len(named_grads))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_gradient_hooks_act_before_the_norm_and_ranks_stay_equal(size: int) -> None:
    def body(exchange: Exchange, hooks: Any) -> Any:
        replica, step = stepped(exchange, hooks=Hooks(hooks))
        lanes, sums = one_step(step)
        norm = replica.apply(sums, dense_square=step.dense_square)
        logged = measures_of(step._world.layout, lanes)
        return norm, logged, compare(replica, exchange, common=common_of(replica)), sums.loss

    plain = run_ranks(lambda exchange: body(exchange, ()), size=size)
    halved = run_ranks(lambda exchange: body(exchange, (Halving(),)), size=size)
    for before, after in zip(plain, halved, strict=True):
        assert after[0] == pytest.approx(0.5 * before[0], rel=1e-6)
        assert after[3] == before[3]
        assert before[1] == {} and after[1]["names"][1] == size
        assert before[2] == after[2] == []


def test_hooks_are_called_in_order_and_may_lack_any_method() -> None:
    said: list[str] = []

    class Early:
        def on_setup(self, ctx: Any, model: Any) -> None:
            said.append(f"setup {model}")

        def on_commit(self, ctx: Any, step: int) -> None:
            said.append(f"early {step}")

    class Late:
        def on_commit(self, ctx: Any, step: int) -> None:
            said.append(f"late {step}")

    hooks = Hooks([Early(), Late(), object()])
    hooks.setup(None, "model")  # type: ignore[arg-type]
    hooks.commit(None, 3)  # type: ignore[arg-type]
    assert said == ["setup model", "early 3", "late 3"]


def test_a_measure_does_not_depend_on_the_split_and_a_late_name_is_not_lost() -> None:
    def body(exchange: Exchange) -> Any:
        replica, step = stepped(exchange)

        def logging(model: nn.Module, batch: Any) -> LossSum:
            tokens = batch["tokens"]
            step._context.log("mean token", float(tokens.float().mean()), weight=len(tokens))
            if body_step[exchange.rank] == 2 and exchange.rank == 0:
                step._context.log("late", 1.0, weight=3.0)
            return gpt.loss(model, batch)

        step._loss = logging
        found = []
        for number in (1, 2, 3):
            body_step[exchange.rank] = number
            lanes, sums = one_step(step, number)
            replica.apply(sums, dense_square=step.dense_square)
            step._measures.commit()
            found.append(measures_of(step._world.layout, lanes))
        return found

    body_step: dict[int, int] = {}
    three, alone = run_ranks(body, size=3), run_ranks(body, size=1)
    assert all(found == three[0] for found in three)
    for step in range(3):
        mean, weight = three[0][step]["mean token"]
        assert weight == ranks.CONFIG.train.global_batch
        assert mean == pytest.approx(alone[0][step]["mean token"][0], rel=1e-6)
    assert ["late" in found for found in three[0]] == [False, False, True]
    assert three[0][2]["late"][0] == 1.0


# ---- evaluation ----------------------------------------------------------------------------------


class Held:
    def __len__(self) -> int:
        return 17

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        drawn = np.random.default_rng(1000 + index).integers(0, 256, ranks.CONFIG.seq_len + 1)
        return {"tokens": torch.from_numpy(drawn)}


def evaluator_of(replica: Replica, step: Step, **options: Any) -> Evaluator:
    chosen = {"data": Held(), "every": 2, "batches": 4} | options
    return Evaluator(
        replica,
        chosen["data"],
        batching=step._batching,
        every=chosen["every"],
        batches=chosen["batches"],
        collate=defaults.collate,
        loss=defaults.loss,
        observer=step._observer,
        measures=step._measures,
    )


def test_held_out_loss_is_the_exact_mean_for_any_number_of_ranks() -> None:
    torch.manual_seed(ranks.CONFIG.run.seed)
    model = ranks.make_model(1).eval()
    with torch.no_grad():
        held = torch.stack([Held()[i]["tokens"] for i in range(17)])
        total, count = gpt.loss(model, {"tokens": held})

    def body(exchange: Exchange) -> Any:
        replica, step = stepped(exchange)
        result = evaluator_of(replica, step).run(2, step._world)
        return result.loss_sum / result.count, result.count

    for size in (1, 2, 5):
        for loss, seen in run_ranks(body, size=size):
            assert seen == count
            assert loss == pytest.approx(float(total) / float(count), rel=1e-6)


def test_an_evaluation_disturbs_nothing_of_the_training() -> None:
    def body(exchange: Exchange) -> Any:
        replica, step = stepped(exchange)
        frozen = replica.model.blocks[0].attention_norm.eval()
        step._measures.start()
        before = replica.dense_digest(), fingerprint()
        evaluator_of(replica, step).run(2, step._world)
        assert (replica.dense_digest(), fingerprint()) == before
        assert replica.model.training and not frozen.training
        for context in step._world.contexts:
            assert not context.counts_E.any() and not context.ghost and context.aux_sum is None
        assert not step._measures.muted
        return True

    assert run_ranks(body, size=1) == [True]


def test_evaluations_are_due_after_multiples_and_need_map_style_data() -> None:
    def body(exchange: Exchange) -> Any:
        replica, step = stepped(exchange)
        found = evaluator_of(replica, step, every=3)
        assert [t for t in range(10) if found.is_due(t)] == [3, 6, 9]
        with pytest.raises(DataError, match="held-out data is map-style"):
            evaluator_of(replica, step, data=iter([]))
        return True

    assert run_ranks(body, size=1) == [True]


# ---- comparison ----------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["dense", "expert", "moment"])
def test_one_flipped_bit_in_one_replica_is_found_on_all_ranks(what: str) -> None:
    def body(exchange: Exchange) -> Any:
        replica, _ = stepped(exchange)
        assert compare(replica, exchange, common=common_of(replica)) == []
        if exchange.rank == 1:
            weight = replica.banks[1].weight
            target = {
                "dense": replica.flat,
                "expert": weight.detach()[0],
                "moment": replica.optimizer.state[weight]["exp_avg_sq"][0],
            }[what]
            target.view(torch.int32)[3] ^= 1
        expert = replica.banks[1].expert_of_slot[0]
        return compare(replica, exchange, common=common_of(replica)), expert

    results = run_ranks(body, size=3)
    (found,) = results[0][0]
    assert all(differences == [found] for differences, _ in results)
    if what == "dense":
        assert (found.layer, found.odd, found.is_majority) == (-1, (1,), True)
    else:
        assert (found.layer, found.expert) == (1, results[1][1])
        assert 1 in found.odd

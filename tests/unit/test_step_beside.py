"""What belongs to a step beside its rounds: hooks, measures, evaluation, comparison of replicas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from step_ranks import common_of, one_step, ranks, stepped
from torch import Tensor, nn

from dispatcher import Exchange, run_ranks
from lazarus.control.commit.measures import measures_of
from lazarus.errors import DataError
from lazarus.model import gpt
from lazarus.model.loss import LossSum
from lazarus.runtime.input.randomness import fingerprint
from lazarus.runtime.state.compare import compare
from lazarus.runtime.state.replica import Replica
from lazarus.runtime.training import defaults
from lazarus.runtime.training.evaluation import Evaluator
from lazarus.runtime.training.hooks import Hooks
from lazarus.runtime.training.step import Step

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

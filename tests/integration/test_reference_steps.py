"""Five steps on several ranks are five steps of one process: loss, gradients, weights, moments."""

from __future__ import annotations

import multiprocessing
import runpy
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dispatcher import Exchange, run_ranks
from lazarus.data.sampler import step_sample_ids
from lazarus.model import gpt
from lazarus.model.moe import commit_load, moe_layers, take_auxiliary
from lazarus.runtime.controller.rendezvous import RendezvousStore
from lazarus.runtime.fence.ledger import StepLedger
from lazarus.runtime.training import defaults

BODY = Path(__file__).with_name("reference_rank.py")
ranks = SimpleNamespace(**runpy.run_path(str(BODY)))
CONFIG = ranks.CONFIG
TOLERANCE = 1e-5


@cache
def alone(top_k: int) -> dict[str, Any]:
    """The same five steps in plain torch: one model with all experts, one batch, one backward."""
    torch.manual_seed(CONFIG.run.seed)
    model = ranks.make_model(top_k)
    banks = {name: moe.experts for name, moe in moe_layers(model).items()}
    matrices = [p for n, p in model.named_parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optim = CONFIG.optim
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
    )
    rate, data, found = defaults.schedule(CONFIG), ranks.Tokens(), {"losses": []}
    for step in range(1, ranks.STEPS + 1):
        ids = step_sample_ids(CONFIG.run.seed, step, CONFIG.train.global_batch, len(data))
        tokens = torch.stack([data[int(i)]["tokens"] for i in ids])
        optimizer.zero_grad()
        total, count = gpt.loss(model, {"tokens": tokens})
        auxiliary = take_auxiliary(model)
        assert auxiliary is not None
        (total + auxiliary).backward()
        if step == 1:
            found["gradients"] = by_name(model, banks, lambda p: p.grad)
        found["losses"].append(float(total.detach()) / count)
        found["counts"] = np.stack([m.context.counts_E.numpy() for m in moe_layers(model).values()])
        for parameter in model.parameters():
            parameter.grad.div_(count)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
        assert norm > optim.clip_norm  # or clipping would not be compared
        for group in optimizer.param_groups:
            group["lr"] = optim.lr * rate(step)
        before = {path: bank.weight.detach().clone() for path, bank in banks.items()}
        optimizer.step()
        for path, bank in banks.items():
            give_back_decay(bank, before[path], optim.lr * rate(step) * optim.weight_decay)
        commit_load(model)
    state = prefixed("model.", by_name(model, banks, lambda p: p))
    for key in ("exp_avg", "exp_avg_sq"):
        moments = by_name(model, banks, lambda p, key=key: optimizer.state[p][key])
        state |= prefixed(f"optimizer.{key}.", moments)
    found["state"] = state
    return found


@torch.no_grad()
def give_back_decay(bank: Any, before: Tensor, factor: float) -> None:
    """Undo the decay of the experts' biases, which are vectors."""
    for old, new in zip(before, bank.weight, strict=True):
        for field, bias in bank.field_views(new).items():
            if bias.dim() < 2:
                bias += factor * bank.field_views(old)[field]


def by_name(model: Any, banks: Any, value: Any) -> dict[str, np.ndarray]:
    """``value`` of every parameter by global name; experts field by field."""
    found: dict[str, Tensor] = {}
    inside = {id(bank.weight) for bank in banks.values()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in inside:
            found[name] = value(parameter)
    for path, bank in banks.items():
        for expert in range(bank.num_experts):
            for field, view in bank.field_views(value(bank.weight)[expert]).items():
                found[f"{path}.experts.{expert}.{field}"] = view
    return {name: tensor.detach().numpy().copy() for name, tensor in found.items()}


def prefixed(prefix: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def assert_close(got: np.ndarray, wanted: np.ndarray, name: str) -> None:
    off = np.linalg.norm((got - wanted).astype(np.float64).ravel())
    size = np.linalg.norm(wanted.astype(np.float64).ravel())
    assert off <= TOLERANCE * size + 1e-12, f"{name} is off by {off / max(size, 1e-30):.1e}"


def assert_same_training(parts: list[dict[str, Any]], wanted: dict[str, Any]) -> None:
    """Each rank agrees with the single process, and ranks agree with each other bit for bit."""
    for part in parts:
        np.testing.assert_allclose(part["losses"], wanted["losses"], rtol=TOLERANCE)
        np.testing.assert_array_equal(part["counts"], wanted["counts"])
    for kind in ("gradients", "state"):
        seen: dict[str, np.ndarray] = {}
        for part in parts:
            for name, tensor in part[kind].items():
                np.testing.assert_array_equal(seen.setdefault(name, tensor), tensor)
                assert_close(tensor, wanted[kind][name], f"{kind} {name}")
        assert set(seen) == set(wanted[kind])


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "mode", ["home", "balanced", pytest.param("shares", marks=pytest.mark.slow)]
)
def test_five_steps_over_loopback_are_those_of_one_process(
    mode: str, size: int, top_k: int
) -> None:
    def body(exchange: Exchange) -> Any:
        return ranks.train(exchange, top_k=top_k, ledger=StepLedger(), mode=mode)

    assert_same_training(run_ranks(body, size=size), alone(top_k))


@pytest.mark.parametrize("mode", ["home", "balanced"])
def test_five_steps_whose_gradients_are_summed_in_the_backward_are_those_of_one_process(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lazarus.runtime.state.dense_sync.BUCKET_BYTES", 2_000)

    def body(exchange: Exchange) -> Any:
        return ranks.train(exchange, top_k=2, ledger=StepLedger(), mode=mode, overlaps=True)

    overlapped = run_ranks(body, size=3)
    assert_same_training(overlapped, alone(2))
    after = run_ranks(lambda e: ranks.train(e, top_k=2, ledger=StepLedger(), mode=mode), size=3)
    for one, other in zip(overlapped, after, strict=True):
        for kind in ("gradients", "state"):
            for name, tensor in one[kind].items():
                np.testing.assert_array_equal(tensor, other[kind][name], err_msg=name)


def test_biases_that_balance_experts_are_those_of_one_process() -> None:
    def body(exchange: Exchange) -> Any:
        return ranks.train(exchange, top_k=2, ledger=StepLedger(), balance="bias")

    (one,) = run_ranks(body, size=1)
    biases = [tensor for name, tensor in one["state"].items() if name.endswith("router_bias")]
    assert len(biases) == 2 and all(np.abs(bias).max() >= 0.05 for bias in biases)
    assert_same_training(run_ranks(body, size=3), one)


@pytest.mark.parametrize("mode", ["home", "balanced"])
def test_layers_in_evaluation_mode_train_as_in_one_process(mode: str) -> None:
    def body(exchange: Exchange) -> Any:
        return ranks.train(exchange, top_k=2, ledger=StepLedger(), mode=mode, evaluating=True)

    (one,) = run_ranks(body, size=1)
    assert_same_training(run_ranks(body, size=3), one)


@pytest.mark.parametrize(
    ("size", "mode", "shared"),
    [
        (1, "home", False),
        pytest.param(2, "home", False, marks=pytest.mark.slow),
        (3, "home", True),
        pytest.param(3, "balanced", False, marks=pytest.mark.slow),
        (5, "balanced", True),
        pytest.param(2, "balanced", True, marks=pytest.mark.slow),
        pytest.param(3, "home", False, marks=pytest.mark.slow),
        pytest.param(5, "home", True, marks=pytest.mark.slow),
    ],
)
def test_five_steps_in_real_processes_are_those_of_one_process(
    size: int, mode: str, shared: bool
) -> None:
    store = RendezvousStore("127.0.0.1", timeout_s=60.0).open()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lazarus.runtime.launch.preload"])
    pipes, processes = [], []
    for rank in range(size):
        here, there = context.Pipe(duplex=False)
        arguments = {"rank": rank, "size": size, "store": store.address, "pipe": there}
        arguments |= {"mode": mode, "shared": shared}
        process = context.Process(
            target=runpy.run_path,
            args=(str(BODY), {"arguments": arguments}, "__rank__"),
            daemon=True,
        )
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    results = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    for index, top_k in enumerate((1, 2)):
        assert_same_training([result[index] for result in results], alone(top_k))


def test_the_comparison_can_fail() -> None:
    wanted = alone(1)
    other = {**alone(2), "counts": wanted["counts"], "losses": wanted["losses"]}
    with pytest.raises(AssertionError, match="off by"):
        assert_same_training([wanted], other)

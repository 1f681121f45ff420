"""Checks of a layer against the layer protocol, on random worlds of ranks in threads.

Shapes: T tokens, D model width, E experts, R ranks.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dispatcher.errors import RoutingTableError
from dispatcher.exchange import Exchange, SoloExchange
from dispatcher.gradients import flat_all_reduce, sum_replica_gradients
from dispatcher.loopback import run_ranks
from dispatcher.splits.routing import IntArray, RoutingTable
from lazarus.model.context import LayerContext
from lazarus.model.experts import ExpertBank, deferred_experts
from lazarus.model.moe import take_auxiliary
from lazarus.model.protocol import ElasticLayer, checked_layers

Build = Callable[[], nn.Module]
Call = Callable[[nn.Module, Tensor], Tensor]
_BUILDING = threading.Lock()  # builders draw from the one global generator
_TOLERANCE = 1e-4


@dataclass(kw_only=True)
class _Outcome:
    """What a step gave: outputs by rank and round, and sums over all of them."""

    outputs: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _World:
    """A random placement, and the tokens of each rank and round; None where a rank has none."""

    name: str
    seed: int
    slots: IntArray
    tokens: list[list[Tensor | None]]


def check_layer(build: Build, *, call: Call | None, seed: int, rounds: int) -> int:
    """Check that a layer keeps to the protocol; see ``lazarus.testing.conformance``.

    Raises:
        AssertionError: It does not; the message says in what.
    """
    run = call or _plainly
    model = _built(build, seed)
    layers = _layers_of(model)
    dim = next(iter(layers.values())).experts.layout.dim
    random = np.random.default_rng(seed)
    _check_alone(build, run, torch.randn(5, dim, generator=_generator(seed)), seed)
    for number in range(rounds):
        world = _world(random, number, seed, dim=dim, layers=layers)
        expected = _alone(build, run, world)
        size = len(world.tokens)
        step = partial(_one_rank, build=build, call=run, world=world)
        for outcome in run_ranks(step, size=size):
            _compare(outcome, expected, world.name)
    return rounds


def _plainly(model: nn.Module, x_TD: Tensor) -> Tensor:
    out: Tensor = model(x_TD)
    return out


def _built(build: Build, seed: int) -> nn.Module:
    with _BUILDING:
        torch.manual_seed(seed)
        return build().train()


def _layers_of(model: nn.Module) -> dict[str, ElasticLayer]:
    try:
        return checked_layers(model)
    except ValueError as problem:
        raise AssertionError(str(problem)) from problem


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _world(
    random: np.random.Generator,
    number: int,
    seed: int,
    *,
    dim: int,
    layers: dict[str, ElasticLayer],
) -> _World:
    """A placement with replicas, two rounds of tokens, and at most one rank without any."""
    num_experts = next(iter(layers.values())).num_experts
    ranks = 1 + number % 3
    holds = random.random((num_experts, ranks)) < 0.4
    holds[range(num_experts), random.integers(ranks, size=num_experts)] = True
    slots = np.full((ranks, int(holds.sum(0).max())), -1)
    for rank in range(ranks):
        held = random.permutation(np.flatnonzero(holds[:, rank]))
        slots[rank, : held.size] = held
    tokens: list[list[Tensor | None]] = [
        [torch.from_numpy(random.standard_normal((n, dim))).float() for n in (4, 1 + rank)]
        for rank in range(ranks)
    ]
    if ranks > 1:
        tokens[int(random.integers(ranks))][1] = None
    name = f"world {number} of seed {seed}: experts {slots.tolist()} on {ranks} ranks"
    return _World(name=name, seed=seed, slots=slots, tokens=tokens)


def _alone(build: Build, call: Call, world: _World) -> _Outcome:
    """The step on one rank that holds every expert."""
    model = _built(build, world.seed)
    outcome = _Outcome()
    for rank, rows in enumerate(world.tokens):
        for number, x_TD in enumerate(rows):
            if x_TD is not None:
                outcome.outputs[rank, number] = _differentiated(model, call, x_TD)
    _collect(outcome, model)
    return outcome


def _one_rank(exchange: Exchange, build: Build, call: Call, world: _World) -> _Outcome:
    """The step as a run makes it, on one of several ranks."""
    with deferred_experts():
        model = _built(build, world.seed)
    layers = _layers_of(model)
    for index, (path, layer) in enumerate(layers.items()):
        _attach(layer, path, index, exchange, world.slots)
    outcome = _Outcome()
    for number, x_TD in enumerate(world.tokens[exchange.rank]):
        is_ghost = x_TD is None
        for layer in layers.values():
            layer.context.ghost, layer.context.round = is_ghost, number
        rows = torch.ones(2, next(iter(layers.values())).experts.layout.dim)
        y_TD = _differentiated(model, call, rows if x_TD is None else x_TD, is_ghost=is_ghost)
        if not is_ghost:
            outcome.outputs[exchange.rank, number] = y_TD
    for name, parameter in model.named_parameters():
        if not _is_of_experts(name, layers) and parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            flat_all_reduce(parameter.grad, exchange)
    for layer in layers.values():
        bank, context = layer.experts, layer.context
        if bank.weight.grad is not None:
            sum_replica_gradients(
                bank.weight.grad, context.table, exchange, served_ER=context.served_ER,
                expert_of_slot=bank.expert_of_slot, written=context.written,
            )  # fmt: skip
    _collect(outcome, model)
    return outcome


def _attach(
    layer: ElasticLayer, path: str, index: int, exchange: Exchange, slots: IntArray
) -> None:
    table = RoutingTable.from_plan_arrays(slots, rank=exchange.rank)
    bank, held = layer.experts, table.slots_of(exchange.rank)
    assert bank.expert_of_slot == [], f"{path} holds experts although it was built for a run"
    bank.allocate(num_slots=len(held), device="cpu")
    for slot, expert in enumerate(held):
        bank.assign(slot, expert)
        if expert >= 0:
            bank.initialise(slot)
    if bank.weight.grad is not None:
        bank.weight.grad.fill_(torch.nan)  # as an abandoned attempt may leave it
    context = LayerContext(layer=index, exchange=exchange, table=table)
    context.written, context.anchors = set(), []
    layer.attach(context)
    assert layer.context is context, f"{path}.attach must set the context that it is given"


def _differentiated(
    model: nn.Module, call: Call, x_TD: Tensor, *, is_ghost: bool = False
) -> Tensor:
    """Forward and backward of one micro-batch."""
    layers = _layers_of(model)
    seen = dict.fromkeys(layers, 0)
    for path, layer in layers.items():

        def note(_: int, __: Tensor, path: str = path) -> None:
            seen[path] += 1

        layer.context.observer = note
    x_TD = x_TD.clone().requires_grad_()
    y_TD = call(model, x_TD)
    assert y_TD.shape[0] == x_TD.shape[0], f"output {tuple(y_TD.shape)} for {tuple(x_TD.shape)}"
    auxiliary = take_auxiliary(model)
    loss = y_TD.float().square().sum() + (0.0 if auxiliary is None else auxiliary)
    anchors = []
    for path, layer in layers.items():
        assert seen[path] > 0, f"{path} did not tell its context of a forward (context.record)"
        if layer.context.anchors is not None:
            found = layer.context.take_anchors()
            assert len(found) == seen[path], (
                f"{path} left {len(found)} anchors in {seen[path]} forwards: pass "
                f"anchors=context.anchors to expert_path"
            )
            anchors += found
    total = torch.stack([loss * 0.0 if is_ghost else loss, *anchors]).sum()
    total.backward()  # type: ignore[no-untyped-call]
    return y_TD.detach()


def _is_of_experts(name: str, layers: dict[str, ElasticLayer]) -> bool:
    return any(name.startswith(f"{path}.experts." if path else "experts.") for path in layers)


def _collect(outcome: _Outcome, model: nn.Module) -> None:
    layers = _layers_of(model)
    for name, parameter in model.named_parameters():
        if not _is_of_experts(name, layers) and parameter.requires_grad:
            grad = parameter.grad
            outcome.dense[name] = torch.zeros_like(parameter) if grad is None else grad
    for path, layer in layers.items():
        outcome.counts[path] = layer.context.counts_E
        _collect_experts(outcome, path, layer.experts)


def _collect_experts(outcome: _Outcome, path: str, bank: ExpertBank) -> None:
    grad = bank.weight.grad
    for slot, expert in enumerate(bank.expert_of_slot):
        if expert >= 0:
            place = f"of expert {expert} of layer {path!r}"
            for name, value in bank.values(slot).items():
                outcome.values[f"initial value of {name} {place}"] = value
            views = {} if grad is None else bank.field_views(grad[slot])
            for name, view in views.items():
                outcome.gradients[f"gradient of {name} {place}"] = view


def _compare(found: _Outcome, expected: _Outcome, name: str) -> None:
    for what, value in found.values.items():
        _close(value, expected.values[what], what, name)
    for place, rows in found.outputs.items():
        _close(rows, expected.outputs[place], f"output of rank {place[0]}", name)
    for path, counts_E in found.counts.items():
        assert torch.equal(counts_E, expected.counts[path]), (
            f"{path} counts {counts_E.tolist()} choices, alone {expected.counts[path].tolist()}; "
            f"tokens of a rank without samples must not count ({name})"
        )
    for key, grad in found.dense.items():
        _close(grad, expected.dense[key], f"gradient of {key}", name)
    for what, grad in found.gradients.items():
        _close(grad, expected.gradients.get(what, torch.zeros_like(grad)), what, name)


def _close(found: Tensor, expected: Tensor, what: str, name: str) -> None:
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    error = float((found - expected).abs().max()) if found.numel() else 0.0
    assert error <= _TOLERANCE * scale + 1e-7, (
        f"{what} differs by {error:.2g} from that of one rank with every expert ({name})"
    )


def _check_alone(build: Build, call: Call, x_TD: Tensor, seed: int) -> None:
    """What holds of one layer without a run."""
    model = _built(build, seed)
    layers = _layers_of(model)
    for path, layer in layers.items():
        _check_attach(path, layer)
    y_TD = call(model, x_TD)
    copied = copy.deepcopy(model)
    take_auxiliary(model)
    for path, layer in _layers_of(copied).items():
        own = layers[path]
        assert layer.context is not own.context, f"a copy of {path} shares its context"
        assert layer.experts is not own.experts, f"a copy of {path} shares its experts"
    assert torch.equal(call(copied, x_TD), y_TD), "a copy of the layer gives another output"
    counts = {path: layer.context.counts_E.clone() for path, layer in layers.items()}
    model.eval()
    with torch.no_grad():
        call(model, x_TD)
    model.train()
    for path, layer in layers.items():
        assert torch.equal(layer.context.counts_E, counts[path]), (
            f"{path} counts the tokens of an evaluation"
        )
    _check_repeated(build, call, x_TD, seed)


def _check_attach(path: str, layer: ElasticLayer) -> None:
    wrong = RoutingTable.solo(layer.num_experts + 1)
    try:
        layer.attach(LayerContext(layer=0, exchange=SoloExchange(), table=wrong))
    except RoutingTableError:
        layer.attach(None)
        return
    raise AssertionError(f"{path}.attach takes a table of another number of experts")


def _check_repeated(build: Build, call: Call, x_TD: Tensor, seed: int) -> None:
    """Activation checkpointing repeats a forward: it counts once, and changes no gradient."""
    outcomes = []
    for repeats in (False, True):
        model = _built(build, seed)
        rows = x_TD.clone().requires_grad_()
        y_TD = checkpoint(call, model, rows, use_reentrant=False) if repeats else call(model, rows)
        assert isinstance(y_TD, Tensor)
        auxiliary = take_auxiliary(model)
        loss = y_TD.float().square().sum()
        loss = loss if auxiliary is None else loss + auxiliary
        loss.backward()  # type: ignore[no-untyped-call]
        outcome = _Outcome(outputs={(0, 0): y_TD.detach()})
        _collect(outcome, model)
        outcomes.append(outcome)
    _compare(outcomes[1], outcomes[0], "under activation checkpointing")

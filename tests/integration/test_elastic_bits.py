"""train.elastic_determinism: equal bits on any number of ranks, and those of a loop of plain torch.

Loopback ranks are threads of this process; what needs processes is in ``tests/fault``.
"""

from __future__ import annotations

import runpy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dispatcher import Exchange, run_ranks
from lazarus.data.sampler import step_sample_ids
from lazarus.data.units import Units
from lazarus.runtime.fence.ledger import StepLedger
from lazarus.runtime.training import defaults

ranks = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("reference_rank.py"))))
CONFIG = ranks.CONFIG
SLOW = pytest.mark.slow
UNITS = Units(
    global_batch=CONFIG.train.global_batch, unit_size=CONFIG.train.micro_batch_size
)  # six units, the last one smaller


@dataclass
class Trained:
    """What is compared bit for bit: the scalars of every step, and the state at last, by name."""

    scalars: list[tuple[float, ...]]
    state: dict[str, np.ndarray]

    def differ(self, other: Trained) -> list[str]:
        """Names of tensors, and steps, whose bits differ."""
        assert set(self.state) == set(other.state)
        found = [n for n, t in self.state.items() if t.tobytes() != other.state[n].tobytes()]
        pairs = zip(self.scalars, other.scalars, strict=True)
        return found + [f"step {n}" for n, (a, b) in enumerate(pairs, start=1) if a != b]


def train(
    size: int, *, steps: int = 6, units: Units = UNITS, top_k: int = 2, **options: Any
) -> Trained:
    def body(exchange: Exchange) -> Trained:
        replica, step = ranks.make_step(
            exchange, top_k=top_k, ledger=StepLedger(), units=units, **options
        )
        exchange.all_reduce(torch.zeros(1), label="digest")  # all have drawn their weights
        scalars = []
        for number in range(1, steps + 1):
            lanes = step.compute(number, pause=lambda: False, prepared=lambda: None)
            sums = step.check(lanes, step=number)
            norm = replica.apply(sums, dense_square=step.dense_square)
            scalars.append((sums.loss, sums.aux_sum, norm))
        state = dict(replica.dense_tensors())
        for layer, bank in enumerate(replica.banks):
            for expert in (e for e in bank.expert_of_slot if e >= 0):
                state.update(replica.expert_tensors(layer, expert))
        return Trained(scalars, {name: t.numpy().copy() for name, t in state.items()})

    parts = run_ranks(body, size=size)
    merged: dict[str, np.ndarray] = {}
    for part in parts:
        assert part.scalars == parts[0].scalars
        for name, tensor in part.state.items():
            assert merged.setdefault(name, tensor).tobytes() == tensor.tobytes(), name
    return Trained(parts[0].scalars, merged)


@cache
def alone(top_k: int = 2, steps: int = 6, num_chains: int = 1) -> Trained:
    return train(1, top_k=top_k, steps=steps, num_chains=num_chains)


@pytest.mark.parametrize("size", [3, 4, *(pytest.param(n, marks=SLOW) for n in (2, 5, 7))])
def test_any_number_of_ranks_has_the_bits_of_one(size: int) -> None:
    assert train(size, placement_seed=size, floor=1 + size % 3).differ(alone()) == []


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("top_k", "num_chains", "sizes"), [(2, 1, (2, 3, 4, 5, 7)), (1, 4, (3, 4)), (3, 1, (5,))]
)
def test_sixty_steps_over_many_placements_have_the_bits_of_one_rank(
    top_k: int, num_chains: int, sizes: tuple[int, ...]
) -> None:
    wanted = alone(top_k, 60, num_chains)
    for size in sizes:
        options = {"placement_seed": size, "floor": 1 + size % 3, "num_chains": num_chains}
        assert train(size, steps=60, top_k=top_k, **options).differ(wanted) == [], size


@pytest.mark.parametrize("balance", ["bias", pytest.param("none", marks=SLOW)])
def test_balancing_by_bias_has_the_bits_of_one_rank(balance: str) -> None:
    assert train(3, balance=balance).differ(train(1, balance=balance)) == []


@pytest.mark.parametrize("unit_size", [3, *(pytest.param(n, marks=SLOW) for n in (1, 4))])
def test_other_units_are_another_training_and_the_same_on_all_ranks(unit_size: int) -> None:
    units = Units(global_batch=UNITS.global_batch, unit_size=unit_size)
    one = train(1, units=units)
    assert train(3, units=units).differ(one) == []
    assert one.differ(alone()) != []


@pytest.mark.slow
def test_overlapped_sums_change_no_bit() -> None:
    assert train(3, overlaps=True).differ(alone()) == []


# ---- plain torch ---------------------------------------------------------------------------------


FIELDS = ("w_in", "b_in", "w_out", "b_out")  # an expert's gradient is one row, in this order


class PlainExperts(nn.Module):
    """The MoE layer as one would write it without this project, expert after expert."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.router = nn.Parameter(layer.router.weight.detach().clone())
        self.top_k, self.coefficient = layer.top_k, layer.aux_coef
        rows = layer.experts.weight.detach()
        fields = [layer.experts.field_views(row) for row in rows]
        self.fields = nn.ModuleList(
            nn.ParameterDict({n: nn.Parameter(t.clone()) for n, t in one.items()}) for one in fields
        )
        self.expected = torch.full((len(rows),), 1 / len(rows))
        self.counts = torch.zeros(len(rows), dtype=torch.int64)
        self.auxiliary = torch.zeros(())

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        score_TE = torch.softmax(F.linear(x_TD, self.router), -1)
        expert_TK = score_TE.topk(self.top_k).indices
        gate_TK = score_TE.gather(1, expert_TK)
        self.auxiliary = (score_TE @ self.expected).sum() * (self.coefficient * len(self.fields))
        copy_ND = x_TD[:, None].expand(-1, self.top_k, -1).reshape(-1, x_TD.shape[1])
        y_ND = torch.zeros_like(copy_ND)
        for expert, f in enumerate(self.fields):
            rows = (expert_TK.reshape(-1) == expert).nonzero()[:, 0]
            self.counts[expert] += len(rows)
            if len(rows):
                hidden = F.gelu(_product(copy_ND[rows], f["w_in"], f["b_in"]))
                y_ND = y_ND.index_copy(0, rows, _product(hidden, f["w_out"], f["b_out"]))
        y_TKD = y_ND.view(-1, self.top_k, x_TD.shape[1])
        out = y_TKD[:, 0] * gate_TK[:, :1]
        for k in range(1, self.top_k):
            out = torch.addcmul(out, y_TKD[:, k], gate_TK[:, k : k + 1])
        return out.view_as(x_BSD)


class _Product(torch.autograd.Function):
    """``rows @ w + b``; products of fewer than 16 rows use other kernels, so these are padded."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, w: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(rows, w)
        return torch.addmm(b, _padded(rows), w)[: len(rows)]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        (grad,), (rows, w) = grads, ctx.saved_tensors
        back = torch.mm(_padded(grad), w.t())[: len(rows)]
        return back, torch.mm(rows.t(), grad.contiguous()), grad.sum(0)


def _product(rows: Tensor, w: Tensor, b: Tensor) -> Tensor:
    out: Tensor = _Product.apply(rows, w, b)  # type: ignore[no-untyped-call]
    return out


def _padded(rows: Tensor) -> Tensor:
    return F.pad(rows, (0, 0, 0, max(0, 16 - len(rows))))


def plain(steps: int) -> tuple[list[float], dict[str, np.ndarray]]:
    """A loop over units with ``backward`` for each, torch's AdamW, and clipping by hand."""
    torch.manual_seed(CONFIG.run.seed)
    model = ranks.make_model(2)
    names = [name for name, m in model.named_modules() if hasattr(m, "experts")]
    for name in names:
        parent = model.get_submodule(name.rpartition(".")[0])
        parent.ffn = PlainExperts(parent.ffn)
    layers = [model.get_submodule(name) for name in names]
    experts = {id(p) for layer in layers for p in layer.fields.parameters()}
    dense = [p for p in model.parameters() if id(p) not in experts]
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2]},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optim = CONFIG.optim
    settings = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps}
    optimizer = torch.optim.AdamW(groups, **settings, weight_decay=optim.weight_decay, fused=True)
    rate, data, losses = defaults.schedule(CONFIG), ranks.Tokens(), []
    for step in range(1, steps + 1):
        ids = step_sample_ids(CONFIG.run.seed, step, CONFIG.train.global_batch, len(data))
        optimizer.zero_grad()
        total, count = 0.0, 0
        for unit in range(UNITS.count):
            tokens = torch.stack([data[int(ids[i])]["tokens"] for i in UNITS.samples(unit)])
            logits = model(tokens[:, :-1])
            wanted = tokens[:, 1:].reshape(-1)
            loss = F.cross_entropy(logits.flatten(0, 1), wanted, reduction="sum")
            (loss + sum(layer.auxiliary for layer in layers)).backward()
            total, count = total + float(loss.detach()), count + wanted.numel()
        losses.append(total / count)
        norm = np.sqrt(_square(_flat(dense)) + _experts_square(layers)) / count
        scale = min(1.0, optim.clip_norm / (norm + 1e-6)) / count
        for parameter in model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)  # an expert without tokens decays too
            parameter.grad.mul_(scale)
        for group in optimizer.param_groups:
            group["lr"] = optim.lr * rate(step)
        optimizer.step()
        for layer in layers:
            layer.expected = (layer.counts.double() / int(layer.counts.sum())).float()
            layer.counts.zero_()
    state = {}
    for kind in ("model", "exp_avg", "exp_avg_sq"):
        for name, parameter in model.named_parameters():
            value = parameter if kind == "model" else optimizer.state[parameter][kind]
            prefix = "model" if kind == "model" else f"optimizer.{kind}"
            name = name.replace(".fields.", ".experts.")
            name = name.replace(".router", ".router.weight") if name.endswith(".router") else name
            state[f"{prefix}.{name}"] = value.detach().numpy().copy()
    return losses, state


def _flat(parameters: list[nn.Parameter]) -> Tensor:
    return torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None])


def _experts_square(layers: list[Any]) -> float:
    """Sum over [layers, experts]; an expert's gradient is one row, its fields in order."""
    squares = np.zeros((len(layers), len(layers[0].fields)))
    for at, layer in enumerate(layers):
        for expert, f in enumerate(layer.fields):
            if f["w_in"].grad is not None:
                squares[at, expert] = _square(
                    F.pad(_flat([f[name] for name in FIELDS]), (0, -_numel(f) % 16))
                )
    return float(squares.sum())


def _numel(fields: nn.ParameterDict) -> int:
    return sum(p.numel() for p in fields.values())


def _square(flat: Tensor) -> float:
    """Squares in stretches of 4,096 elements, whose norms are added in double precision."""
    whole = len(flat) // 4096 * 4096
    norms = torch.linalg.vector_norm(flat[:whole].view(-1, 4096), dim=1)
    rest = torch.linalg.vector_norm(flat[whole:]).view(1)
    return float(torch.cat([norms, rest]).double().square().sum())


@pytest.mark.timeout(300)
@pytest.mark.parametrize("steps", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_the_bits_are_those_of_a_loop_of_plain_torch(steps: int) -> None:
    losses, state = plain(steps)
    for got in (alone(2, steps), train(3, steps=steps)):
        assert [scalars[0] for scalars in got.scalars] == losses
        odd = [n for n, t in got.state.items() if t.tobytes() != state[n].tobytes()]
        assert set(got.state) == set(state)
        assert odd == []

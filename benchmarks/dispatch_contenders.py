"""The contenders of dispatch_vs_peers.py: one GPT around five kinds of feed-forward.

All share embeddings, attention, norms, head, the flat buffer for dense gradients and fused AdamW;
they differ in the feed-forward alone and in how its gradients are brought together.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from dispatch_loads import HEADS, LAYERS, SEQ, VOCAB, Setting, choices, loads_before
from torch import Tensor, nn

from dispatcher import (
    Exchange,
    RoutingTable,
    SplitRule,
    flat_all_reduce,
    shared_zeros,
    slots_for_exchange,
    sum_replica_gradients,
)
from lazarus.model import gpt
from lazarus.model.balance import expected_fractions
from lazarus.model.context import LayerContext
from lazarus.model.experts import deferred_experts
from lazarus.model.moe import MoELayer, moe_layers, take_auxiliary
from placement import PlacementRequest, Plan, plan


class Contender:
    """A model with its optimizer and its way to synchronise; ``step`` is one whole step."""

    def __init__(self, name: str, setting: Setting, exchange: Exchange) -> None:
        self.name, self.setting, self.exchange = name, setting, exchange
        torch.manual_seed(1)
        with deferred_experts():
            self.model = gpt.build(_shape(setting))
        self._place_experts()
        dense = [p for n, p in self.model.named_parameters() if not self._is_expert(n, p)]
        self.flat, self.flat_grad = _flattened(dense)
        self.experts = [p for n, p in self.model.named_parameters() if self._is_expert(n, p)]
        flat = nn.Parameter(self.flat)
        flat.grad = self.flat_grad
        self.optimizer = torch.optim.AdamW([flat, *self.experts], lr=3e-4, fused=True)

    def step(self, batch: dict[str, Tensor]) -> float:
        """Forward, backward, synchronisation, optimizer; returns this rank's loss sum."""
        tokens_all = self.exchange.size * batch["tokens"][:, 1:].numel()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.setting.bf16):
            total, _ = gpt.loss(self.model, batch)
        aux = self._auxiliary()
        ((total if aux is None else total + aux) / tokens_all).backward()
        self._synchronise()
        self.optimizer.step()
        self.flat_grad.zero_()
        if not isinstance(self, Ours):  # ours overwrites
            for p in self.experts:
                p.grad = None
        return float(total.detach())

    def _place_experts(self) -> None:
        """Put this contender's feed-forward where the MoE layers stand."""

    def _is_expert(self, name: str, parameter: nn.Parameter) -> bool:
        return name.endswith("experts.weight") or ".local_experts." in name

    def _auxiliary(self) -> Tensor | None:
        return None

    def _synchronise(self) -> None:
        flat_all_reduce(self.flat_grad, self.exchange)

    def settle(self) -> None:
        """Called by all ranks after the warm-up, before anything is timed."""

    def load(self) -> float:
        """Largest over mean load of an expert in the last step, asked of all ranks; 0: unknown."""
        return 0.0


class Ours(Contender):
    """Lazarus: every expert with ``replicas`` replicas, norm and commit included."""

    def __init__(
        self, name: str, setting: Setting, exchange: Exchange, *, rule: SplitRule,
        replicas: int = 2, commit: bool = True,
    ) -> None:  # fmt: skip
        self.replicas, self.commit, self.rule = replicas, commit, rule
        super().__init__(name, setting, exchange)

    def _place_experts(self) -> None:
        for index, layer in enumerate(moe_layers(self.model).values()):
            table = self._table(placement_by_load(self.setting, self.replicas, index))
            held = slots_for_exchange(table)
            layer.experts.allocate(num_slots=len(held), device="cpu")
            layer.experts.weight.grad = shared_zeros(layer.experts.weight.shape)
            for slot, expert in enumerate(held):
                layer.experts.assign(slot, expert)
                layer.experts.initialise(slot)
            self._attach(index, layer, table)

    def _table(self, placed: Plan) -> RoutingTable:
        return RoutingTable.from_plan_arrays(
            placed.expert_of_slot[0], rank=self.exchange.rank, home_E=placed.home[0]
        )

    def _attach(self, index: int, layer: MoELayer, table: RoutingTable) -> None:
        layer.attach(LayerContext(layer=index, exchange=self.exchange, table=table, rule=self.rule))
        layer.context.written = set()
        if not self.setting.own:
            forced_TK = choices(self.setting, rank=self.exchange.rank, layer=index)
            layer.context.forced_TK = forced_TK

    def settle(self) -> None:
        """Experts placed anew, by the loads of the last step, as a run does it."""
        if not self.setting.own:
            return
        for index, layer in enumerate(moe_layers(self.model).values()):
            bank = layer.experts
            state = self.optimizer.state[bank.weight]
            moved = [bank.weight.detach(), state["exp_avg"], state["exp_avg_sq"]]
            whole = [self._gathered(rows, layer) for rows in moved]
            table = self._table(planned(self.last_counts[index], self.setting, self.replicas))
            bank.expert_of_slot[:] = slots_for_exchange(table)
            for rows, all_EP in zip(moved, whole, strict=True):
                rows.copy_(all_EP[bank.expert_of_slot])
            expected_E = layer.context.expected_E
            self._attach(index, layer, table)
            layer.context.expected_E = expected_E

    def _gathered(self, rows: Tensor, layer: MoELayer) -> Tensor:
        """All experts' rows from their homes."""
        all_EP = rows.new_zeros(self.setting.experts, rows.shape[1])
        for slot, expert in enumerate(layer.experts.expert_of_slot):
            if layer.context.table.home_E[expert] == self.exchange.rank:
                all_EP[expert] = rows[slot]
        self.exchange.all_reduce(all_EP, label="digest")
        return all_EP

    def _auxiliary(self) -> Tensor | None:
        return take_auxiliary(self.model)

    def _synchronise(self) -> None:
        dense = self.exchange.start_all_reduce(self.flat_grad, label="dense_grad")
        for layer in moe_layers(self.model).values():
            bank, context = layer.experts, layer.context
            assert bank.weight.grad is not None
            sum_replica_gradients(
                bank.weight.grad, context.table, self.exchange, served_ER=context.served_ER,
                expert_of_slot=bank.expert_of_slot, written=context.written,
            )  # fmt: skip
        dense.wait()
        self._commit()
        self.last_counts = [m.context.counts_E.clone() for m in moe_layers(self.model).values()]
        for layer in moe_layers(self.model).values():
            layer.context.expected_E = expected_fractions(layer.context.counts_E)
            layer.context.start_step()

    def _commit(self) -> None:
        """The norm over the dense part and this rank's own experts; then the commit barrier."""
        vector = torch.zeros(16, dtype=torch.float64)
        vector[0] = 1
        for layer in moe_layers(self.model).values():
            grad = layer.experts.weight.grad
            assert grad is not None
            for slot, expert in enumerate(layer.experts.expert_of_slot):
                if expert >= 0 and layer.context.table.home_E[expert] == self.exchange.rank:
                    vector[1] += float(torch.dot(grad[slot], grad[slot]))
        dense = float(torch.dot(self.flat_grad, self.flat_grad))
        if self.commit:
            self.exchange.all_reduce(vector, label="commit")
        self.norm = math.sqrt(float(vector[1]) + dense)

    def load(self) -> float:
        return max(float(c.max() / c.double().mean()) for c in self.last_counts)


class PlainLayer(nn.Module):
    """Dropless expert parallelism as it is usually written: argsort, all-to-all, autograd."""

    def __init__(self, setting: Setting, exchange: Exchange, index: int) -> None:
        super().__init__()
        self.setting, self.exchange = setting, exchange
        self.local = setting.experts // setting.ranks
        self.router = nn.Linear(setting.dim, setting.experts, bias=False)
        self.local_experts = nn.ModuleList(
            gpt.FeedForward(setting.dim, setting.hidden) for _ in range(self.local)
        )
        self.forced = choices(setting, rank=exchange.rank, layer=index)

    def forward(self, x_BSD: Tensor) -> Tensor:
        x = x_BSD.reshape(-1, self.setting.dim)
        with torch.autocast("cpu", enabled=False):
            score = self.router(x.float()).softmax(-1)
        choice = score.detach().topk(self.setting.top_k).indices
        if not self.setting.own:
            choice = self.forced  # as all others
        weight = score.gather(1, choice)
        order = choice.flatten().argsort(stable=True)
        counts = torch.bincount(choice.flatten(), minlength=self.setting.experts)
        everyone = torch.empty(self.setting.ranks, self.setting.experts, dtype=counts.dtype)
        self.exchange.all_gather(everyone.view(-1), counts, label="counts")
        rank, local = self.exchange.rank, self.local
        send = counts.view(-1, local).sum(1).tolist()
        mine = everyone[:, rank * local : (rank + 1) * local]
        recv = mine.sum(1).tolist()
        rows = _Exchanged.apply(x[order // self.setting.top_k], send, recv, self.exchange)
        expert_of_row = torch.arange(local).repeat(self.setting.ranks)
        expert_of_row = expert_of_row.repeat_interleave(mine.flatten())
        by_expert = expert_of_row.argsort(stable=True)
        parts = rows[by_expert].split(mine.sum(0).tolist())
        out = torch.cat([e(p) for e, p in zip(self.local_experts, parts, strict=True)])
        back = torch.empty_like(out).index_copy(0, by_expert, out)
        y = _Exchanged.apply(back, recv, send, self.exchange)
        y = torch.empty_like(y).index_copy(0, order, y)
        y = y.view(-1, self.setting.top_k, self.setting.dim) * weight[..., None]
        return y.sum(1).to(x_BSD.dtype).view_as(x_BSD)


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, send: list[int], recv: list[int], via: Exchange) -> Tensor:
        ctx.back = (recv, send, via)
        out = x.new_empty(sum(recv), x.shape[1])
        via.all_to_all(out, x.contiguous(), output_splits=recv, input_splits=send, label="dispatch")
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        send, recv, via = ctx.back
        out = grads[0].new_empty(sum(recv), grads[0].shape[1])
        via.all_to_all(
            out, grads[0].contiguous(), output_splits=recv, input_splits=send, label="combine"
        )
        return out, None, None, None


class Plain(Contender):
    """One replica of each expert, plain all-to-all."""

    def _place_experts(self) -> None:
        for index, block in enumerate(moe_blocks(self.model)):
            layer = PlainLayer(self.setting, self.exchange, index)
            same_router(layer.router, block.ffn)
            for i, expert in enumerate(layer.local_experts):
                same_expert(expert, block.ffn, self.exchange.rank * layer.local + i)
            block.ffn = layer


class Dense(Contender):
    """No experts: a feed-forward of the same active size."""

    def _place_experts(self) -> None:
        for block in moe_blocks(self.model):
            block.ffn = gpt.FeedForward(self.setting.dim, self.setting.hidden * self.setting.top_k)


def moe_blocks(model: gpt.GPT) -> list[gpt.Block]:
    """Blocks whose feed-forward is an MoE layer."""
    return [b for b in model.blocks if isinstance(b, gpt.Block) and isinstance(b.ffn, MoELayer)]


@cache
def placement_by_load(setting: Setting, replicas: int, layer: int) -> Plan:
    """Where ours holds its experts: planned, as in a run, from the loads of the steps before."""
    load_E = loads_before(setting, layer=layer)
    return planned(torch.ones_like(load_E) if setting.own else load_E, setting, replicas)


def planned(load_E: Tensor, setting: Setting, replicas: int) -> Plan:
    """A plan that fills as few slots as the replicas need."""
    copies = min(replicas, setting.ranks)
    return plan(
        PlacementRequest(
            load=load_E.numpy(), num_nodes=setting.ranks, min_replicas=copies,
            slots_per_node=-(-setting.experts * copies // setting.ranks),
        )
    )  # fmt: skip


def same_router(router: nn.Linear, layer: MoELayer) -> None:
    """Give a peer's router the weights that ours begins with."""
    router.weight.data.copy_(layer.router.weight.detach())


def same_expert(expert: gpt.FeedForward, layer: MoELayer, number: int) -> None:
    """Give a peer's expert the weights that ours of this number begins with."""
    bank = layer.experts
    bank.allocate(num_slots=1, device="cpu")
    bank.assign(0, number)
    bank.initialise(0)
    fields = bank.field_views(bank.weight.detach()[0])
    expert.up.weight.data.copy_(fields["w_in"].t())
    expert.down.weight.data.copy_(fields["w_out"].t())
    expert.up.bias.data.copy_(fields["b_in"])
    expert.down.bias.data.copy_(fields["b_out"])


def _shape(setting: Setting) -> gpt.GPTConfig:
    return gpt.GPTConfig(
        layers=LAYERS, dim=setting.dim, heads=HEADS, vocab=VOCAB, seq_len=SEQ,
        experts=setting.experts, top_k=setting.top_k, moe_every=setting.moe_every,
    )  # fmt: skip


def _flattened(parameters: list[nn.Parameter]) -> tuple[Tensor, Tensor]:
    """All parameters and gradients as views into two flat tensors, each on a cache line."""
    starts, at = [], 0
    for p in parameters:
        starts.append(at)
        at += -(-p.numel() // 16) * 16
    flat, grad = torch.zeros(at), shared_zeros((at,))
    for start, p in zip(starts, parameters, strict=True):
        view = flat[start : start + p.numel()].view(p.shape)
        view.copy_(p.detach())
        p.data = view
        p.grad = grad[start : start + p.numel()].view(p.shape)
    return flat, grad


def gelu_forward_flops(setting: Setting) -> float:
    """Products of one rank's tokens with its k experts, forward, per MoE layer."""
    return 4.0 * setting.batch * SEQ * setting.top_k * setting.dim * setting.hidden

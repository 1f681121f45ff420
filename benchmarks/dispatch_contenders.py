"""The contenders of dispatch_vs_peers.py: one GPT around five kinds of feed-forward.

All share embeddings, attention, norms, head, the flat buffer for dense gradients and fused AdamW;
they differ in the feed-forward alone and in how its gradients are brought together.
"""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dispatcher import (
    Exchange,
    RoutingTable,
    flat_all_reduce,
    shared_zeros,
    slots_for_exchange,
    sum_replica_gradients,
)
from lazarus.model import gpt
from lazarus.model.context import LayerContext
from lazarus.model.experts import deferred_experts
from lazarus.model.moe import MoELayer, moe_layers, take_auxiliary
from placement import PlacementRequest, Plan, plan

DIM, HIDDEN, HEADS, VOCAB, SEQ = 256, 1024, 4, 256, 128
LAYERS = 4


@dataclass(frozen=True)
class Setting:
    """One shape of the comparison."""

    ranks: int
    experts: int
    top_k: int
    moe_every: int = 2
    batch: int = 4
    hot: bool = False
    zipf: bool = False
    own: bool = False  # every contender goes by its own router, from the same weights
    bf16: bool = False
    dim: int = DIM

    @property
    def hidden(self) -> int:
        return 4 * self.dim

    @property
    def routing(self) -> str:
        return "own" if self.own else "hot" if self.hot else "zipf" if self.zipf else "mild"

    def __str__(self) -> str:
        name = f"{self.ranks} ranks, E={self.experts}, k={self.top_k}"
        name += ", MoE in every layer" if self.moe_every == 1 else ""
        name += ", half of all copies to one expert" if self.hot else ""
        name += ", Zipf popularity" if self.zipf else ""
        name += ", each by its own router" if self.own else ""
        name += f", d={self.dim}" if self.dim != DIM else ""
        return name + (", bf16 autocast" if self.bf16 else "")


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

    def load(self) -> float:
        """Largest over mean load of an expert in the last step; 0 where unknown."""
        return 0.0


class Ours(Contender):
    """Lazarus: every expert with ``replicas`` replicas, home mode, norm and commit included."""

    def __init__(
        self, name: str, setting: Setting, exchange: Exchange, *, replicas: int = 2,
        commit: bool = True, mode: str = "home",
    ) -> None:  # fmt: skip
        self.replicas, self.commit, self.mode = replicas, commit, mode
        super().__init__(name, setting, exchange)

    def _place_experts(self) -> None:
        placed = placement_by_load(self.setting, self.replicas)
        for index, layer in enumerate(moe_layers(self.model).values()):
            table = RoutingTable.from_plan_arrays(
                placed.expert_of_slot[0], rank=self.exchange.rank, home_E=placed.home[0]
            )
            held = slots_for_exchange(table)
            layer.experts.allocate(num_slots=len(held), device="cpu")
            layer.experts.weight.grad = shared_zeros(layer.experts.weight.shape)
            for slot, expert in enumerate(held):
                layer.experts.assign(slot, expert)
                layer.experts.initialise(slot)
            layer.attach(
                LayerContext(layer=index, exchange=self.exchange, table=table, mode=self.mode)
            )
            layer.context.written = set()
            if not self.setting.own:
                layer.context.forced_TK = choices(self.setting, rank=self.exchange.rank)

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

    def __init__(self, setting: Setting, exchange: Exchange) -> None:
        super().__init__()
        self.setting, self.exchange = setting, exchange
        self.local = setting.experts // setting.ranks
        self.router = nn.Linear(setting.dim, setting.experts, bias=False)
        self.local_experts = nn.ModuleList(
            gpt.FeedForward(setting.dim, setting.hidden) for _ in range(self.local)
        )
        self.forced = choices(setting, rank=exchange.rank)

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
        for block in moe_blocks(self.model):
            block.ffn = PlainLayer(self.setting, self.exchange)


class Dense(Contender):
    """No experts: a feed-forward of the same active size."""

    def _place_experts(self) -> None:
        for block in moe_blocks(self.model):
            block.ffn = gpt.FeedForward(self.setting.dim, self.setting.hidden * self.setting.top_k)


class DeepSpeedLayer(nn.Module):
    """``deepspeed.moe.layer.MoE`` over all ranks, its defaults but for the named ones."""

    def __init__(self, setting: Setting, *, drop: bool, rank: int) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        expert = gpt.FeedForward(setting.dim, setting.hidden)
        self.moe = MoE(
            setting.dim, expert, num_experts=setting.experts, ep_size=setting.ranks,
            k=setting.top_k, capacity_factor=1.25, drop_tokens=drop,
        )  # fmt: skip
        self.moe.set_deepspeed_parallelism()
        self.auxiliary: Tensor | None = None

    def forward(self, x_BSD: Tensor) -> Tensor:
        out, self.auxiliary, self.counts = self.moe(x_BSD)
        return out.to(x_BSD.dtype)


class DeepSpeed(Contender):
    """DeepSpeed's layer in the same model and step; dropping at capacity 1.25, or not at all."""

    def __init__(self, name: str, setting: Setting, exchange: Exchange, *, drop: bool) -> None:
        self.drop = drop
        super().__init__(name, setting, exchange)

    def _place_experts(self) -> None:
        prepare_deepspeed(self.setting, rank=self.exchange.rank)
        for block in moe_blocks(self.model):
            layer = DeepSpeedLayer(self.setting, drop=self.drop, rank=self.exchange.rank)
            block.ffn = layer

    def _is_expert(self, name: str, parameter: nn.Parameter) -> bool:
        return not getattr(parameter, "allreduce", True)

    def _auxiliary(self) -> Tensor | None:
        tokens = self.setting.batch * SEQ
        layers = [m for m in self.model.modules() if isinstance(m, DeepSpeedLayer)]
        return sum(0.01 * tokens * m.auxiliary for m in layers if m.auxiliary is not None)


def prepare_deepspeed(setting: Setting, *, rank: int) -> None:
    """Initialise DeepSpeed on the default group, without compiling its shared-memory operator."""
    import deepspeed
    from deepspeed.moe import sharded_moe

    if not deepspeed.comm.is_initialized():
        os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(setting.ranks))
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
        deepspeed.init_distributed("gloo", dist_init_required=False, verbose=False)
    if not setting.own and not hasattr(sharded_moe, "unforced"):
        sharded_moe.unforced = (sharded_moe.top1gating, sharded_moe.top2gating)
        logits = torch.zeros(setting.batch * SEQ, setting.experts)
        order = torch.arange(setting.top_k, 0, -1).float() + 50.0
        chosen = choices(setting, rank=rank)
        logits.scatter_(1, chosen, order.expand(chosen.shape).contiguous())
        for name, original in zip(("top1gating", "top2gating"), sharded_moe.unforced, strict=True):
            setattr(sharded_moe, name, _forced(original, logits))


def _forced(original: Any, logits: Tensor) -> Any:
    return lambda own, *rest: original(own * 0 + logits, *rest)


def moe_blocks(model: gpt.GPT) -> list[gpt.Block]:
    """Blocks whose feed-forward is an MoE layer."""
    return [b for b in model.blocks if isinstance(b, gpt.Block) and isinstance(b.ffn, MoELayer)]


def choices(setting: Setting, *, rank: int) -> Tensor:
    """Where this rank's tokens go, the same for all contenders, int64 [T, K].

    Popularity falls linearly from 1.6 to 0.4 times the mean; or, Zipf, like 1 / rank, about as
    uneven as routers are in their first steps and in published traces; or, hot, half of all copies
    go to expert 0 and the others alike.
    """
    random = np.random.default_rng(rank)
    tokens = setting.batch * SEQ
    if not setting.hot:
        popularity = np.linspace(1.6, 0.4, setting.experts)
        if setting.zipf:
            popularity = 1.0 / np.arange(1, setting.experts + 1)
        key = np.log(popularity) + random.gumbel(size=(tokens, setting.experts))
        return torch.from_numpy(np.ascontiguousarray((-key).argsort(1)[:, : setting.top_k]))
    others = random.integers(1, setting.experts, size=tokens)
    if setting.top_k == 1:
        return torch.from_numpy(np.where(np.arange(tokens) % 2 == 0, 0, others)[:, None])
    return torch.from_numpy(np.stack([np.zeros_like(others), others], axis=1))


@cache
def placement_by_load(setting: Setting, replicas: int) -> Plan:
    """Where ours holds its experts: planned, as in a run, from the loads of the steps before."""
    chosen = [choices(setting, rank=rank).flatten() for rank in range(setting.ranks)]
    load = torch.bincount(torch.cat(chosen), minlength=setting.experts)
    copies = min(replicas, setting.ranks)
    return plan(
        PlacementRequest(
            load=load.numpy(), num_nodes=setting.ranks, min_replicas=copies,
            slots_per_node=-(-setting.experts * copies // setting.ranks),
        )
    )  # fmt: skip


def join_default_group(exchange: Exchange) -> None:
    """A default process group beside the exchange's own, for DeepSpeed."""
    if dist.is_initialized():
        return
    port = torch.zeros(1, dtype=torch.int64)
    store = None
    if exchange.rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port[0] = store.port
    exchange.all_reduce(port, label="digest")
    store = store or dist.TCPStore("127.0.0.1", int(port), is_master=False)
    dist.init_process_group("gloo", store=store, rank=exchange.rank, world_size=exchange.size)


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


__all__ = ["Contender", "DeepSpeed", "Dense", "F", "Ours", "Plain", "Setting"]

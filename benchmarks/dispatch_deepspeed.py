"""DeepSpeed-MoE as a contender of dispatch_vs_peers.py: its layer in the same model and step."""

from __future__ import annotations

import math
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from dispatch_contenders import Contender, moe_blocks, same_expert, same_router
from dispatch_loads import SEQ, Setting, choices
from torch import Tensor, nn

from dispatcher import Exchange
from lazarus.model import gpt


class DeepSpeedLayer(nn.Module):
    """``deepspeed.moe.layer.MoE`` over all ranks, its defaults but for the named ones."""

    def __init__(self, setting: Setting, *, drop: bool, rank: int, index: int) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        expert = gpt.FeedForward(setting.dim, setting.hidden)
        self.moe = MoE(
            setting.dim, expert, num_experts=setting.experts, ep_size=setting.ranks,
            k=setting.top_k, capacity_factor=1.25, drop_tokens=drop,
        )  # fmt: skip
        self.moe.set_deepspeed_parallelism()
        self.auxiliary: Tensor | None = None
        self.forced = None if setting.own else _forcing_logits(setting, rank=rank, layer=index)
        self.counts_E = torch.zeros(setting.experts)  # this rank's copies, before any is dropped

    def forward(self, x_BSD: Tensor) -> Tensor:
        _forced.logits = self.forced
        out, self.auxiliary, self.counts_E = self.moe(x_BSD)
        return out.to(x_BSD.dtype)


class DeepSpeed(Contender):
    """DeepSpeed's layer in the same model and step; dropping at capacity 1.25, or not at all."""

    def __init__(self, name: str, setting: Setting, exchange: Exchange, *, drop: bool) -> None:
        self.drop = drop
        super().__init__(name, setting, exchange)

    def _place_experts(self) -> None:
        prepare_deepspeed(self.setting, rank=self.exchange.rank)
        for index, block in enumerate(moe_blocks(self.model)):
            layer = DeepSpeedLayer(
                self.setting, drop=self.drop, rank=self.exchange.rank, index=index
            )
            inner = layer.moe.deepspeed_moe
            same_router(inner.gate.wg, block.ffn)
            local = inner.experts.deepspeed_experts
            for i, expert in enumerate(local):
                same_expert(expert, block.ffn, self.exchange.rank * len(local) + i)
            block.ffn = layer

    def _is_expert(self, name: str, parameter: nn.Parameter) -> bool:
        return not getattr(parameter, "allreduce", True)

    def _auxiliary(self) -> Tensor | None:
        tokens = self.setting.batch * SEQ
        layers = self._layers()
        return sum(0.01 * tokens * m.auxiliary for m in layers if m.auxiliary is not None)

    def _layers(self) -> list[DeepSpeedLayer]:
        return [m for m in self.model.modules() if isinstance(m, DeepSpeedLayer)]

    def load(self) -> float:
        counts_LE = torch.stack([layer.counts_E for layer in self._layers()]).double()
        self.exchange.all_reduce(counts_LE, label="digest")
        return float((counts_LE.amax(1) / counts_LE.mean(1)).max())

    def dropped(self) -> float:
        """Part of all copies of the last step that found no room, asked of all ranks."""
        counts_LE = torch.stack([layer.counts_E for layer in self._layers()]).double()
        room = math.ceil(
            1.25 * self.setting.top_k * self.setting.batch * SEQ / self.setting.experts
        )
        over = (counts_LE - room).clamp_min(0).sum() if self.drop else counts_LE.sum() * 0
        sums = torch.stack([over, counts_LE.sum()])
        self.exchange.all_reduce(sums, label="digest")
        return float(sums[0] / sums[1])


def prepare_deepspeed(setting: Setting, *, rank: int) -> None:
    """Initialise DeepSpeed on the default group, without compiling its shared-memory operator."""
    import deepspeed
    from deepspeed.moe import sharded_moe

    if not deepspeed.comm.is_initialized():
        os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(setting.ranks))
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
        deepspeed.init_distributed("gloo", dist_init_required=False, verbose=False)
    if not hasattr(sharded_moe, "unforced"):
        sharded_moe.unforced = (sharded_moe.top1gating, sharded_moe.top2gating)
        for name, original in zip(("top1gating", "top2gating"), sharded_moe.unforced, strict=True):
            setattr(sharded_moe, name, _forced.gating(original))


class _Forced:
    """Logits that DeepSpeed's gates take instead of their router's; None: the router's."""

    logits: Tensor | None = None

    def gating(self, original: Any) -> Any:
        def gate(own: Tensor, *rest: Any) -> Any:
            return original(own if self.logits is None else own * 0 + self.logits, *rest)

        return gate


_forced = _Forced()


def _forcing_logits(setting: Setting, *, rank: int, layer: int) -> Tensor:
    """Logits that make a gate choose what all contenders are told to choose."""
    chosen = choices(setting, rank=rank, layer=layer)
    order = torch.arange(setting.top_k, 0, -1).float() + 50.0
    logits = torch.zeros(setting.batch * SEQ, setting.experts)
    return logits.scatter_(1, chosen, order.expand(chosen.shape).contiguous())


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

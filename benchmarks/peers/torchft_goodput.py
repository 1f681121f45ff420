"""One replica group of one rank under torchft, with all experts in it; trains until it is ended.

    python torchft_goodput.py REPLICA REPLICAS LOG TIMEOUT_S WORK

A replica group keeps its own batch when others are gone, so the global batch shrinks with them.
"""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from goodput_modelled import count_rows
from goodput_shapes import Shape
from same_work import CLIP, LR, Samples, Work, note, rate
from torch import distributed as dist
from torchft import Manager, ProcessGroupGloo

from dispatcher import RoutingTable, slots_for_exchange
from dispatcher.loopback import LoopbackWorld
from lazarus.model import gpt
from lazarus.model.context import LayerContext
from lazarus.model.experts import deferred_experts
from lazarus.model.moe import moe_layers, take_auxiliary


def whole_model(shape: Shape, seed: int) -> torch.nn.Module:
    """Our model with every expert in this process."""
    torch.manual_seed(seed)
    with deferred_experts():
        model = gpt.build(shape)
    for index, layer in enumerate(moe_layers(model).values()):
        table = RoutingTable.from_plan_arrays(
            [list(range(shape.experts))], rank=0, home_E=np.zeros(shape.experts, dtype=np.int64)
        )
        held = slots_for_exchange(table)
        layer.experts.allocate(num_slots=len(held), device="cpu")
        for slot, expert in enumerate(held):
            layer.experts.assign(slot, expert)
            layer.experts.initialise(slot)
        exchange = LoopbackWorld(1).exchange(0)
        layer.attach(LayerContext(layer=index, exchange=exchange, table=table))
    return model


def main() -> None:
    replica, replicas, log = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    timeout, work = timedelta(seconds=float(sys.argv[4])), Work.of(sys.argv[5])
    torch.set_num_threads(1)
    count_rows(work.device)
    model, samples = whole_model(work.shape, work.seed), Samples(work)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timeout),
        load_state_dict=lambda state: (
            model.load_state_dict(state["model"]),
            optimizer.load_state_dict(state["optimizer"]),
        ),
        state_dict=lambda: {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
        min_replica_size=1, timeout=timeout, quorum_timeout=timedelta(seconds=60), rank=0,
        world_size=1, store_addr="127.0.0.1", store_port=store.port,
        replica_id=f"replica-{replica}", hostname="127.0.0.1", init_sync=False,
    )  # fmt: skip
    count, device = -(-work.shape.batch // replicas), work.device
    while True:
        begun = time.perf_counter()
        manager.start_quorum()
        step = manager.current_step() + 1
        optimizer.zero_grad()
        tokens = samples.tokens(step, part=replica, parts=replicas, count=count)
        device.begin(count)
        total, targets = gpt.loss(model, {"tokens": tokens})
        auxiliary = take_auxiliary(model)
        ((total if auxiliary is None else total + auxiliary) / targets).backward()
        device.finish()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in grads])
        manager.allreduce(flat).wait()
        flat *= min(1.0, CLIP / (float(flat.norm()) + 1e-6))
        start = 0
        for grad in grads:
            grad.copy_(flat[start : start + grad.numel()].view_as(grad))
            start += grad.numel()
        if manager.should_commit():
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            optimizer.step()
            note(log, step=step, part=replica, tokens=targets, loss=float(total.detach()) / targets,
                 wall_s=time.perf_counter() - begun)  # fmt: skip
        for layer in moe_layers(model).values():
            layer.context.start_step()


if __name__ == "__main__":
    main()

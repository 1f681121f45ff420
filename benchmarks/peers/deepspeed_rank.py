"""One rank of DeepSpeed-MoE under torchrun: experts over all ranks, a checkpoint every few steps.

    torchrun ... deepspeed_rank.py FOLDER EVERY SEED

Starts from the newest checkpoint below FOLDER. With another number of ranks only the
weights are read; the moments start again. Rank 0 appends every step to FOLDER/log.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import deepspeed
import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from same_work import BATCH, CLIP, LR, SHAPE, Samples, note, rate
from torch import Tensor, nn

from lazarus.model import gpt
from lazarus.model.experts import deferred_experts
from lazarus.model.moe import MoELayer


class Layer(nn.Module):
    """DeepSpeed's MoE over all ranks, dropping at capacity 1.25; the engine makes its groups."""

    def __init__(self, size: int) -> None:
        super().__init__()
        expert = gpt.FeedForward(SHAPE.dim, SHAPE.ffn_mult * SHAPE.dim)
        self.moe = MoE(
            SHAPE.dim, expert, num_experts=SHAPE.experts, ep_size=size, k=SHAPE.top_k,
            capacity_factor=1.25,
        )  # fmt: skip
        self.auxiliary: Tensor | None = None

    def forward(self, x_BSD: Tensor) -> Tensor:
        out, self.auxiliary, _ = self.moe(x_BSD)
        return out.to(x_BSD.dtype)


def engine_of(size: int, seed: int, count: int) -> Any:
    """The model with DeepSpeed's layers, in DeepSpeed's engine."""
    torch.manual_seed(seed)
    with deferred_experts():
        model = gpt.build(SHAPE)
    for block in model.blocks:
        if isinstance(block.ffn, MoELayer):
            block.ffn = Layer(size)
    groups = split_params_into_different_moe_groups_for_optimizer(
        {"params": list(model.parameters()), "name": "all"}
    )
    config = {
        "train_micro_batch_size_per_gpu": count,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": 0},
        "steps_per_print": 1_000_000,
    }
    optimizer = torch.optim.AdamW(groups, lr=LR, fused=True)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def resumed(engine: Any, checkpoints: Path, size: int) -> int:
    """The step of the newest checkpoint; 0 without one."""
    if not (checkpoints / "latest").exists():
        return 0
    same = (checkpoints / "ranks").read_text() == str(size)
    _, client = engine.load_checkpoint(
        str(checkpoints), load_optimizer_states=same, load_lr_scheduler_states=False
    )
    return int(client["step"])


def main() -> None:
    folder, every, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # needs no compiler then
    deepspeed.init_distributed("gloo", verbose=False)
    count = -(-BATCH // size)
    engine = engine_of(size, seed, count)
    checkpoints, log, samples = folder / "checkpoints", folder / "log", Samples(seed)
    step = resumed(engine, checkpoints, size)
    if rank == 0:
        note(log, resumed=step, ranks=size)
    while True:
        step += 1
        begun = time.perf_counter()
        for group in engine.optimizer.param_groups:
            group["lr"] = rate(step)
        tokens = samples.tokens(step, part=rank, parts=size, count=count)
        total, targets = gpt.loss(engine, {"tokens": tokens})
        mean = total / targets
        auxiliary = [m.auxiliary for m in engine.modules() if isinstance(m, Layer)]
        engine.backward(mean + 0.01 * sum(a for a in auxiliary if a is not None))
        engine.step()
        if rank == 0:
            note(log, step=step, tokens=size * targets, loss=float(mean.detach()),
                 wall_s=time.perf_counter() - begun)  # fmt: skip
        if step % every == 0:
            engine.save_checkpoint(str(checkpoints), tag=f"step{step}", client_state={"step": step})
            if rank == 0:
                (checkpoints / "ranks").write_text(str(size))


if __name__ == "__main__":
    main()

"""One rank of DeepSpeed-MoE under torchrun: experts over all ranks, a checkpoint every few steps.

    torchrun ... deepspeed_rank.py FOLDER WORK

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
from goodput_modelled import Device, until
from goodput_shapes import Shape
from same_work import CLIP, LR, Samples, Work, note, rate
from torch import Tensor, nn

from lazarus.model import gpt
from lazarus.model.experts import deferred_experts
from lazarus.model.moe import MoELayer


class Layer(nn.Module):
    """DeepSpeed's MoE over all ranks, dropping at capacity 1.25; the engine makes its groups."""

    def __init__(self, shape: Shape, size: int, device: Device) -> None:
        super().__init__()
        expert = gpt.FeedForward(shape.dim, shape.ffn_mult * shape.dim)
        self.moe = MoE(
            shape.dim, expert, num_experts=shape.experts, ep_size=size, k=shape.top_k,
            capacity_factor=1.25,
        )  # fmt: skip
        self.auxiliary: Tensor | None = None
        # What it computes: every expert's whole capacity, used or not.
        self.moe.deepspeed_moe.experts.register_forward_pre_hook(
            lambda _, args: device.serve(args[0].numel() // shape.dim)
        )

    def forward(self, x_BSD: Tensor) -> Tensor:
        out, self.auxiliary, _ = self.moe(x_BSD)
        return out.to(x_BSD.dtype)


def engine_of(work: Work, size: int, count: int) -> Any:
    """The model with DeepSpeed's layers, in DeepSpeed's engine."""
    torch.manual_seed(work.seed)
    with deferred_experts():
        model = gpt.build(work.shape)
    for block in model.blocks:
        if isinstance(block.ffn, MoELayer):
            block.ffn = Layer(work.shape, size, work.device)
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


def resumed(engine: Any, checkpoints: Path, size: int, *, read_s: float) -> int:
    """The step of the newest checkpoint; 0 without one. Takes ``read_s`` at least."""
    if not (checkpoints / "latest").exists():
        return 0
    began = time.monotonic()
    same = (checkpoints / "ranks").read_text() == str(size)
    _, client = engine.load_checkpoint(
        str(checkpoints), load_optimizer_states=same, load_lr_scheduler_states=False
    )
    until(began + read_s)
    return int(client["step"])


def save(engine: Any, checkpoints: Path, step: int, *, write_s: float) -> float:
    """A checkpoint, for ``write_s`` at least. Returns the seconds it took."""
    began = time.monotonic()
    engine.save_checkpoint(str(checkpoints), tag=f"step{step}", client_state={"step": step})
    until(began + write_s)
    return time.monotonic() - began


def main() -> None:
    folder, work = Path(sys.argv[1]), Work.of(sys.argv[2])
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # needs no compiler then
    deepspeed.init_distributed("gloo", verbose=False)
    count = -(-work.shape.batch // size)
    engine = engine_of(work, size, count)
    checkpoints, log, samples = folder / "checkpoints", folder / "log", Samples(work)
    step = resumed(engine, checkpoints, size, read_s=work.write_s)
    if rank == 0:
        note(log, resumed=step, ranks=size)
    device = work.device
    while True:
        step += 1
        begun = time.perf_counter()
        for group in engine.optimizer.param_groups:
            group["lr"] = rate(step)
        tokens = samples.tokens(step, part=rank, parts=size, count=count)
        device.begin(count)
        total, targets = gpt.loss(engine, {"tokens": tokens})
        mean = total / targets
        auxiliary = [m.auxiliary for m in engine.modules() if isinstance(m, Layer)]
        engine.backward(mean + 0.01 * sum(a for a in auxiliary if a is not None))
        device.finish()
        engine.step()
        if rank == 0:
            note(log, step=step, tokens=size * targets, loss=float(mean.detach()),
                 wall_s=time.perf_counter() - begun)  # fmt: skip
        if step % work.every == 0:
            seconds = save(engine, checkpoints, step, write_s=work.write_s)
            if rank == 0:
                (checkpoints / "ranks").write_text(str(size))
                note(log, save_s=seconds)


if __name__ == "__main__":
    main()

"""One rank under torchrun: data parallel, a checkpoint every few steps, restart from the newest.

    torchrun ... torchrun_rank.py FOLDER STEPS KILL_STEP KILL_WHERE EVERY

Rank 0 appends each step to FOLDER/log; the victim (the last rank, in the first life only) notes
its time of death. KILL_WHERE: boundary or collective.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import torch
from tiny_model import TinyModel, batch, flat_gradient, set_gradient
from torch import distributed as dist


def note(folder: Path, **fields: object) -> None:
    with (folder / "log").open("a", encoding="utf-8") as out:
        out.write(json.dumps({"t": time.time(), **fields}) + "\n")


def main() -> None:
    folder, steps, kill_step = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    where, every = sys.argv[4], int(sys.argv[5])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    model = TinyModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    first, path = 0, folder / "checkpoint.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = int(saved["step"]) + 1
    for step in range(first, steps):
        doomed = rank == size - 1 and step == kill_step and not (folder / "killed").exists()
        if doomed:
            (folder / "killed").touch()
        if doomed and where == "boundary":
            note(folder, step=step, killed=True)
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.zero_grad()
        model(batch(step, rank)).backward()
        flat = flat_gradient(model)
        work = dist.all_reduce(flat, async_op=True)
        if doomed:
            note(folder, step=step, killed=True)
            os.kill(os.getpid(), signal.SIGKILL)
        work.wait()
        set_gradient(model, flat / size)
        optimizer.step()
        if rank == 0:
            note(folder, step=step)
            if step % every == 0:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save({**state, "step": step}, path.with_suffix(".new"))
                path.with_suffix(".new").replace(path)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

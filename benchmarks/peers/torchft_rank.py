"""One replica group of one rank under torchft. Dies by its own hand where it is told to.

    python torchft_rank.py REPLICA RANKS LOG STEPS KILL_STEP KILL_WHERE TIMEOUT_S

Every committed step appends ``{"replica", "step", "t"}`` to LOG; the victim appends its time of
death just before SIGKILL. KILL_WHERE: boundary, collective, or never; not before
all RANKS have taken part in a step.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import torch
from tiny_model import TinyModel, batch, flat_gradient, set_gradient
from torch import distributed as dist
from torchft import Manager, ProcessGroupGloo


def note(path: str, **fields: object) -> None:
    with open(path, "a", encoding="utf-8") as out:
        out.write(json.dumps({"t": time.time(), **fields}) + "\n")


def die(path: str, replica: int, step: int) -> None:
    note(path, replica=replica, step=step, killed=True)
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    replica, ranks, log, steps = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    kill_step, where, timeout_s = int(sys.argv[5]), sys.argv[6], float(sys.argv[7])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = TinyModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    timeout = timedelta(seconds=timeout_s)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timeout),
        load_state_dict=lambda state: (
            model.load_state_dict(state["model"]),
            optimizer.load_state_dict(state["optimizer"]),
        ),
        state_dict=lambda: {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
        min_replica_size=1,
        timeout=timeout,
        quorum_timeout=timedelta(seconds=max(60.0, timeout_s)),
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=store.port,
        replica_id=f"replica-{replica}",
        hostname="127.0.0.1",
        init_sync=False,
    )
    note(log, replica=replica, ready=True)
    full = 0  # steps in a row that everybody took part in
    while manager.current_step() < steps:
        step = manager.current_step()
        doomed = where != "never" and step >= kill_step and full > 5
        if doomed and where == "boundary":
            die(log, replica, step)
        manager.start_quorum()
        optimizer.zero_grad()
        loss = model(batch(step, replica))
        loss.backward()
        flat = flat_gradient(model)
        work = manager.allreduce(flat)
        if doomed and manager.num_participants() > 1:
            die(log, replica, step)  # its part is on the wire, the rest is not
        work.wait()
        set_gradient(model, flat)
        if manager.should_commit():
            optimizer.step()
            note(log, replica=replica, step=step, peers=manager.num_participants())
        full = full + 1 if manager.num_participants() == ranks else 0
    manager.shutdown(wait=False)
    os._exit(0)


if __name__ == "__main__":
    main()

"""Scripts as users write them, run in a process of their own; and what they leave."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fault_runs import SMALL

from lazarus.record.events import read_events

ROOT = Path(__file__).resolve().parents[2]

HEAD = """
import ctypes, os, sys
import torch
from torch import nn
from torch.nn import functional as F
from lazarus import ElasticTrainer, LossSum, MoELayer, TrainConfig

POISON = 23  # the sample at which what is broken breaks

class Data:
    def __len__(self):
        return 44
    def __getitem__(self, i):
        return {"id": torch.tensor(i), "x": torch.full((4, 8), i / 44)}

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.moe = MoELayer(dim=8, hidden=16, num_experts=4, top_k=2)
        self.head = nn.Linear(8, 1)
    def forward(self, x):
        return self.head(x + self.moe(x))

def model(ctx):
    return Model()

def loss(model, batch):
    total = model(batch["x"]).square().sum()
    return LossSum(total, batch["x"].numel())

options = {}
settings = []
"""

TAIL = """
config = TrainConfig.load(overrides=[*SETTINGS, *settings])
given = {"model": model, "data": Data(), "loss": loss, **options}
if __name__ == "__main__":
    result = ElasticTrainer(config, **given).fit()
    print("status", result.status, "steps", result.steps)
"""


@dataclass(frozen=True)
class Left:
    """What a script left behind."""

    code: int
    out: str
    err: str
    events: Sequence[Mapping[str, Any]]
    script: Path
    folder: Path

    def of(self, *kinds: str) -> list[Mapping[str, Any]]:
        return [event for event in self.events if event["event"] in kinds]

    @property
    def steps(self) -> list[int]:
        return [event["step"] for event in self.of("step_committed")]

    @property
    def tail(self) -> list[str]:
        """The last five lines that a user sees."""
        return [line for line in self.err.splitlines() if line.strip()][-5:]

    def line_of(self, text: str) -> int:
        """Number of the script's last line with this text."""
        lines = self.script.read_text(encoding="utf-8").splitlines()
        return max(n for n, line in enumerate(lines, start=1) if text in line)

    def assert_tail_names(self, text: str) -> None:
        """The user's file and this line of it are in the last five lines."""
        name, line = self.script.name, self.line_of(text)
        wanted = (f'{name}", line {line}', f"{name}:{line} ")
        assert any(w in shown for shown in self.tail for w in wanted), self.err[-3000:]


def script_of(
    folder: Path, body: str, *, nodes: int = 3, steps: int = 8, settings: Sequence[str] = ()
) -> Path:
    """Write a script: the common head, what is special in it, and the run."""
    given = [
        *(s for s in SMALL if not s.startswith(("model.", "placement."))),
        "metrics.report=false",
        f"cluster.nodes={nodes}",
        f"train.steps={steps}",
        f"run.dir={folder / 'run'}",
        *settings,
    ]
    path = folder / "my_train.py"
    text = f"SETTINGS = {given!r}\n{HEAD}\n{textwrap.dedent(body)}\n{TAIL}"
    path.write_text(text, encoding="utf-8")
    return path


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run_script(folder: Path, body: str, *, timeout_s: float = 120.0, **more: Any) -> Left:
    """Run a script to its end."""
    path = script_of(folder, body, **more)
    done = subprocess.run(
        [sys.executable, str(path)],
        capture_output=True, text=True, errors="surrogateescape", check=False,
        cwd=folder, env=environment(), timeout=timeout_s,
    )  # fmt: skip
    record = folder / "run"
    events = read_events(record) if (record / "events.jsonl").exists() else []
    return Left(
        code=done.returncode, out=done.stdout, err=done.stderr, events=events, script=path,
        folder=record,
    )  # fmt: skip

"""One rank's replica and step, made as in the reference runs of ``tests/integration``."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from dispatcher import Exchange
from lazarus.runtime.fence.ledger import StepLedger
from lazarus.runtime.state.checksums import text_checksum
from lazarus.runtime.state.replica import Replica
from lazarus.runtime.training.step import Step

INTEGRATION = Path(__file__).resolve().parents[1] / "integration"
ranks = SimpleNamespace(**runpy.run_path(str(INTEGRATION / "reference_rank.py")))


def stepped(exchange: Exchange, **options: Any) -> tuple[Replica, Step]:
    replica, step = ranks.make_step(exchange, top_k=1, ledger=StepLedger(), **options)
    exchange.all_reduce(torch.zeros(1), label="digest")  # threads share the generator of weights
    return replica, step


def common_of(replica: Replica) -> int:
    """Checksum of what all ranks have in common."""
    return text_checksum(replica.dense_digest(), replica.history_digest())


def one_step(step: Step, number: int = 1) -> Any:
    lanes = step.compute(number, pause=lambda: False, prepared=lambda: None)
    return lanes, step.check(lanes, step=number)

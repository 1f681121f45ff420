"""The parts of a rank that are made once for its process and outlive every generation.

They follow from the worker's spec and the user's code alone. What one PREPARE builds on them is in
``preparation.py``, and what exists from a RESUME to the next fence in ``generation.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import cloudpickle
import torch

from lazarus.config.train_config import TrainConfig
from lazarus.control.messages import Body
from lazarus.runtime.comm.rank_groups import RankGroups
from lazarus.runtime.fence.ledger import StepLedger
from lazarus.runtime.fence.observer import Observer
from lazarus.runtime.healing.restore import PatientReader, StoredFrozen, still_wanted
from lazarus.runtime.input.reader import Reading
from lazarus.runtime.saving.saver import Saver
from lazarus.runtime.spec import UserCode, WorkerSpec
from lazarus.runtime.state.replica import Replica
from lazarus.runtime.training.between_steps import BetweenSteps
from lazarus.runtime.training.context import WorkerContext
from lazarus.runtime.training.factory import Workshop, first_context
from lazarus.runtime.training.hooks import Hooks
from lazarus.runtime.training.self_test import require_equal_bits
from lazarus.runtime.worker.common_state import CommonState

Send = Callable[[Body], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What a rank consists of, whatever the generation.

    Attributes:
        spec: What the driver handed to the process.
        first_context: The context for user functions before the first generation.
        send: Sends a message to the controller.
        ledger: Generation, progress and committed vectors.
        observer: Shows progress to other threads, and fires scripted faults.
        groups: Builds and closes process groups.
        workshop: Made the parts that follow, and makes a replica of the first step.
        replica: This rank's model and optimizer.
        reading: The training data.
        hooks: The user's hooks.
        between: Work between two steps.
        common: The state that all ranks have in common.
        saver: Saves snapshots and checkpoints; None if the run saves nothing while it trains.
    """

    spec: WorkerSpec
    first_context: WorkerContext
    send: Send
    ledger: StepLedger
    observer: Observer
    groups: RankGroups
    workshop: Workshop
    replica: Replica
    reading: Reading
    hooks: Hooks
    between: BetweenSteps
    common: CommonState
    saver: Saver | None

    @property
    def config(self) -> TrainConfig:
        """The run's configuration."""
        return self.spec.config

    @property
    def device(self) -> torch.device:
        """The device on which this rank computes."""
        return self.first_context.device

    def patient(self) -> PatientReader:
        """A storage reader that gives up when this rank is fenced by a newer generation."""
        waiting = still_wanted(self.observer, self.ledger, self.ledger.fence)
        return PatientReader(patience_s=self.config.timeouts.storage_stuck_s, waiting=waiting)


def make_parts(
    spec: WorkerSpec, *, node: int, ledger: StepLedger, observer: Observer, send: Send
) -> Parts:
    """Make a rank's parts: call the user's functions, and move the model to the rank's device.

    Args:
        spec: What the driver handed to the process.
        node: Number of this rank's machine.
        ledger: The process's ledger.
        observer: The process's observer.
        send: Sends a message to the controller.
    """
    config = spec.config
    user: UserCode = cloudpickle.loads(spec.user)
    device = _device(spec.local_rank)
    context = first_context(config, node=node, device=device)
    shop = Workshop(config, user, observer=observer)
    replica, reading = shop.replica(context), shop.reading(context)
    hooks = Hooks(user.hooks, where=observer.where)
    hooks.setup(context, replica.model)
    replica.require_unchanged()
    if shop.batching.units is not None:
        require_equal_bits(replica, dtype=context.dtype)
    between = shop.between_steps(replica, hooks, context)
    common = CommonState(
        replica,
        reading=reading,
        between=between,
        ledger=ledger,
        workshop=shop,
        start=spec.resume,
    )
    saver = _saver(spec, replica, common, send) if spec.keeper and config.checkpoint.every else None
    common.begin(saver)
    parts = Parts(
        spec=spec,
        first_context=context,
        send=send,
        ledger=ledger,
        observer=observer,
        groups=RankGroups(spec, ledger=ledger, observer=observer, device=device),
        workshop=shop,
        replica=replica,
        reading=reading,
        hooks=hooks,
        between=between,
        common=common,
        saver=saver,
    )
    if spec.resume is not None:
        replica.frozen_source = StoredFrozen(spec.resume, reader=parts.patient)
    return parts


def _saver(spec: WorkerSpec, replica: Replica, common: CommonState, send: Send) -> Saver:
    return Saver(
        spec.config,
        replica,
        keeper=spec.keeper,
        credentials=spec.credentials,
        job=spec.run_id,
        url=spec.checkpoint_url,
        scalars=common.scalars,
        send=send,
    )


def _device(local_rank: int) -> torch.device:
    """The rank's device: a GPU chosen by local rank, or the CPU if there is no GPU."""
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        with suppress(RuntimeError):
            torch.cuda.set_device(device)
        return device
    return torch.device("cpu")

"""Makes a rank's parts from the configuration and the user's code."""

from __future__ import annotations

from typing import Any

import torch

from lazarus.config.train_config import TrainConfig
from lazarus.data.units import Units
from lazarus.runtime.fence.observer import Observer
from lazarus.runtime.input.reader import Reading, open_reading
from lazarus.runtime.spec import UserCode
from lazarus.runtime.state.replica import Replica
from lazarus.runtime.training import defaults
from lazarus.runtime.training.between_steps import BetweenSteps
from lazarus.runtime.training.context import WorkerContext
from lazarus.runtime.training.evaluation import Evaluator
from lazarus.runtime.training.hooks import Hooks
from lazarus.runtime.training.step import Batching, Loss


class Workshop:
    """Makes a rank's parts. User functions get the ``context`` passed to each method."""

    def __init__(self, config: TrainConfig, user: UserCode, *, observer: Observer) -> None:
        self._config, self._user, self._observer = config, user, observer
        self.loss: Loss = user.loss or defaults.loss_of(config)
        self.batching = Batching(
            seed=config.run.seed,
            global_batch=config.train.global_batch,
            micro_batch_size=config.train.micro_batch_size,
            precision=config.train.precision,
            stop_on_nonfinite=config.train.on_nonfinite == "stop",
            units=units_of(config),
        )

    def replica(self, context: WorkerContext) -> Replica:
        """Build model and optimizer in the state of the first step."""
        return first_replica(self._config, self._user, context=context)

    def reading(self, context: WorkerContext) -> Reading:
        """The training data, at its beginning."""
        config, data, where = self._config, self._user.data, self._observer.where
        where.enter("build", of="data")
        opened = defaults.training_data(config) if data is None else _opened(data, context)
        reading = open_reading(
            opened,
            collate=self._user.collate or defaults.collate,
            seed=config.run.seed,
            global_batch=config.train.global_batch,
            num_shards=config.data.num_shards,
            shuffle_shards=config.data.shuffle_shards,
            prefetch_steps=defaults.prefetch_steps(config, opened),
        )
        where.enter("build")
        return reading

    def between_steps(self, replica: Replica, hooks: Hooks, context: WorkerContext) -> BetweenSteps:
        """The work between two steps."""
        return BetweenSteps(
            replica,
            evaluator=self._evaluator(replica, context) if self._config.eval.every else None,
            compare_every=self._config.recovery.compare_every,
            last_step=self._config.train.steps,
            repairs=self._config.recovery.on_mismatch == "repair",
            hooks=hooks,
        )

    def _evaluator(self, replica: Replica, context: WorkerContext) -> Evaluator:
        config, user = self._config, self._user
        data = user.eval_data
        return Evaluator(
            replica,
            defaults.held_out_data(config) if data is None else _opened(data, context),
            batching=self.batching,
            every=config.eval.every,
            batches=config.eval.batches,
            collate=user.collate or defaults.collate,
            loss=self.loss,
            observer=self._observer,
            measures=context.measures,
        )


def first_context(config: TrainConfig, *, node: int, device: torch.device) -> WorkerContext:
    """The context for user functions before the first generation."""
    return WorkerContext(
        rank=-1,
        world_size=0,
        node=node,
        device=device,
        generation=0,
        seed=config.run.seed,
        dtype=torch.float32 if config.train.precision == "fp32" else torch.bfloat16,
    )


def first_replica(config: TrainConfig, user: UserCode, *, context: WorkerContext) -> Replica:
    """Build model and optimizer in the state of the first step, on the context's device."""
    make = user.model
    return Replica(
        (lambda: defaults.model(config)) if make is None else (lambda: make(context)),
        optimizer=user.optimizer or defaults.optimizer(config),
        schedule=user.schedule or defaults.schedule(config),
        clip_norm=config.optim.clip_norm,
        seed=config.run.seed,
        device=context.device,
        overlaps=_overlaps(config.dispatch.overlap, context.device),
        scratch_buffers=config.train.scratch_buffers,
        units=units_of(config),
        num_chains=config.train.gradient_chains,
    )


def units_of(config: TrainConfig) -> Units | None:
    """The units of every step if the result must not depend on the number of ranks, or None."""
    if not config.train.elastic_determinism:
        return None
    return Units(global_batch=config.train.global_batch, unit_size=config.train.micro_batch_size)


def _overlaps(asked: str, device: torch.device) -> bool:
    """Whether to sum dense gradients during the backward; "auto" means on GPUs only."""
    return asked == "on" or (asked == "auto" and device.type != "cpu")


def _opened(data: Any, context: WorkerContext) -> Any:
    return data(context) if callable(data) else data

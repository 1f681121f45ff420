"""The steps of one generation on one rank, from RESUME until all ranks pause.

The loop keeps rules 9 to 13 and 15 of docs/protocol.md in their order: compute, decide, apply, tell
the controller, and stop after the step whose vector says that all ranks do.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from lazarus.config.train_config import TrainConfig
from lazarus.control.messages import Body, Vector
from lazarus.runtime.fence.ledger import StepLedger
from lazarus.runtime.fence.observer import Observer
from lazarus.runtime.training.finite import FiniteWatch
from lazarus.runtime.worker.generation import Generation
from lazarus.runtime.worker.user_errors import fatal, user_code


class TrainingLoop:
    """Trains the generations of one process, one after the other.

    Args:
        config: The run's configuration.
        ledger: Where steps are decided.
        observer: Shows progress to other threads.
        send: Sends a message to the controller.
        wants_pause: Whether this rank wants all ranks to stop after the current step.
        published: The last step that the controller has journaled.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        ledger: StepLedger,
        observer: Observer,
        send: Callable[[Body], None],
        wants_pause: Callable[[], bool],
        published: Callable[[], int],
    ) -> None:
        self._steps = config.train.steps
        self._ledger, self._observer, self._send = ledger, observer, send
        self._wants_pause, self._published = wants_pause, published
        self._finite = FiniteWatch(stops=config.train.on_nonfinite == "stop")

    def run(self, generation: Generation, *, halt: bool) -> None:
        """Train until all ranks pause, or until the run's last step.

        Args:
            generation: The generation, which has been resumed.
            halt: Whether to pause before the first step.

        Raises:
            FencedError, CollectiveError: The generation is over.
            UserCodeFailure: The user's code raised.
        """
        step = generation.standing.step
        steps = 0 if halt else self._steps
        with user_code(self._ledger, self._observer.where):
            generation.before_training()
        pauses = False
        while step < steps and not pauses:
            step += 1
            self._ledger.check()
            self._observer.begin_step(step)
            pauses = self._one_step(generation, step)

    def _one_step(self, generation: Generation, step: int) -> bool:
        """Compute, commit and apply one step (rules 9-13). True: all ranks pause after the step."""
        ledger, observer, where = self._ledger, self._observer, self._observer.where
        began = time.monotonic()
        with user_code(ledger, where):
            lanes = generation.compute(step, pause=self._wants_pause)
        sums = generation.check(lanes, step=step)
        with user_code(ledger, where):
            where.enter("forward")
            self._finite.check(sums)
        vector = Vector(
            generation=ledger.gen,
            step=step,
            lanes=lanes.astype("<f8").tobytes(),
            wall_s=time.monotonic() - began,
        )
        if not ledger.decide(vector):
            ledger.check()
        observer.enter("optimizer")
        with fatal(where, "optimizer"):
            generation.apply(sums)
        ledger.applied(step)
        if generation.standing.is_first or sums.skips:
            self._send(vector)
        with user_code(ledger, where):
            where.enter("forward")
            self._finite.committed(sums)
            where.leave()
            generation.after_commit(step, published=self._published(), saves=not sums.skips)
        return sums.pause

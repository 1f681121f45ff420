"""Work between two steps: evaluation, comparison of replicas, hooks."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from lazarus.control.messages import Body, Evaluated, ReplicaMismatch
from lazarus.runtime.healing.repairing import InCommon, repair
from lazarus.runtime.state.compare import MOST_REPORTED, compare
from lazarus.runtime.state.replica import Replica
from lazarus.runtime.training.context import WorkerContext
from lazarus.runtime.training.evaluation import Evaluator
from lazarus.runtime.training.hooks import Hooks
from lazarus.runtime.training.world import World

Send = Callable[[Body], None]


class BetweenSteps:
    """Work a rank does after one optimizer step and before the next: evaluation, comparison, hooks.

    If a rank is lost here, this work is repeated, never the step. All ranks do the same work after
    the same steps: what to do depends only on the step and on ``state``, which every rank takes
    from one chosen member before it resumes.
    """

    def __init__(
        self,
        replica: Replica,
        *,
        evaluator: Evaluator | None,
        compare_every: int,
        last_step: int,
        repairs: bool,
        hooks: Hooks,
    ) -> None:
        """``repairs``: give outvoted copies the majority's bits once a comparison finds them."""
        self._replica, self._evaluator, self._hooks = replica, evaluator, hooks
        self._compare_every, self._last_step, self.repairs = compare_every, last_step, repairs
        self._evaluated: tuple[int, float, float] | None = None  # step, loss sum, count
        self._has_trained = False
        self.told: Evaluated | None = None  # last message, to repeat to a new controller

    def state(self) -> Any:
        """The last evaluation, as JSON values."""
        return self._evaluated

    def take_state(self, state: Any) -> None:
        """Take over what ``state`` returned on another rank, or in a checkpoint."""
        self._evaluated = None
        if state is not None:
            step, loss_sum, count = state
            self._evaluated = (int(step), float(loss_sum), float(count))

    def agree(self, scalars: str) -> None:
        """Take over the last evaluation of one chosen member, before RESUME."""
        if scalars:
            self.take_state(json.loads(scalars).get("evaluated"))

    def before_training(self, step: int, world: World, send: Send) -> None:
        """Report the evaluation after ``step`` if one is due; a loss may have interrupted it."""
        if not self._has_trained and self._evaluated is not None and self._evaluated[0] == step:
            return  # reported before the run was resumed
        self._evaluate(step, world, send)

    def check(
        self,
        step: int,
        world: World,
        send: Send,
        *,
        context: WorkerContext,
        common: InCommon,
    ) -> None:
        """Call the commit hooks for ``step``, and compare replicas if that is due.

        Runs before anything is saved, so that no snapshot contains an outvoted copy.

        Args:
            step: The step that has been applied.
            world: The generation.
            send: Sends a message to the controller.
            context: The context for hooks.
            common: State that all ranks have in common.
        """
        self._has_trained = True
        self._hooks.commit(context, step)
        if self._hooks.watch_commits:  # a hook may keep statistics in a buffer
            self._replica.keep_buffers()
        if not self._compare_every or (step % self._compare_every and step != self._last_step):
            return
        found = compare(self._replica, world.exchange, common=common.checksum())
        is_speaker = world.exchange.rank == 0
        for difference in found[:MOST_REPORTED] if is_speaker else ():
            what = difference.to_json(step=step, nodes=world.standing.nodes)
            send(ReplicaMismatch(generation=world.generation, step=step, what=what))
        clear = [difference for difference in found if difference.is_majority]
        if not (clear and self.repairs):
            return
        repair(
            clear,
            self._replica,
            world.exchange,
            common=common,
            generation=world.generation,
            step=step,
        )
        for difference in clear[:MOST_REPORTED] if is_speaker else ():
            send(difference.repaired(generation=world.generation, step=step))

    def evaluate(self, step: int, world: World, send: Send) -> None:
        """Compute and report the held-out loss after ``step`` if that is due."""
        self._evaluate(step, world, send)

    def _evaluate(self, step: int, world: World, send: Send) -> None:
        if self._evaluator is None or not self._evaluator.is_due(step):
            return
        if self._evaluated is None or self._evaluated[0] != step:
            result = self._evaluator.run(step, world)
            self._evaluated = (step, result.loss_sum, result.count)
        if world.exchange.rank == 0:
            _, loss_sum, count = self._evaluated
            self.told = Evaluated(
                generation=world.generation, step=step, loss_sum=loss_sum, count=count
            )
            send(self.told)

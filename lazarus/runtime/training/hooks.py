"""The user's hooks in workers: at set-up, on gradients before the commit, after each commit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lazarus.runtime.fence.whereabouts import Whereabouts
from lazarus.runtime.state.replica import Replica
from lazarus.runtime.training.context import WorkerContext


class Hooks:
    """All hooks of a run, called in every worker in the order in which they were passed.

    A hook is an object with any of three methods. A step may run twice, so a hook must have no
    side effect except ``ctx.log``.

    * ``on_setup(ctx, model)`` is called when the model has been built; its experts do not exist
      yet.
    * ``on_gradients(ctx, named_grads)`` is called with the gradients of the step's summed loss,
      before clipping. Gradients are equal on all replicas and not yet divided by the step's count.
      A hook may change them in place if the result does not depend on the rank. Experts appear on
      the ranks that hold them, as ``{layer path}.experts.{expert}.{field}``.
    * ``on_commit(ctx, step)`` is called when ``step`` has been committed and applied on this rank.
    """

    def __init__(self, hooks: Sequence[Any], *, where: Whereabouts | None = None) -> None:
        self._hooks = tuple(hooks)
        self._where = Whereabouts() if where is None else where
        self._on_gradients = [h for h in self._hooks if hasattr(h, "on_gradients")]

    def setup(self, ctx: WorkerContext, model: nn.Module) -> None:
        """Call ``on_setup`` of every hook."""
        for hook in self._hooks:
            if hasattr(hook, "on_setup"):
                hook.on_setup(ctx, model)

    def gradients(self, ctx: WorkerContext, replica: Replica) -> None:
        """Call ``on_gradients`` when all gradients are summed and nothing has used them yet."""
        if not self._on_gradients:
            return
        found = named_gradients(replica)
        self._where.enter("on_gradients")
        for hook in self._on_gradients:
            hook.on_gradients(ctx, found)
        self._where.leave()

    @property
    def watch_commits(self) -> bool:
        """Whether any hook defines ``on_commit``."""
        return any(hasattr(hook, "on_commit") for hook in self._hooks)

    def commit(self, ctx: WorkerContext, step: int) -> None:
        """Call ``on_commit`` of every hook."""
        for hook in self._hooks:
            if hasattr(hook, "on_commit"):
                self._where.enter("on_commit")
                hook.on_commit(ctx, step)
        self._where.leave()


def named_gradients(replica: Replica) -> dict[str, Tensor]:
    """Views of all gradients on this rank, by global name."""
    found = {name: p.grad for name, p in replica.dense if p.grad is not None}
    for path, bank in zip(replica.layer_names, replica.banks, strict=True):
        if bank.is_frozen:
            continue
        assert bank.weight.grad is not None
        for slot, expert in enumerate(bank.expert_of_slot):
            if expert >= 0:
                for field, view in bank.field_views(bank.weight.grad[slot]).items():
                    found[f"{path}.experts.{expert}.{field}"] = view
    return found

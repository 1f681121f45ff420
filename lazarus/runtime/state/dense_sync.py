"""Sums dense gradients over all ranks, in buckets during the backward pass or after it.

A bucket is a stretch of the flat gradient buffer. The first bucket holds the last parameters, whose
gradients come first. Bounds depend on the model alone and buckets start in a fixed order, so
overlapping the backward changes no bit of the result.

All ranks must start collectives in the same order, but gradients may arrive in another order on
each rank, or not at all. So buckets start only at the end of an MoE layer's backward, which all
ranks pass; during a generation's first step the ranks learn at which end each bucket is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from dispatcher.exchange import Exchange, Pending
from lazarus.errors import ConfigError

BUCKET_BYTES = 25 << 20

_AT_THE_END = 1 << 30
_Arrival = Callable[[Tensor], None]
_Listen = Callable[[_Arrival], object]  # torch's own method has no annotation


class DenseSync:
    """Sums the flat gradient buffer over all ranks, once a step.

    Args:
        parameters: All dense parameters, in the order of the buffer.
        flat_grad: Their gradients, one after another.
        overlaps: Start buckets during the backward.
        bucket_bytes: Least size of every bucket but the last; None means ``BUCKET_BYTES``.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        flat_grad: Tensor,
        *,
        overlaps: bool,
        bucket_bytes: int | None = None,
    ) -> None:
        self.overlaps = overlaps
        self._flat_grad = flat_grad
        self._members = _members(parameters, BUCKET_BYTES if bucket_bytes is None else bucket_bytes)
        self._bounds = _bounds(self._members, flat_grad.numel())
        self._missing = [0] * len(self._members)
        self._armed = False  # the step's last backward is running
        self._passed = 0  # MoE layers whose backward is over
        self._complete: list[int] = []  # by bucket: `_passed` at its last gradient
        self._start_at: list[int] = []  # by bucket: `_passed` must exceed this; agreed on
        self._late: int | None = None  # bucket that had started before one of its gradients
        self._pending: list[Pending] = []
        self.begin_generation()
        if overlaps:
            for bucket, members in enumerate(self._members):
                for parameter in (p for p in members if p.requires_grad):
                    listen = cast("_Listen", parameter.register_post_accumulate_grad_hook)
                    listen(partial(self._arrived, bucket))

    def begin_generation(self) -> None:
        """Forget when buckets start, which the ranks of the previous generation had agreed on."""
        self._start_at = [_AT_THE_END] * len(self._bounds)
        self.start_step()

    def start_step(self) -> None:
        """Forget what an abandoned attempt has started."""
        self._armed, self._pending, self._late = False, [], None
        self._complete = [_AT_THE_END] * len(self._bounds)

    def arm(self) -> None:
        """Announce the step's last backward on this rank, which produces the final gradients."""
        if self.overlaps:
            self._armed, self._passed = True, 0
            self._missing = [sum(p.requires_grad for p in some) for some in self._members]

    def pass_layer(self, exchange: Exchange) -> None:
        """Start the buckets that are due at the end of an MoE layer's backward."""
        if self._armed:
            self._passed += 1
            while self._started < len(self._bounds) and self._due(self._started):
                self._start_next(exchange)

    def unit_done(self, exchange: Exchange, number: int) -> None:
        """Do nothing: gradients of all micro-batches are added up before the ranks sum them."""

    def finish(self, exchange: Exchange) -> Pending:
        """Start the remaining buckets. Wait on the result before touching a gradient.

        Raises:
            ConfigError: A gradient came after its bucket had been sent.
        """
        self._armed = False
        while self._started < len(self._bounds):
            self._start_next(exchange)
        if self._late is not None:
            begin, end = self._bounds[self._late]
            raise ConfigError(
                f"a dense gradient (elements {begin} to {end} of {self._flat_grad.numel()}) came "
                "later in the backward than in the first step, after it had been summed: the model "
                'uses its parameters in changing order; set dispatch.overlap = "off"'
            )
        return self

    def wait(self) -> None:
        """Return when every gradient is the sum over all ranks."""
        for pending in self._pending:
            pending.wait()

    def agree(self, exchange: Exchange) -> None:
        """Agree to start each bucket, from the next step on, where all ranks had it complete."""
        if not self.overlaps:
            return
        own = torch.tensor(self._complete, dtype=torch.float32, device=self._flat_grad.device)
        of_all = own.new_empty(exchange.size * own.numel())
        exchange.all_gather(of_all, own, label="digest")
        latest = of_all.view(exchange.size, -1).amax(0).cummax(0).values
        known = zip(self._start_at, latest.tolist(), strict=True)
        first_time = min(self._start_at, default=0) == _AT_THE_END
        self._start_at = [int(now) if first_time else max(was, int(now)) for was, now in known]

    @property
    def _started(self) -> int:
        return len(self._pending)

    def _due(self, bucket: int) -> bool:
        return self._start_at[bucket] < self._passed

    def _arrived(self, bucket: int, parameter: Tensor) -> None:
        del parameter
        if not self._armed:
            return
        self._missing[bucket] -= 1
        if bucket < self._started:
            self._late = bucket
        if not self._missing[bucket]:
            self._complete[bucket] = self._passed

    def _start_next(self, exchange: Exchange) -> None:
        begin, end = self._bounds[self._started]
        part = self._flat_grad[begin:end]
        self._pending.append(exchange.start_all_reduce(part, label="dense_grad"))


def _members(parameters: Sequence[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    """Parameters of each bucket; both buckets and parameters run from the last to the first."""
    buckets: list[list[nn.Parameter]] = []
    room = 0
    for parameter in reversed(parameters):
        if room <= 0:
            buckets.append([])
            room = bucket_bytes
        buckets[-1].append(parameter)
        room -= parameter.numel() * parameter.element_size()
    return buckets


def _bounds(members: Sequence[Sequence[nn.Parameter]], size: int) -> list[tuple[int, int]]:
    """Begin and end of each bucket in the flat buffer, in elements."""
    bounds, end = [], size
    for bucket in members:
        begin = end - sum(p.numel() for p in bucket)
        bounds.append((begin, end))
        end = begin
    return bounds

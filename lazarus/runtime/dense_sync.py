"""Dense gradients summed over all ranks: in buckets while the backward goes on, or after it.

A bucket is a stretch of the flat buffer; the last parameters, whose gradients come first, are in
the first one. Buckets start in one order on all ranks, whichever gradients come when, and their
bounds depend on the model alone: whether they overlap the backward changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from torch import Tensor, nn

from dispatcher.exchange import Exchange, Pending

BUCKET_BYTES = 25 << 20

_Arrival = Callable[[Tensor], None]
_Listen = Callable[[_Arrival], object]  # torch leaves its own unannotated


class DenseSync:
    """Sums one flat gradient buffer, step by step.

    Args:
        parameters: All dense ones, in the order of the buffer.
        flat_grad: Their gradients, side by side.
        overlaps: Start a bucket as soon as its last gradient is there. Every rank's graph must
            then have the same parameters in it, as the collectives of MoE layers want anyway.
        bucket_bytes: A bucket has at least so many, but for the last one. None: ``BUCKET_BYTES``,
            or one bucket for all where nothing overlaps.
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
        if bucket_bytes is None:
            bucket_bytes = BUCKET_BYTES if overlaps else flat_grad.nbytes
        self._members = _members(parameters, bucket_bytes)
        self._bounds = _bounds(self._members, flat_grad.numel())
        self._missing = [0] * len(self._members)
        self._exchange: Exchange | None = None  # set while a backward may start buckets
        self._pending: list[Pending] = []
        if overlaps:
            for bucket, members in enumerate(self._members):
                for parameter in members:
                    listen = cast("_Listen", parameter.register_post_accumulate_grad_hook)
                    listen(self._arrival(bucket))

    def start_step(self) -> None:
        """Forget what an abandoned attempt has started."""
        self._exchange, self._pending = None, []

    def arm(self, exchange: Exchange) -> None:
        """The next backward is the step's last on this rank: its gradients are the final ones."""
        if self.overlaps:
            self._exchange = exchange
            self._missing = [sum(p.requires_grad for p in some) for some in self._members]

    def finish(self, exchange: Exchange) -> Pending:
        """Start what has not been started; wait on the result before touching a gradient."""
        self._exchange = None
        while len(self._pending) < len(self._bounds):
            self._start_next(exchange)
        return self

    def wait(self) -> None:
        """Return when every gradient is the sum over all ranks."""
        for pending in self._pending:
            pending.wait()

    def _arrival(self, bucket: int) -> _Arrival:
        def arrived(parameter: Tensor) -> None:
            del parameter
            if self._exchange is None:
                return
            self._missing[bucket] -= 1
            while len(self._pending) < len(self._bounds) and not self._missing[len(self._pending)]:
                self._start_next(self._exchange)

        return arrived

    def _start_next(self, exchange: Exchange) -> None:
        begin, end = self._bounds[len(self._pending)]
        part = self._flat_grad[begin:end]
        self._pending.append(exchange.start_all_reduce(part, label="dense_grad"))


def _members(parameters: Sequence[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    """Parameters by bucket, from the last one to the first."""
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
    """Where each bucket lies in the flat buffer."""
    bounds, end = [], size
    for bucket in members:
        begin = end - sum(p.numel() for p in bucket)
        bounds.append((begin, end))
        end = begin
    return bounds

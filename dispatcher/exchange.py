"""The collectives that the dispatcher needs, behind one small protocol.

Every collective of a step goes through an ``Exchange``, in the same order on all ranks. A caller
can therefore wrap the exchange, for example to inject a fault at a label or to raise an error once
its generation is over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, Backend, ProcessGroup, ReduceOp
from torch.distributed import distributed_c10d as c10d

LABELS = (
    "counts", "dispatch", "combine", "combine_grad", "dispatch_grad",
    "replica_grad", "dense_grad", "meeting", "commit", "transfer", "digest",
)  # fmt: skip


class Pending(Protocol):
    """A collective that has been started; ``wait()`` blocks until its result is there."""

    def wait(self) -> None: ...


class Exchange(Protocol):
    """Collectives over ``size`` ranks, of which this process is ``rank``.

    Every call carries a label that says what the call is for (see ``LABELS``), possibly with more
    detail such as the layer. The ranks of one collective must pass equal labels: loopback and
    shared-memory exchanges compare them and raise ``RanksPartedError`` where they differ.
    """

    rank: int
    size: int

    def all_to_all(
        self,
        output: Tensor,
        input: Tensor,
        *,
        output_splits: Sequence[int],
        input_splits: Sequence[int],
        label: str,
    ) -> None:
        """Send rows of ``input`` to all ranks and receive theirs in ``output``; blocking.

        Args:
            output: Rows received, by source rank.
            input: Rows to send, by target rank.
            output_splits: Number of rows from each rank, [size].
            input_splits: Number of rows to each rank, [size].
            label: What the call is for.
        """

    def all_reduce(self, tensor: Tensor, *, label: str) -> None:
        """Sum ``tensor`` over all ranks in place, bit-identical on all ranks; blocking."""

    def start_all_reduce(self, tensor: Tensor, *, label: str) -> Pending:
        """Start an ``all_reduce``; ``tensor`` must not be touched before ``wait()`` returns."""

    def all_gather(self, output: Tensor, input: Tensor, *, label: str) -> None:
        """Concatenate the inputs of all ranks in rank order into ``output``; blocking."""


class Done:
    """A ``Pending`` whose collective has already completed."""

    def wait(self) -> None:
        return None


class SoloExchange:
    """The exchange of a single rank; every collective is a local copy."""

    rank = 0
    size = 1

    def all_to_all(
        self,
        output: Tensor,
        input: Tensor,
        *,
        output_splits: Sequence[int],
        input_splits: Sequence[int],
        label: str,
    ) -> None:
        output.copy_(input)

    def all_reduce(self, tensor: Tensor, *, label: str) -> None:
        return None

    def start_all_reduce(self, tensor: Tensor, *, label: str) -> Pending:
        return Done()

    def all_gather(self, output: Tensor, input: Tensor, *, label: str) -> None:
        output.copy_(input.reshape(output.shape))


class _Work:
    """Adapts a ``torch.distributed`` work object to ``Pending``."""

    def __init__(self, work: Any) -> None:
        self._work = work

    def wait(self) -> None:
        self._work.wait()


class TorchExchange:
    """An exchange over a torch process group.

    Args:
        group: A process group (gloo, NCCL); may also be built directly on a store. None: the
            default group of ``torch.distributed``.
    """

    def __init__(self, group: ProcessGroup | Backend | None = None) -> None:
        self._group: Any = group if group is not None else c10d._get_default_group()
        self.rank: int = self._group.rank()
        self.size: int = self._group.size()

    def all_to_all(
        self,
        output: Tensor,
        input: Tensor,
        *,
        output_splits: Sequence[int],
        input_splits: Sequence[int],
        label: str,
    ) -> None:
        options = c10d.AllToAllOptions()
        self._group.alltoall_base(
            output, input, list(output_splits), list(input_splits), options
        ).wait()

    def all_reduce(self, tensor: Tensor, *, label: str) -> None:
        self.start_all_reduce(tensor, label=label).wait()

    def start_all_reduce(self, tensor: Tensor, *, label: str) -> Pending:
        options = c10d.AllreduceOptions()
        options.reduceOp = ReduceOp.SUM  # type: ignore[assignment]
        return _Work(self._group.allreduce([tensor], options))

    def all_gather(self, output: Tensor, input: Tensor, *, label: str) -> None:
        self._group._allgather_base(output, input, AllgatherOptions()).wait()

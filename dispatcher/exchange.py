"""The collectives that the dispatcher needs, behind one small protocol.

Every collective of a step goes through an ``Exchange``, in one order on all ranks, so that a caller
can wrap it: to inject a fault at a labelled place, or to raise when its generation is over.
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
    """A collective under way."""

    def wait(self) -> None: ...


class Exchange(Protocol):
    """Collectives over ``size`` ranks; labels say what a call is for (see ``LABELS``).

    A label may say more than that, such as which layer. Ranks that meet must use equal labels: the
    exchanges within a machine compare them, and raise ``RanksPartedError`` where they differ.
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
        """Rows of dim 0, ``input_splits[j]`` of them to rank j, in rank order; blocking."""

    def all_reduce(self, tensor: Tensor, *, label: str) -> None:
        """Sum in place, equal bits on all ranks; blocking."""

    def start_all_reduce(self, tensor: Tensor, *, label: str) -> Pending:
        """Like ``all_reduce``; the tensor must not be touched before ``wait()``."""

    def all_gather(self, output: Tensor, input: Tensor, *, label: str) -> None:
        """Inputs of all ranks, one after the other in rank order, into ``output``; blocking."""


class Done:
    """A collective that has already ended."""

    def wait(self) -> None:
        return None


class SoloExchange:
    """The exchange of a world of one: copies, never waits."""

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
    """A torch work object whose wait returns nothing and raises what the group raised."""

    def __init__(self, work: Any) -> None:
        self._work = work

    def wait(self) -> None:
        self._work.wait()


class TorchExchange:
    """An exchange over a torch process group.

    Args:
        group: A process group object (gloo, NCCL), also one built directly on a store. ``None``
            means the default group of ``torch.distributed``.
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

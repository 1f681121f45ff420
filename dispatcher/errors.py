"""What can go wrong in a dispatch, each with the numbers and the way out."""

from __future__ import annotations

from collections.abc import Sequence


class DispatchError(Exception):
    """Base of the dispatcher's errors. Pickling keeps message and fields."""

    def __reduce__(self) -> tuple[object, ...]:
        return BaseException.__new__, (type(self), *self.args), self.__dict__


class RoutingTableError(DispatchError, ValueError):
    """The table cannot route: an expert without a replica, shares off their replicas."""


class DispatchInputError(DispatchError, ValueError):
    """This rank's tokens or expert ids cannot be dispatched. Its peers are told."""


class PeerInputError(DispatchError):
    """Another rank refused its own input, so no rank dispatched anything."""

    def __init__(self, *, rank: int, reason: str) -> None:
        super().__init__(f"rank {rank} refused its input ({reason}); nothing was dispatched")
        self.rank, self.reason = rank, reason


class RankMismatchError(DispatchError, ValueError):
    """The ranks' tokens or tables do not fit each other. Every rank raises it."""

    def __init__(self, *, what: str, values: Sequence[str]) -> None:
        ranks: dict[str, list[str]] = {}
        for rank, value in enumerate(values):
            ranks.setdefault(value, []).append(str(rank))
        parts = [f"{value} on {_ranks(where)}" for value, where in ranks.items()]
        super().__init__(f"ranks differ in {what}: {'; '.join(parts)}; nothing was dispatched")
        self.what, self.values = what, tuple(values)


class RanksPartedError(DispatchError):
    """Ranks met in different collectives: their user code has parted ways. Every rank raises it.

    Args:
        places: What each rank is at, by rank; None where it is not known.
    """

    def __init__(self, places: Sequence[str | None]) -> None:
        ranks: dict[str, list[str]] = {}
        for rank, place in enumerate(places):
            if place is not None:
                ranks.setdefault(place, []).append(str(rank))
        sides = "; ".join(
            f"{_ranks(where)} {'are' if len(where) > 1 else 'is'} at {place}"
            for place, where in ranks.items()
        )
        super().__init__(f"ranks do not run the same layers: {sides}")
        self.places = tuple(places)


def _ranks(names: Sequence[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > 8 else ""
    return f"rank{'s' * (len(names) > 1)} {', '.join(names[:8])}{more}"


class HandleError(DispatchError):
    """A dispatch handle was used twice, or after its generation had ended."""

    def __init__(self, what: str, *, generation: int) -> None:
        super().__init__(f"{what} (handle of generation {generation}); dispatch again")
        self.generation = generation


class ExchangeClosedError(DispatchError):
    """A peer of a loopback exchange failed or left, so this collective cannot complete."""


class LinkError(DispatchError, RuntimeError):
    """A rank of the same machine is gone or silent."""

    def __init__(self, *, peer: int, reason: str) -> None:
        super().__init__(f"exchange with rank {peer} failed: {reason}")
        self.peer, self.reason = peer, reason


class PartedLinkError(LinkError, RanksPartedError):
    """Ranks of one machine met in different collectives; names one rank of each side."""

    def __init__(self, *, peer: int, reason: str) -> None:
        DispatchError.__init__(self, f"ranks do not run the same layers: {reason}")
        self.peer, self.reason, self.places = peer, reason, ()

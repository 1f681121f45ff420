"""Errors of the dispatcher."""

from __future__ import annotations

from collections.abc import Sequence


class DispatchError(Exception):
    """Base class of the dispatcher's errors. Pickling keeps message and fields."""

    def __reduce__(self) -> tuple[object, ...]:
        return BaseException.__new__, (type(self), *self.args), self.__dict__


class RoutingTableError(DispatchError, ValueError):
    """A routing table is invalid, for example because an expert has no replica."""


class DispatchInputError(DispatchError, ValueError):
    """This rank's tokens or expert ids are invalid. All other ranks raise ``PeerInputError``."""


class PeerInputError(DispatchError):
    """The input of another rank is invalid, so no rank dispatched anything."""

    def __init__(self, *, rank: int, reason: str) -> None:
        super().__init__(f"rank {rank} refused its input ({reason}); nothing was dispatched")
        self.rank, self.reason = rank, reason


class RankMismatchError(DispatchError, ValueError):
    """The ranks' tokens or tables do not match. Every rank raises this error."""

    def __init__(self, *, what: str, values: Sequence[str]) -> None:
        ranks: dict[str, list[str]] = {}
        for rank, value in enumerate(values):
            ranks.setdefault(value, []).append(str(rank))
        parts = [f"{value} on {_ranks(where)}" for value, where in ranks.items()]
        super().__init__(f"ranks differ in {what}: {'; '.join(parts)}; nothing was dispatched")
        self.what, self.values = what, tuple(values)


class RanksPartedError(DispatchError):
    """Ranks are in different collectives: their user code took different paths.

    Every rank raises this error.

    Args:
        places: The place of each rank in the step, as text, by rank; None if unknown.
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
    """Another rank of a loopback exchange failed or left, so the collective cannot complete."""


class LinkError(DispatchError, RuntimeError):
    """The exchange with another rank of this node failed: the rank is gone, silent or aborted."""

    def __init__(self, *, peer: int, reason: str) -> None:
        super().__init__(f"exchange with rank {peer} failed: {reason}")
        self.peer, self.reason = peer, reason


class PartedLinkError(LinkError, RanksPartedError):
    """Ranks of one node are in different collectives; the message names one rank of each side."""

    def __init__(self, *, peer: int, reason: str) -> None:
        DispatchError.__init__(self, f"ranks do not run the same layers: {reason}")
        self.peer, self.reason, self.places = peer, reason, ()

"""Background healing: replicas that are transferred after RESUME, in rounds between steps."""

from __future__ import annotations

from lazarus.control.messages import Prepare
from lazarus.control.plans.healing import missing_after, without
from lazarus.runtime.healing.transfer import TransferRun, expert_pieces, rounds_of
from lazarus.runtime.state.replica import Replica
from placement import Plan


class Refill:
    """Transfers that one generation has left for after RESUME; may be empty."""

    def __init__(self, order: Prepare, plan: Plan, feed: TransferRun, replica: Replica) -> None:
        moves = order.moves_behind
        pieces = expert_pieces(moves, record_bytes=replica.record_bytes)
        self._rounds = list(rounds_of(pieces))
        self._missing = missing_after(moves)
        self._plan, self._feed, self._replica = plan, feed, replica
        self.num_bytes = sum(piece.num_bytes for piece in pieces)

    @property
    def is_over(self) -> bool:
        """Whether all transfers are done."""
        return not self._rounds

    @property
    def plan(self) -> Plan:
        """The plan restricted to replicas that have arrived, which routing may use now."""
        return without(self._plan, self._missing)

    def run_round(self, rank: int) -> None:
        """Run the next round, and place the experts that ``rank`` received.

        The training tensors must not change meanwhile.
        """
        batch = self._rounds.pop(0)
        self._feed.run_round(batch)
        self._missing -= {(piece.layer, piece.expert, piece.target) for piece in batch}
        plan = self.plan
        for layer in sorted({piece.layer for piece in batch if piece.target == rank}):
            experts = [int(e) for e in plan.expert_of_slot[layer, rank] if e >= 0]
            self._replica.place(layer, experts, self._feed.staged)
        self._feed.staged.clear()

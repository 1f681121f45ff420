"""A rank carries out the controller's orders: ALIGN, PREPARE, RESUME and FINALIZE.

Rules 7 and 18 to 20 of docs/protocol.md are kept here: an attempt's groups are closed before
anything else, a step is redone or taken over from the ranks that committed it, and the rank says
what it holds. ``preparation.py`` is PREPARE; ``generation.py`` is RESUME and what follows.
"""

from __future__ import annotations

import numpy as np

from lazarus.control.messages import (
    Align,
    Aligned,
    Body,
    Finalize,
    Prepare,
    Ready,
    Resume,
    SnapshotHeld,
    Vector,
)
from lazarus.errors import BrokenInvariantError, FencedError
from lazarus.runtime.fence.ledger import StepLedger
from lazarus.runtime.fence.observer import Observer
from lazarus.runtime.spec import WorkerSpec
from lazarus.runtime.state.checksums import text_checksum
from lazarus.runtime.state.compare import tensor_sums
from lazarus.runtime.worker.common_state import ref_of
from lazarus.runtime.worker.generation import Generation, begin
from lazarus.runtime.worker.parts import Send, make_parts
from lazarus.runtime.worker.preparation import Pending, Preparation
from placement import Plan


class Rank:
    """One rank between orders. Only ``release`` and ``told`` are used by the control thread.

    Attributes:
        parts: What the rank consists of, whatever the generation.
        generation: The generation that the rank computes in; None from a fence to RESUME.
        context: The newest context for user functions.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        *,
        node: int,
        ledger: StepLedger,
        observer: Observer,
        send: Send,
    ) -> None:
        self.parts = make_parts(spec, node=node, ledger=ledger, observer=observer, send=send)
        self.context = self.parts.first_context
        self.generation: Generation | None = None
        self._pending: Pending | None = None
        self._plan: Plan | None = None  # plan of the newest RESUME
        self._term = 0
        self._aligned = 0  # newest generation that this rank aligned for

    def release(self) -> None:
        """Free the training thread from any wait. Called by the control thread."""
        self.parts.groups.release()

    def close(self) -> None:
        """Stop reading data and saving."""
        self.parts.reading.close()
        if self.parts.saver is not None:
            self.parts.saver.close()

    @property
    def told(self) -> tuple[Body, ...]:
        """Messages to repeat to a new controller: last evaluation, and shares of checkpoints."""
        saver, evaluation = self.parts.saver, self.parts.between.told
        shares = () if saver is None else saver.told
        return shares if evaluation is None else (evaluation, *shares)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0 of its generation; without a generation, every rank may be."""
        return self.generation is None or self.generation.standing.is_first

    def _end_generation(self) -> None:
        """Drop the generation and close its groups, before its buffers are used again (rule 7)."""
        self.generation = None
        self.parts.groups.close()

    def _current(self) -> Generation:
        if self.generation is None:
            raise BrokenInvariantError("an order that needs a generation has come without one")
        return self.generation

    # ---- ALIGN ---------------------------------------------------------------------------------

    def redo(self) -> None:
        """Drop the current attempt, and restore scratch state as of the last commit (rule 20)."""
        self._end_generation()
        self.parts.common.stand_still()
        self.parts.replica.restore_scratch()

    def accept(self, order: Align) -> None:
        """Apply a step that other ranks committed, using their vector, bit for bit (rule 20)."""
        current, ledger = self._current(), self.parts.ledger
        sums = current.decode(np.frombuffer(order.lanes, dtype="<f8").copy())
        generation = current.standing.generation
        ledger.accept(Vector(generation=generation, step=order.step, lanes=order.lanes))
        current.apply(sums)
        ledger.applied(order.step)
        self._end_generation()

    def reload(self, place: str) -> None:
        """Take the common state of another step, since no rank holds the present one.

        Args:
            place: A checkpoint as "url step", or "init" for the state of the first step.
        """
        self._pending = None
        common = self.parts.common
        common.take_base(common.read_base(ref_of(place), self.context, read=self.parts.patient()))

    def aligned(self, order: Align, term: int) -> Aligned:
        """Describe this rank's state, for the controller to compare and to plan with."""
        parts, generation = self.parts, order.generation
        replica, common, ledger = parts.replica, parts.common, parts.ledger
        self._end_generation()
        if parts.saver is not None:
            parts.saver.aligned(ledger.gen)
        self._aligned, self._term = generation, term
        base = None if self._pending is None else self._pending.base
        self._pending = None
        if base is not None and base.step == order.step != ledger.committed:
            common.take_base(base)  # RESUME was sent, but did not reach this rank
        common.take_start(self.context, read=parts.patient())
        snapshots: tuple[SnapshotHeld, ...] = ()
        if parts.saver is not None and parts.spec.local_rank == 0:
            snapshots = parts.saver.inventory(term=term, generation=generation)
        return Aligned(
            generation=generation,
            step=ledger.committed,
            dense_digest=replica.dense_digest(),
            history_digest=common.history_digest(),
            history=replica.history.astype("<f8").tobytes(),
            held=replica.held(self._plan),
            settings_digest=f"{text_checksum(replica.settings()):x}",
            scalars=common.scalars(),
            snapshots=snapshots,
            tensors=() if ledger.gen else tensor_sums(replica),
            place=parts.observer.where.places.get("build", ""),
            **replica.shape(),
        )

    # ---- PREPARE, RESUME, FINALIZE -------------------------------------------------------------

    def prepare(self, order: Prepare, term: int) -> Ready:
        """Get ready for a generation without touching any expert slot (rules 23 and 24)."""
        self._end_generation()
        self._term = term  # a joining rank gets no ALIGN
        self._pending = None
        has_aligned = self._aligned == order.generation
        preparation = Preparation(
            order, self.parts, context=self.context, term=term, has_aligned=has_aligned
        )
        self._pending, ready = preparation.run()
        return ready

    def resume(self, order: Resume) -> Generation:
        """Begin the generation that was prepared (rule 25).

        Raises:
            FencedError: A newer generation was prepared, or none.
        """
        pending = self._pending
        if pending is None or pending.order.generation != order.generation:
            fence = self.parts.ledger.fence
            raise FencedError(generation=order.generation, fence=fence)
        self._pending = None
        self.generation = begin(order, pending, self.parts, term=self._term, context=self.context)
        self._plan, self.context = self.generation.standing.plan, self.generation.context
        return self.generation

    def finalize(self, order: Finalize) -> list[Body]:
        """Messages for FINALIZE: the last digest, and this rank's share of the last checkpoint."""
        return self._current().finalize(order)

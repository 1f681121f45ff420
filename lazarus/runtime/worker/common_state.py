"""What all ranks have in common: everything but the experts. One rank's copy of it.

That is the dense tensors and the numbers of the optimizer, the load history, the schedule of
saves, the position in the data, and the last evaluation. A joiner takes it from a peer, a rollback
from a checkpoint, and ranks compare it at every change of members.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import xxhash
from torch import Tensor

from lazarus.checkpoint.format.ref import CheckpointRef
from lazarus.control.messages import Prepare
from lazarus.errors import CheckpointError
from lazarus.runtime.fence.ledger import StepLedger
from lazarus.runtime.healing.restore import PatientReader, bad_source
from lazarus.runtime.input.reader import Reading
from lazarus.runtime.saving.rollback_state import Base, read_base
from lazarus.runtime.saving.saver import Saver
from lazarus.runtime.state.checksums import text_checksum
from lazarus.runtime.state.replica import Replica
from lazarus.runtime.training.between_steps import BetweenSteps
from lazarus.runtime.training.context import WorkerContext
from lazarus.runtime.training.factory import Workshop


class CommonState:
    """Reads, compares and replaces what is equal on all ranks."""

    def __init__(
        self,
        replica: Replica,
        *,
        reading: Reading,
        boundary: BetweenSteps,
        ledger: StepLedger,
        workshop: Workshop,
    ) -> None:
        self._replica, self._reading, self._boundary = replica, reading, boundary
        self._ledger, self._workshop = ledger, workshop
        self.saver: Saver | None = None
        self._first = ""

    def begin(self, saver: Saver | None) -> None:
        """All parts are there, and nothing has been trained yet."""
        self.saver = saver
        self._first = self.scalars()

    def scalars(self) -> str:
        """Numbers that are equal on all ranks: the optimizer's, and the save schedule's."""
        save = None if self.saver is None else self.saver.schedule.to_text()
        return json.dumps(
            {
                "optimizer": self._replica.scalars(),
                "save": save,
                "data": self._reading.state(),
                "evaluated": self._boundary.state(),
                "settings": self._replica.settings(),
            }
        )

    def take_scalars(self, text: str) -> None:
        """The inverse of ``scalars``."""
        found = json.loads(text)
        self._replica.take_scalars(found["optimizer"])
        self._boundary.take_state(found.get("evaluated"))
        if "data" in found:
            self._reading.take_state(found["data"])
        if self.saver is not None and found["save"] is not None:
            self.saver.schedule.take_text(found["save"])

    def agree(self, text: str) -> None:
        """Before RESUME every rank takes the same member's word for what is no state.

        Settings are not taken from a checkpoint: a resumed run may have others.
        """
        self._boundary.agree(text)
        found = json.loads(text) if text else {}
        if "settings" in found:
            self._replica.take_settings(found["settings"])

    def checksum(self) -> int:
        """Of all of it; never 0."""
        replica = self._replica
        return text_checksum(replica.dense_digest(), self.history_digest(), replica.settings())

    def history_digest(self, base: Base | None = None) -> str:
        """Fast checksum of what committed steps have counted: loads, and the schedule of saves.

        Args:
            base: Of this state, which is not taken over yet, instead of the rank's own.
        """
        if base is None:
            schedule = "" if self.saver is None else self.saver.schedule.to_text()
            return _digest(self._replica.history_digest(), schedule)
        return _digest(base.history_digest(), str(json.loads(base.scalars)["save"] or ""))

    def read_base(
        self, ref: CheckpointRef | None, context: WorkerContext, *, read: PatientReader
    ) -> Base:
        """The state of a checkpoint, or of the first step (None).

        Experts come with PREPARE. Nothing of this rank's own state is touched yet (rule 23).

        Raises:
            BadSourceError: The checkpoint lacks something or is damaged.
        """
        if ref is None:
            return Base.of(self._workshop.replica(context), step=0, scalars=self._first)
        try:
            return read_base(ref, self._replica, read=read)
        except CheckpointError as problem:
            what = f"the checkpoint of step {ref.step}"
            raise bad_source(problem, name=str(ref), what=what, source=ref.url) from problem

    def take_base(self, base: Base) -> None:
        """Stand at another step: all that this rank held belongs to a history that is over."""
        self.stand_still()
        self._replica.load_dense(base.dense)
        self._replica.history = base.history
        self.take_scalars(base.scalars)
        self._replica.forget_experts()
        self._ledger.stand(base.step)

    def join(self, order: Prepare) -> None:
        """A joiner has the dense tensors: make the rest its own."""
        self.take_numbers(order.scalars, order.history)
        self._replica.keep_buffers()
        self._replica.forget_experts()
        self._ledger.stand(order.step)

    def repair(self, dense: Mapping[str, Tensor], order: Prepare) -> None:
        """A member whose state was outvoted has received that of the majority; experts stay."""
        self.stand_still()
        self._replica.load_dense(dense)
        self.take_numbers(order.scalars, order.history)

    def take_numbers(self, scalars: str, history: bytes) -> None:
        """What another rank says beside its dense tensors; ``history`` is float64 [3, L, E]."""
        found = np.frombuffer(history, dtype="<f8")
        self._replica.history = found.reshape(self._replica.history.shape).astype(np.float64)
        self.take_scalars(scalars)
        self.agree(scalars)

    def stand_still(self) -> None:
        """Before anything writes training tensors: no snapshot reads them any more."""
        if self.saver is not None:
            self.saver.wait_before_write()


def _digest(*words: str) -> str:
    return xxhash.xxh3_128_hexdigest("\n".join(words).encode())

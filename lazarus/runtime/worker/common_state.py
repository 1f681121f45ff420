"""One rank's copy of the state that all ranks have in common: everything but the experts.

That is the dense tensors, the optimizer's numbers, the load history, the save schedule, the
position in the data, and the last evaluation. A joining rank takes this state from a peer, a
rollback from a checkpoint. At every change of members ranks compare all of it but the position and
the evaluation.
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
    """Reads, compares and replaces the state that is equal on all ranks."""

    def __init__(
        self,
        replica: Replica,
        *,
        reading: Reading,
        between: BetweenSteps,
        ledger: StepLedger,
        workshop: Workshop,
        start: CheckpointRef | None,
    ) -> None:
        """``start``: the checkpoint from which the run was resumed, if any."""
        self._replica, self._reading, self._between = replica, reading, between
        self._ledger, self._workshop = ledger, workshop
        self._start = start  # None once this rank has taken over any state
        self._saver: Saver | None = None
        self._first = ""

    def begin(self, saver: Saver | None) -> None:
        """Note the state before training. Called once, when all parts have been made."""
        self._saver = saver
        self._first = self.scalars()

    def scalars(self) -> str:
        """JSON of the common state beside tensors and load history.

        That is the optimizer's numbers and settings, save schedule, data position, last evaluation.
        A rank knows newer positions of its own shards of a stream than of other shards.
        """
        save = None if self._saver is None else self._saver.schedule.to_text()
        return json.dumps(
            {
                "optimizer": self._replica.scalars(),
                "save": save,
                "data": self._reading.state(),
                "evaluated": self._between.state(),
                "settings": self._replica.settings(),
            }
        )

    def take_scalars(self, text: str) -> None:
        """Take over what ``scalars`` returned elsewhere, except the optimizer's settings."""
        found = json.loads(text)
        self._replica.take_scalars(found["optimizer"])
        self._between.take_state(found.get("evaluated"))
        if "data" in found:
            self._reading.take_state(found["data"])
        if self._saver is not None and found["save"] is not None:
            self._saver.schedule.take_text(found["save"])

    def agree(self, text: str) -> None:
        """Take the last evaluation and the optimizer's settings of one chosen member before RESUME.

        ``take_scalars`` leaves settings alone, since a resumed run may be configured with others.

        Args:
            text: The member's ``scalars``, or empty to keep this rank's own.
        """
        self._between.agree(text)
        found = json.loads(text) if text else {}
        if "settings" in found:
            self._replica.take_settings(found["settings"])

    def checksum(self) -> int:
        """Checksum of dense state, load history, save schedule and settings; never 0."""
        replica = self._replica
        return text_checksum(replica.dense_digest(), self.history_digest(), replica.settings())

    def history_digest(self, base: Base | None = None) -> str:
        """Fast checksum of the load history and the save schedule.

        Args:
            base: If given, the checksum is of this state, which is not taken over yet.
        """
        if base is None:
            schedule = "" if self._saver is None else self._saver.schedule.to_text()
            return _digest(self._replica.history_digest(), schedule)
        return _digest(base.history_digest(), str(json.loads(base.scalars)["save"] or ""))

    def read_base(
        self, ref: CheckpointRef | None, context: WorkerContext, *, read: PatientReader
    ) -> Base:
        """Read the common state of a checkpoint, or of the first step if ``ref`` is None.

        Experts are fetched later, with PREPARE. This rank's own state is not changed (rule 23 of
        docs/protocol.md).

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

    def take_start(self, context: WorkerContext, *, read: PatientReader) -> None:
        """Take the state from which the run was resumed, unless this rank has taken over another.

        Raises:
            BadSourceError: The checkpoint lacks something or is damaged.
        """
        if self._start is not None:
            self.take_base(self.read_base(self._start, context, read=read))

    def take_base(self, base: Base) -> None:
        """Replace this rank's state by ``base``, and give up all experts."""
        self.stand_still()
        self._replica.load_dense(base.dense)
        self._replica.history = base.history
        self.take_scalars(base.scalars)
        self._replica.forget_experts()
        self._ledger.start_from(base.step)
        self._start = None

    def join(self, order: Prepare) -> None:
        """Complete the state of a joining rank that has received the dense tensors."""
        self.take_numbers(order.scalars, order.history)
        self._replica.keep_buffers()
        self._replica.forget_experts()
        self._ledger.start_from(order.step)
        self._start = None

    def repair(self, dense: Mapping[str, Tensor], order: Prepare) -> None:
        """Replace the common state of an outvoted rank by the majority's; its experts stay."""
        self.stand_still()
        self._replica.load_dense(dense)
        self.take_numbers(order.scalars, order.history)

    def take_numbers(self, scalars: str, history: bytes) -> None:
        """Take over another rank's state beside the dense tensors.

        Args:
            scalars: The rank's ``scalars``.
            history: The rank's load history, little-endian float64 [3, layers, experts].
        """
        found = np.frombuffer(history, dtype="<f8")
        self._replica.history = found.reshape(self._replica.history.shape).astype(np.float64)
        self.take_scalars(scalars)
        self.agree(scalars)

    def stand_still(self) -> None:
        """Wait until no snapshot reads the training tensors, before anything writes them."""
        if self._saver is not None:
            self._saver.wait_before_write()


def ref_of(place: str) -> CheckpointRef | None:
    """The checkpoint that an order names; None for "init", the state of the first step."""
    return None if place == "init" else CheckpointRef.parse(place)


def _digest(*words: str) -> str:
    return xxhash.xxh3_128_hexdigest("\n".join(words).encode())

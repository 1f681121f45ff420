"""Labels of the exchanges that a rank has run; ranks that run the same exchanges have equal labels.

If user code runs other layers on one rank than on another, the ranks meet in different
collectives. Exchanges within a machine compare labels directly. Over a network, the newest labels
of all ranks are compared when a collective fails, and a checksum of the labels at every commit.
"""

from __future__ import annotations

import sys
import traceback
import zlib
from collections import deque
from collections.abc import Callable

from lazarus.basics.tracebacks import UserLine, calling_line, innermost, line_text
from lazarus.control.messages import Tail

KEPT = 24  # labels kept: ranks that wait for each other are a few exchanges apart

_PLACES = {
    "counts": "layer {layer} forward (counts)",
    "dispatch": "layer {layer} forward (dispatch)",
    "combine": "layer {layer} forward (combine)",
    "combine_grad": "layer {layer} backward (combine_grad)",
    "dispatch_grad": "layer {layer} backward (dispatch_grad)",
    "replica_grad": "layer {layer} gradients (replica_grad)",
    "dense_grad": "dense gradients (dense_grad)",
    "meeting": "end of the backward (meeting)",
}


class Trail:
    """Labels of one group's exchanges, in order. Any thread may read the newest ones.

    ``step`` and ``round`` are set from outside and are -1 outside a step or round.

    Args:
        generation: Generation of the group.
        group: Name of the group within the generation.
        rank: This process's rank in the group.
        mute_peers: Returns the ranks whose links carry nothing.
    """

    def __init__(
        self,
        *,
        generation: int,
        group: str,
        rank: int,
        mute_peers: Callable[[], tuple[int, ...]] = tuple,
    ) -> None:
        self.name = f"{group} of generation {generation}"
        self.step = self.round = -1
        self._rank, self._mute_peers = rank, mute_peers
        self._count = 0
        self._newest: deque[tuple[int, str, UserLine | None]] = deque(maxlen=KEPT)
        self._checksum = 0

    def note(self, label: str, *, layer: int) -> str:
        """Add the label of an exchange that is about to begin, and return it."""
        place = _PLACES.get(label, label).format(layer=layer)
        within = f" of round {self.round}" if self.round >= 0 else ""
        when = f" in step {self.step}" if self.step >= 0 else ""
        text = f"{place}{within}{when} #{self._count}"
        self._newest.append((self._count, text, calling_line(sys._getframe())))
        self._count += 1
        self._checksum = zlib.crc32(text.encode(), self._checksum)
        return text

    def newest(self) -> tuple[str, ...]:
        """The newest labels, in order."""
        return tuple(text for _, text, _ in tuple(self._newest))

    def tail(self, *, step: int, thread: int) -> Tail:
        """The newest exchanges, for a report. Safe to call from any thread; never waits.

        Args:
            step: The step that is being computed.
            thread: Identifier of the training thread, as ``threading.get_ident`` returns it.
        """
        kept = tuple(self._newest)
        return Tail(
            group=self.name,
            last=kept[-1][0] if kept else -1,
            labels=tuple(text for _, text, _ in kept),
            places=tuple("" if line is None else line_text(*line) for _, _, line in kept),
            rank=self._rank,
            step=step,
            place=user_line(thread),
            mute=self._mute_peers(),
        )

    def start_step(self, step: int) -> None:
        """Begin ``step``: later labels name it, and the checksum starts anew."""
        self.step, self.round, self._checksum = step, -1, 0

    @property
    def checksum(self) -> int:
        """Checksum of the labels since ``start_step``, below 2**20 so that its square is exact."""
        return self._checksum & 0xFFFFF


def user_line(thread: int) -> str:
    """The innermost line of user code that a thread runs, as "train.py:12 in loss", or ""."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return ""
    return innermost(traceback.extract_stack(frame))

"""Which exchanges a rank has run: labels that are equal on all ranks that meet.

User code that runs other layers on one rank than on another makes ranks meet in different
collectives. Exchanges within a machine compare the labels themselves; over a network the newest
labels of all ranks are compared when a collective fails, and a checksum at every commit.
"""

from __future__ import annotations

import zlib
from collections import deque

KEPT = 24  # ranks that wait for each other are at most a few exchanges apart

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
    """Labels of one group's exchanges, in order; any thread may ask for the newest ones.

    Args:
        generation: Of the group.
        group: Its name within the generation.
    """

    def __init__(self, *, generation: int, group: str) -> None:
        self.name = f"{group} of generation {generation}"
        self._count = 0
        self._newest: deque[tuple[int, str]] = deque(maxlen=KEPT)
        self._checksum = 0

    def note(self, label: str, *, step: int, round: int, layer: int) -> str:
        """Add an exchange that is about to begin; returns its whole label."""
        place = _PLACES.get(label, label).format(layer=layer)
        within = f" of round {round}" if round >= 0 else ""
        text = f"{place}{within} in step {step} #{self._count}"
        self._newest.append((self._count, text))
        self._count += 1
        self._checksum = zlib.crc32(text.encode(), self._checksum)
        return text

    def newest(self) -> tuple[int, tuple[str, ...]]:
        """The number of the last exchange, and the labels up to it."""
        kept = tuple(self._newest)
        return (kept[-1][0] if kept else -1), tuple(text for _, text in kept)

    def start_step(self) -> None:
        """What the checksum covers begins here."""
        self._checksum = 0

    @property
    def checksum(self) -> int:
        """Of the labels since ``start_step``, below 2**20: sums of its square stay exact."""
        return self._checksum & 0xFFFFF

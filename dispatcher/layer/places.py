"""Where in a step a rank is, as one number that travels with the counts of every layer.

Ranks whose user code has parted ways meet in the counts of different layers or rounds. A number
that all compare tells them so before a token is sent. Zero says nothing: nobody counts rounds.
"""

from __future__ import annotations

from enum import IntEnum

_LAYERS, _ROUNDS, _STEPS = 1 << 9, 1 << 9, 1 << 10  # 31 bits with the kind: an int32 lane


class Meeting(IntEnum):
    """What ranks meet for."""

    FORWARD = 1  # a layer's first forward; its backward follows
    WITHOUT_GRAD = 2  # the same where no backward follows
    REPEATED = 3  # a forward that checkpointing repeats inside a backward
    BACKWARD_OVER = 4  # the last backward of a step, or the last forward of an evaluation


def place_code(kind: Meeting, *, layer: int = 0, round: int = 0, step: int = 0) -> int:
    """The number of a place, 1 to 2**31 - 1; large numbers wrap around."""
    code = step % _STEPS
    code = code * _ROUNDS + round % _ROUNDS
    code = code * _LAYERS + layer % _LAYERS
    return code * 8 + kind


def place_text(code: int) -> str:
    """The place in words."""
    rest, kind = divmod(code, 8)
    rest, layer = divmod(rest, _LAYERS)
    number = rest % _ROUNDS
    match kind:
        case Meeting.FORWARD:
            return f"layer {layer} forward of round {number}"
        case Meeting.WITHOUT_GRAD:
            return f"layer {layer} forward without a backward of round {number}"
        case Meeting.REPEATED:
            return f"layer {layer} forward, repeated in the backward of round {number}"
        case Meeting.BACKWARD_OVER:
            return f"the end of the last backward, of round {number}"
    return "an unknown place"

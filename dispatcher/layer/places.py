"""Place codes: a rank's position in a step as one number, sent with the counts of every layer.

If the user code takes different paths on different ranks, a rank meets the counts of another layer
or round. Comparing place codes detects this before any token is sent. Code 0 means "unknown".
"""

from __future__ import annotations

from enum import IntEnum

_LAYERS, _ROUNDS, _STEPS = 1 << 9, 1 << 9, 1 << 10  # with 3 bits of kind: 31 bits


class Meeting(IntEnum):
    """Reason why ranks meet in a collective."""

    FORWARD = 1  # first forward of a layer; a backward follows
    WITHOUT_GRAD = 2  # forward of a layer; no backward follows
    REPEATED = 3  # forward repeated by activation checkpointing inside a backward
    BACKWARD_OVER = 4  # the last backward of a step, or the last forward of an evaluation


def place_code(kind: Meeting, *, layer: int = 0, round: int = 0, step: int = 0) -> int:
    """Encode a place as a number, 1 to 2**31 - 1; large layers, rounds and steps wrap around."""
    code = step % _STEPS
    code = code * _ROUNDS + round % _ROUNDS
    code = code * _LAYERS + layer % _LAYERS
    return code * 8 + kind


def place_text(code: int) -> str:
    """Return a place code in words, for error messages."""
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

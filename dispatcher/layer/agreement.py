"""What the ranks compare before they exchange rows: inputs, tables, and places in the step.

Each rank writes a few numbers (``WIDTH`` of them) beside its counts: its input problem (0: none),
the values of ``_MUST_AGREE``, and its place in the step. Every rank reads all of them, so that all
ranks raise together and none waits for rows that never arrive.

Shapes: T tokens, K choices, R ranks, A values that must agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from dispatcher.errors import (
    DispatchInputError,
    PeerInputError,
    RankMismatchError,
    RanksPartedError,
)
from dispatcher.layer.places import place_text
from dispatcher.splits.routing import IntArray

_REASONS = {
    1: "tokens or expert ids have the wrong dtype",
    2: "shapes of tokens and expert ids do not fit",
    3: "top-k exceeds the number of experts",
    5: "an expert id is out of range",
    6: "there is no choice per token (top-k is 0)",
    7: "tokens and expert ids are on different devices",
    8: "the slots hold an expert twice, or not all that the table says",
}
_TOKEN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MUST_AGREE = ("width", "element type", "generation")
WIDTH = 1 + len(_MUST_AGREE) + 1  # after the counts: problem, _MUST_AGREE, place


def input_problem(
    x_TD: Tensor, expert_TK: Tensor, *, num_experts: int, slots: Sequence[int], named: Sequence[int]
) -> int:
    """Return 0, or the number of what is wrong with this rank's input. Reads no tensor content.

    Args:
        x_TD: Tokens.
        expert_TK: Chosen experts.
        num_experts: Number of experts.
        slots: Experts in this rank's slots.
        named: The same as the table says.
    """
    if x_TD.dtype not in _TOKEN_DTYPES or expert_TK.dtype != torch.int64:
        return 1
    if x_TD.dim() != 2 or expert_TK.dim() != 2 or x_TD.shape[0] != expert_TK.shape[0]:
        return 2
    if expert_TK.shape[1] == 0:
        return 6
    if expert_TK.shape[1] > num_experts:
        return 3
    if x_TD.device != expert_TK.device:
        return 7
    return 0 if slots is named or _holds_all(slots, named) else 8


def _holds_all(slots: Sequence[int], named: Sequence[int]) -> bool:
    """Whether the slots hold every expert of ``named``, and no expert twice."""
    held = [expert for expert in slots if expert >= 0]
    return len(held) == len(set(held)) and {e for e in named if e >= 0} <= set(held)


@lru_cache(maxsize=64)
def stamp(dim: int, dtype: torch.dtype, generation: int, device: torch.device) -> Tensor:
    """Return the values that all ranks must agree on; cached, because they rarely change."""
    values = [dim, _TOKEN_DTYPES.index(dtype), generation % 2**31]
    return torch.tensor(values, dtype=torch.int32, device=device)


def require_one_place(code_R: IntArray) -> None:
    """Check that all ranks are at the same place of the step.

    Raises:
        RanksPartedError: They are not.
    """
    if (code_R != code_R[0]).any():
        raise RanksPartedError([place_text(code) for code in code_R.tolist()])


def require_equal(stamp_RA: IntArray) -> None:
    """Check that the ranks' stamps are equal.

    Raises:
        RankMismatchError: They are not; the error names the first value that differs.
    """
    for what, values_R in zip(_MUST_AGREE, stamp_RA.T.tolist(), strict=True):
        if len(set(values_R)) > 1:
            is_dtype = what == "element type"
            raise RankMismatchError(
                what=what,
                values=[str(_TOKEN_DTYPES[v]) if is_dtype else str(v) for v in values_R],
            )


def require_sound_input(
    flags_R: IntArray,
    *,
    rank: int,
    x_TD: Tensor,
    expert_TK: Tensor,
    num_experts: int,
    slots: tuple[int, ...],
) -> None:
    """Check that no rank has an input problem.

    Args:
        flags_R: Each rank's input problem, 0 if none.
        rank: This rank.
        x_TD: This rank's tokens.
        expert_TK: This rank's chosen experts.
        num_experts: Number of experts.
        slots: Experts in this rank's slots.

    Raises:
        DispatchInputError: This rank's input is invalid.
        PeerInputError: Another rank's input is invalid.
    """
    if flags_R[rank]:
        reason = _REASONS[int(flags_R[rank])]
        raise DispatchInputError(
            f"{reason}: tokens {described(x_TD)}, expert ids {described(expert_TK)}, "
            f"{num_experts} experts"
            + (f", ids {_id_range(expert_TK)}" if flags_R[rank] == 5 else "")
            + (f", slots {slots}" if flags_R[rank] == 8 else "")
        )
    refused = np.flatnonzero(flags_R)
    if refused.size:
        raise PeerInputError(rank=int(refused[0]), reason=_REASONS[int(flags_R[refused[0]])])


def described(tensor: Tensor) -> str:
    """Return a tensor's shape, dtype and device as text."""
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"


def _id_range(expert_TK: Tensor) -> str:
    return f"{int(expert_TK.min())}..{int(expert_TK.max())}"

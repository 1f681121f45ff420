"""``skeleton``: the model of a folder without memory, to plan with its true shapes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lazarus.hf.adopting import AdoptOptions, attach_experts, strip
from lazarus.hf.loading import opened
from lazarus.model.experts import deferred_experts


def skeleton(folder: str | os.PathLike[str]) -> nn.Module:
    """Build the model that ``load`` would build, on the meta device and without any values.

    The files' headers are read, so that a folder that lacks experts is refused as by ``load``.

    Raises:
        ValueError: As for ``load``.
    """
    model: nn.Module = opened(Path(folder).expanduser(), {}).twin
    stripped = strip(model)
    with deferred_experts(), torch.device("meta"):
        for path, part in stripped.items():
            attach_experts(model, path, part, values=_no_values, options=AdoptOptions())
    return model


def _no_values(expert: int) -> Mapping[str, Tensor]:
    raise AssertionError("a skeleton's experts have no values")

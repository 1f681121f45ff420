"""Routers of transformers: their logits, their choice's bias, and how many experts they choose."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

_TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_k",
    "moe_top_k",
    "top_k",
)
_BIAS = re.compile(r"(^|\.)(e_score_correction_bias|expert_bias|correction_bias)$")


@dataclass(eq=False)
class RouterLogits:
    """Forward hook of a router that keeps its logits until the layer's experts take them.

    Attributes:
        index: Which of the router's outputs the logits are.
    """

    index: int
    _kept: list[Tensor] = field(default_factory=list)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Keep the logits of this forward."""
        self._kept = [output[self.index] if isinstance(output, tuple | list) else output]

    def take(self) -> Tensor:
        """Return the logits of the last forward, once.

        Raises:
            RuntimeError: The router did not run before the experts.
        """
        if not self._kept:
            raise RuntimeError("the experts ran without their router; its logits are not known")
        (logits,) = self._kept
        self._kept = []
        return logits


@dataclass(frozen=True, eq=False)
class TensorPlace:
    """A parameter or buffer of a module, looked up when used: moving a model replaces tensors."""

    owner: nn.Module
    name: str

    @property
    def tensor(self) -> Tensor:
        """The tensor."""
        found: Tensor = getattr(self.owner, self.name)
        return found


def top_k_of(experts: Any, block: nn.Module) -> int:
    """How many experts a token is sent to.

    Args:
        experts: The experts module.
        block: The module around router and experts.

    Raises:
        ValueError: Neither the configuration nor the block says.
    """
    for place in (experts.config, *block.modules()):
        for name in _TOP_K:
            value = getattr(place, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
                return value
    raise ValueError(
        f"how many experts {type(block).__name__} chooses for a token is unknown: its "
        f"configuration has none of {', '.join(_TOP_K)}"
    )


def bias_of(block: nn.Module, *, experts: int) -> TensorPlace | None:
    """The bias that a block adds to its router's scores before it chooses; None without one."""
    for path, tensor in _tensors(block):
        if _BIAS.search(path) and tensor.numel() == experts:
            owner, _, name = path.rpartition(".")
            return TensorPlace(block.get_submodule(owner), name)
    return None


def _tensors(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from block.named_buffers()
    yield from block.named_parameters()


def router_of(model: nn.Module, block: nn.Module) -> tuple[nn.Module, int]:
    """The router of a block, and which of its outputs are the logits.

    Raises:
        ValueError: transformers does not say which module of the block that is.
    """
    recorded = [
        recorder
        for module in model.modules()
        for recorder in _as_list((getattr(module, "_can_record_outputs", None) or {}).get(
            "router_logits", ()
        ))
    ]  # fmt: skip
    for recorder in recorded:
        kind = recorder if isinstance(recorder, type) else recorder.target_class
        index = 0 if isinstance(recorder, type) else recorder.index
        found = [m for m in block.modules() if m is not block and isinstance(m, kind)]
        if len(found) == 1:
            return found[0], index
    raise ValueError(
        f"{type(block).__name__} has no router that transformers names, so that its logits cannot "
        f"be balanced; leave aux_coef at 0"
    )


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]

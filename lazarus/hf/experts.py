"""The experts modules of transformers: which there are, their tensors, and one expert's function.

transformers marks a module of experts with the decorator ``use_experts_implementation``. Such a
module keeps one tensor for all experts, with the expert as first axis: ``gate_up_proj`` (or
``up_proj``) and ``down_proj``, some with biases.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dispatcher.layer.layout import TensorLayout

Shape = tuple[int, ...]
_LIKE_EXPERTS = re.compile(r"(?<!Shared)Experts$|MoE$|Moe$|SparseMLP$|SparseMoeBlock$")


def is_experts(module: nn.Module) -> bool:
    """Whether this is a module of experts whose implementation transformers lets one choose."""
    return hasattr(module, "_is_expert_parallel") and hasattr(module, "is_transposed")


def experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The experts modules of a model by path.

    Raises:
        ValueError: There are none, or the model has experts of a kind that is not carried; the
            message names the class.
    """
    found = {path: m for path, m in model.named_modules() if is_experts(m)}
    others = _other_experts(model, found)
    if others:
        raise ValueError(
            f"{type(model).__name__} keeps experts in {', '.join(others)}, which transformers does "
            f"not mark with use_experts_implementation; lazarus.hf cannot replace these experts"
        )
    if not found:
        raise ValueError(f"{type(model).__name__} has no experts")
    for path, module in found.items():
        _check(path, module)
    return found


def _other_experts(model: nn.Module, found: Mapping[str, nn.Module]) -> list[str]:
    """Names of classes that look like experts and neither are nor contain a module in ``found``."""
    names = set()
    for path, module in model.named_modules():
        around = any(p == path or p.startswith(f"{path}.") or path == "" for p in found)
        inside = any(path.startswith(f"{p}.") for p in found)
        if _LIKE_EXPERTS.search(type(module).__name__) and not around and not inside:
            names.add(type(module).__name__)
    return sorted(names)


def _names(module: Any) -> tuple[str, ...]:
    """Names of an expert's tensors, as the decorator's arguments tell."""
    matrices = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    biases = tuple(f"{name}_bias" for name in matrices) if module.has_bias else ()
    return matrices + biases


def _check(path: str, module: nn.Module) -> None:
    names = {name for name, _ in module.named_parameters(recurse=False)}
    if "lazarus" in module._modules:
        raise ValueError(f"the experts at {path} were adopted before")
    if names != set(_names(module)):
        raise ValueError(
            f"{type(module).__name__} at {path} has tensors {sorted(names)} where "
            f"{sorted(_names(module))} were expected; lazarus.hf does not carry this class"
        )


def num_experts(module: nn.Module) -> int:
    """Number of experts of an experts module."""
    return int(module.get_parameter("down_proj").shape[0])


def expert_fields(module: nn.Module) -> dict[str, Shape]:
    """Shape of each tensor of one expert, in the order of the module's parameters."""
    return {
        name: tuple(parameter.shape[1:])
        for name, parameter in module.named_parameters(recurse=False)
    }


def layout_of(module: Any) -> TensorLayout:
    """Layout of one expert's tensors in a row."""
    fields = expert_fields(module)
    rows, columns = fields["down_proj"]
    return TensorLayout(fields, dim=columns if module.is_transposed else rows)


class ExpertFunction:
    """Computes one expert of an experts module, by the module's own gate and activation.

    Args:
        module: The experts module.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        self.is_transposed = bool(module.is_transposed)

    def __call__(self, rows_MD: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        """Apply the expert with these tensors to rows [M, D]."""
        module = self._module
        if module.has_gate:
            hidden_MH = module._apply_gate(self._linear(rows_MD, fields, "gate_up_proj"))
        else:
            hidden_MH = module.act_fn(self._linear(rows_MD, fields, "up_proj"))
        return self._linear(hidden_MH, fields, "down_proj")

    def _linear(self, rows: Tensor, fields: Mapping[str, Tensor], name: str) -> Tensor:
        weight, bias = fields[name], fields.get(f"{name}_bias")
        if not self._module.is_transposed:
            return F.linear(rows, weight, bias)
        return rows @ weight if bias is None else rows @ weight + bias

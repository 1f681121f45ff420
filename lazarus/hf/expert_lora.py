"""LoRA on the experts of an adopted model, beside peft's LoRA on its other modules.

The adapters of an expert are trained tensors of the expert: they are placed, copied, healed and
saved with it. The expert's own tensors are frozen.

Shapes: M rows, D model width, r rank of an adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dispatcher.layer.general import ExpertFunction
from dispatcher.layer.layout import TensorLayout
from lazarus.hf.layer import AdoptedExperts
from lazarus.model.experts import ExpertBank
from lazarus.model.initial import drawn

A, B = "lora_A", "lora_B"


def lora(
    model: Any,
    *,
    targets: Sequence[str],
    r: int = 8,
    alpha: int = 16,
    frozen_dtype: torch.dtype | None = None,
) -> Any:
    """Freeze an adopted or loaded model and add LoRA adapters to it.

    Args:
        model: A model of ``load`` or ``adopt``, in the builder of a run's model or outside.
        targets: Names of what gets adapters: tensors of the experts, such as ``gate_up_proj`` and
            ``down_proj``; and names of linear modules, such as ``q_proj``, which peft adapts.
        r: Rank of the adapters.
        alpha: The adapters' product is scaled by ``alpha / r``.
        frozen_dtype: Dtype in which the experts' own tensors are kept; None means float32.

    Returns:
        The model, wrapped by peft if a target is a module.

    Raises:
        ValueError: The model has no adopted experts, or a target is found nowhere.
    """
    from peft import LoraConfig, get_peft_model

    layers = {p: m for p, m in model.named_modules() if isinstance(m, AdoptedExperts)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no adopted experts; use lazarus.hf.load")
    fields = {name for layer in layers.values() for name in layer.experts.fields}
    targets = (targets,) if isinstance(targets, str) else targets
    of_experts = [name for name in targets if name in fields]
    modules = [name for name in targets if name not in fields]
    paths = [f".{path}" for path, _ in model.named_modules()]
    if lost := [name for name in modules if not any(p.endswith(f".{name}") for p in paths)]:
        raise ValueError(
            f"{', '.join(lost)}: neither tensors of the experts ({', '.join(sorted(fields))}) nor "
            f"modules of {type(model).__name__}"
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules=modules or None)
    wrapped = model
    if modules:
        wrapped = get_peft_model(model, config)
    for layer in layers.values():
        _adapt(layer, of_experts, r=r, scale=alpha / r, frozen_dtype=frozen_dtype)
    config = wrapped.peft_config["default"] if modules else config
    places = {".".join(path.split(".")[-3:-1]) for path in layers}
    config.target_parameters = sorted(f"{p}.{name}" for p in places for name in of_experts)
    if not modules:
        wrapped.peft_config = {"default": config}
    return wrapped


@dataclass(frozen=True, slots=True)
class AdaptedExpert:
    """Computes one expert whose matrices are the frozen ones plus the products of the adapters.

    Attributes:
        run: Computes the expert without adapters.
        targets: The adapted matrices.
        scale: Factor of the products.
        is_transposed: Whether a matrix is [in, out] rather than [out, in].
    """

    run: ExpertFunction
    targets: tuple[str, ...]
    scale: float
    is_transposed: bool

    def __call__(self, rows_MD: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        """Apply the expert with these tensors to rows [M, D]."""
        own = dict(fields)
        for name in self.targets:
            change = own.pop(f"{name}.{B}") @ own.pop(f"{name}.{A}")
            own[name] = own[name] + self.scale * (change.T if self.is_transposed else change)
        return self.run(rows_MD, own)


def _adapt(
    layer: AdoptedExperts,
    targets: Sequence[str],
    *,
    r: int,
    scale: float,
    frozen_dtype: torch.dtype | None,
) -> None:
    """Give the experts of one layer adapters, and freeze the rest of them."""
    bank, run = layer.experts, layer.run
    assert run is not None
    if not targets:
        bank.freeze(dtype=frozen_dtype)
        return
    is_transposed = bool(getattr(run, "is_transposed", False))
    shapes, spreads = _adapter_shapes(bank, targets, r=r, is_transposed=is_transposed)
    key = bank.key

    def values(expert: int) -> dict[str, Tensor]:
        given = dict(_own_values(bank, expert))
        for name, shape in shapes.items():
            if name.endswith(A):
                given |= drawn(expert, {name: shape}, key=key, std=spreads[name])
            else:
                given[name] = torch.zeros(shape)
        return given

    new = ExpertBank.of(
        TensorLayout(shapes, dim=bank.layout.dim),
        num_experts=bank.num_experts,
        source=values,
        frozen_layout=bank.layout,
        frozen_dtype=frozen_dtype,
    )
    layer.experts = new
    order = tuple(name for name in bank.layout.fields if name in targets)
    layer.run = AdaptedExpert(run, order, scale, is_transposed)


def _adapter_shapes(
    bank: ExpertBank, targets: Sequence[str], *, r: int, is_transposed: bool
) -> tuple[dict[str, tuple[int, ...]], dict[str, float]]:
    """Shapes of the adapters, and the standard deviations that peft draws their first values with.

    Raises:
        ValueError: A target is no matrix.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    spreads: dict[str, float] = {}
    for name, shape in bank.layout.fields.items():
        if name not in targets:
            continue
        if len(shape) != 2:
            raise ValueError(f"{name} of an expert is {list(shape)}; LoRA adapts matrices")
        into, out = shape if is_transposed else (shape[1], shape[0])
        shapes |= {f"{name}.{A}": (r, into), f"{name}.{B}": (out, r)}
        spreads[f"{name}.{A}"] = (3 * into) ** -0.5
    return shapes, spreads


def _own_values(bank: ExpertBank, expert: int) -> Mapping[str, Tensor]:
    """The tensors of an expert before it was adapted."""
    if expert in bank.expert_of_slot:
        return bank.values(bank.expert_of_slot.index(expert))
    return bank.initial(expert)

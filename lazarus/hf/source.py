"""Experts and dense tensors of a checkpoint, under the names that a transformers model gives them.

transformers keeps a mapping from names in files to names in memory, with operations that merge,
split and transpose. Here the mapping is applied to the tensors of one expert, so that one expert
can be read without the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from lazarus.hf.stored import Readable

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor that transformers reads by ``tensor[...]`` when it fills a parameter."""

    tensor: Readable

    @property
    def shape(self) -> Shape:
        """Shape of the tensor."""
        return self.tensor.shape

    def __getitem__(self, index: Any) -> Tensor:
        return self.tensor.read()[index]


@dataclass(slots=True)
class _Origin:
    """Where a tensor of the model comes from: names in the files by pattern of the converter."""

    converter: WeightConverter | None
    names: dict[str, list[str]] = field(default_factory=dict)


class CheckpointSource:
    """Reads a checkpoint's tensors as a transformers model names them.

    Args:
        twin: The model on the meta device, with its expert parameters.
        tensors: The tensors of the checkpoint by their names in the files.
        fields: Fields of the experts of each experts module, by path of the module.

    Raises:
        ValueError: An expert's field is not in the checkpoint, or not for every expert.
    """

    def __init__(
        self,
        twin: nn.Module,
        tensors: Mapping[str, Readable],
        fields: Mapping[str, Mapping[str, Shape]],
    ) -> None:
        self._tensors = tensors
        self._shapes = {name: tuple(p.shape) for name, p in twin.named_parameters()}
        self._config = twin.config
        self._origins = _origins(twin, tensors)
        self._first: dict[str, str] = {}  # targets that a converter makes beside its first one
        for first, origin in self._origins.items():
            self._first |= dict.fromkeys(_targets(first, origin), first)
        self._experts = {f"{path}.{name}" for path, found in fields.items() for name in found}
        self._whole: tuple[str, dict[str, Tensor]] = ("", {})
        self._check()

    def dense(self) -> dict[str, LazyTensor]:
        """Tensors that belong to no expert, by their names in the files."""
        return {
            name: LazyTensor(self._tensors[name])
            for first, origin in self._origins.items()
            if not self._experts.intersection(_targets(first, origin))
            for names in origin.names.values()
            for name in names
        }

    def expert(self, path: str, fields: Mapping[str, Shape], expert: int) -> dict[str, Tensor]:
        """Read one expert.

        Args:
            path: The experts module.
            fields: The fields to read with their shapes.
            expert: The expert.

        Raises:
            ValueError: A field has another shape in the checkpoint.
        """
        found = {name: self._field(f"{path}.{name}", expert) for name in fields}
        for name, tensor in found.items():
            if tuple(tensor.shape) != fields[name]:
                raise ValueError(
                    f"expert {expert} of {path}: {name} is {tuple(tensor.shape)} in the "
                    f"checkpoint, the configuration says {fields[name]}"
                )
        return found

    def _field(self, target: str, expert: int) -> Tensor:
        first = self._first[target]
        origin = self._origins[first]
        if origin.converter is None:
            ((name,),) = origin.names.values()
            return self._tensors[name].read(expert)[0]
        if not _keeps_experts_apart(origin.converter):
            return self._all_experts(first)[target][expert]
        converter = deepcopy(origin.converter)
        for pattern, names in origin.names.items():
            tensor = self._tensors[names[expert]].read() if "*" in pattern else None
            if tensor is None:
                tensor = self._tensors[names[0]].read(expert)
            converter.add_tensor(target, pattern, pattern, tensor)
        return self._converted(converter, target)[target][0]

    def _all_experts(self, first: str) -> dict[str, Tensor]:
        """Tensors of all experts of a layer, for converters that mix experts; the last is kept."""
        if self._whole[0] != first:
            self._whole = ("", {})
            origin = self._origins[first]
            converter = deepcopy(origin.converter)
            assert converter is not None
            for pattern, names in origin.names.items():
                for name in names:
                    converter.add_tensor(first, name, pattern, self._tensors[name].read())
            self._whole = (first, self._converted(converter, first, rows=None))
        return self._whole[1]

    def _converted(
        self, converter: WeightConverter, target: str, *, rows: int | None = 1
    ) -> dict[str, Tensor]:
        shapes = _Shapes(self._shapes, rows=rows)
        results = converter.convert(target, model=shapes, config=self._config)
        return {
            name: value[0] if isinstance(value, list) else value for name, value in results.items()
        }

    def _check(self) -> None:
        missing = sorted(self._experts - set(self._first))
        if missing:
            raise ValueError(
                f"the checkpoint has no experts for {', '.join(missing[:3])} "
                f"({len(missing)} tensors of experts in all)"
            )
        for target in self._experts:
            origin, (experts, *_) = self._origins[self._first[target]], self._shapes[target]
            if origin.converter is None or not _keeps_experts_apart(origin.converter):
                continue
            for pattern in origin.converter.source_patterns:
                wanted, names = experts if "*" in pattern else 1, origin.names.get(pattern, [])
                if len(names) != wanted:
                    raise ValueError(
                        f"{target} is made of {wanted} tensors {pattern}, the checkpoint has "
                        f"{len(names)}"
                    )


@dataclass(frozen=True, slots=True)
class _Shapes:
    """What converters ask a model for: shapes of parameters, here with ``rows`` experts."""

    shapes: Mapping[str, Shape]
    rows: int | None

    def get_parameter(self, name: str) -> Tensor:
        first, *rest = self.shapes[name]
        return torch.empty((self.rows or first, *rest), device="meta")


def _origins(twin: nn.Module, tensors: Mapping[str, Readable]) -> dict[str, _Origin]:
    """The origin of each tensor of the model, as ``from_pretrained`` would find it.

    Source: ``convert_and_load_state_dict_in_model`` of transformers 5.24.
    """
    mapping = get_model_conversion_mapping(twin)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    of_pattern = {p: converter for converter in converters for p in converter.source_patterns}
    state: dict[str, Any] = twin.state_dict()
    prefix = str(twin.base_model_prefix)
    found: dict[str, _Origin] = {}
    for name in sorted(tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        converter = None if pattern is None else of_pattern[pattern]
        origin = found.setdefault(target, _Origin(converter))
        origin.names.setdefault(pattern or "", []).append(name)
    return found


def _targets(first: str, origin: _Origin) -> Sequence[str]:
    """All tensors that a converter makes, given the first."""
    if origin.converter is None:
        return (first,)
    patterns = origin.converter.target_patterns
    return [first.replace(patterns[0], pattern) for pattern in patterns]


def _keeps_experts_apart(converter: WeightConverter) -> bool:
    """Whether the converter, given the tensors of one expert, makes that expert's part."""
    return len(converter.target_patterns) == 1 and all(map(_keeps_first_axis, converter.operations))


def _keeps_first_axis(operation: Any) -> bool:
    match type(operation).__name__:
        case "MergeModulelist":
            return bool(operation.dim == 0)
        case "Concatenate" | "Interleave" | "Chunk" | "Split":
            return bool(operation.dim >= 1)
        case "Transpose":
            return bool(operation.dim0 >= 1 and operation.dim1 >= 1)
    return False

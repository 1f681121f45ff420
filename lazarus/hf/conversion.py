"""From the tensors of a transformers module to those of a checkpoint, without reading ahead.

The conversion is transformers' own, reversed. It runs twice: on tensors without data, which gives
keys, shapes and dtypes of everything before a file is opened; then on one layer's tensors at a
time, when a key of the layer is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lazarus.checkpoint.files.ranges import TORCH_DTYPES
from lazarus.checkpoint.files.tensors import DTYPE_NAMES
from lazarus.checkpoint.format.image import TensorSpec
from lazarus.checkpoint.format.stored_state import StoredState
from lazarus.errors import ConfigError
from lazarus.hf.module_state import ModuleState
from lazarus.hf.stored import INDEX, SINGLE, StoredTensor, stored_tensors

_LAYER = re.compile(r".*?\.\d+\.")  # "model.layers.3."
_FLOATING = frozenset(n for n, d in TORCH_DTYPES.items() if d.is_floating_point)
_WIDE = ("F64", "F32", "BF16", "F16")  # a float can be cast to these without scales


class SourceFolder:
    """A folder in the format of transformers: configuration, and what its weight files hold.

    Raises:
        ConfigError: The folder has no configuration that transformers knows, or is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / "config.json"
        if not path.is_file():
            raise ConfigError(f"{folder} has no config.json: it is no Hugging Face checkpoint")
        try:
            self._config: dict[str, Any] = json.loads(path.read_text("utf-8"))
            self._stored = self._read_headers()
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ConfigError(f"{folder}: {' '.join(str(error).split())}") from error
        self.specs = {
            key: TensorSpec(name=key, dtype=DTYPE_NAMES.get(t.dtype, "?"), shape=t.shape)
            for key, t in self._stored.items()
        }

    @property
    def is_quantised(self) -> bool:
        """Whether the weights are stored in a format that training does not keep (fp8, mxfp4)."""
        return "quantization_config" in self._config

    @property
    def dtype(self) -> str:
        """The safetensors name of the configuration's dtype."""
        name = str(self._config.get("dtype", self._config.get("torch_dtype")) or "float32")
        dtype = getattr(torch, name.removeprefix("torch."), torch.float32)
        return DTYPE_NAMES.get(dtype, "F32")

    def config_text(self, dtype: str | None) -> str:
        """``config.json`` of an export: plain weights, in ``dtype`` if it is not None."""
        if dtype is None and not self.is_quantised:
            return (self.folder / "config.json").read_text("utf-8")
        config = {k: v for k, v in self._config.items() if k != "quantization_config"}
        if dtype is not None:
            key = "torch_dtype" if "torch_dtype" in config else "dtype"
            config[key] = str(TORCH_DTYPES[dtype]).removeprefix("torch.")
        return json.dumps(config, indent=2) + "\n"

    def empty_model(self) -> Any:
        """The model of the configuration, on the meta device.

        Raises:
            ConfigError: transformers cannot build it.
        """
        import transformers

        from lazarus.hf.loading import model_class

        try:
            config = transformers.AutoConfig.from_pretrained(str(self.folder))
            with torch.device("meta"):
                return model_class(config)._from_config(config)
        except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
            raise ConfigError(f"{self.folder}: {str(error).splitlines()[0]}") from error

    def tensor(self, key: str) -> Tensor:
        """One tensor of the folder's weight files."""
        return self._stored[key].read()

    def _read_headers(self) -> dict[str, StoredTensor]:
        has_weights = (self.folder / SINGLE).is_file() or (self.folder / INDEX).is_file()
        return stored_tensors(self.folder) if has_weights else {}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Group:
    """Tensors of the module that are converted together, and what becomes of them."""

    names: tuple[str, ...]
    specs: tuple[TensorSpec, ...]
    is_plain: bool  # the checkpoint has the module's own names: nothing is converted
    is_experts: bool


class Conversion(Mapping[str, Tensor]):
    """The tensors of a checkpoint by key, each converted from a state when it is read.

    Args:
        source: The checkpoint whose keys, shapes and dtypes are wanted.
        state: A state under the names of a run.
        dtype: safetensors name of the dtype of all floating tensors; None: as in ``source``.

    Raises:
        ConfigError: The state is of another model than the source.
    """

    def __init__(self, source: SourceFolder, state: StoredState, *, dtype: str | None) -> None:
        self._source, self._dtype = source, dtype
        model: Any = source.empty_model()
        self._model = model
        model._weight_conversions = _conversions(model)
        keys = _keys_of_names(self._model, source.specs)
        once = {name for name in _tied(self._model) if name not in keys}
        self._state = _module_state(self._model, state, where=source.folder, left_out=once)
        grouped: dict[tuple[str, bool], list[str]] = {}
        for name in self._state:
            match = _LAYER.match(name)
            layer = match[0] if match else name
            grouped.setdefault((layer, self._state.is_expert(name)), []).append(name)
        self._group_of: dict[str, _Group] = {}
        for (_, is_experts), names in grouped.items():
            group = self._plan(tuple(names), keys, is_experts=is_experts)
            self._group_of |= {spec.name: group for spec in group.specs}
        known = {key for name in self._model.state_dict() for key in keys.get(name, ())}
        known |= self._group_of.keys()  # transformers may load a key by another of its renamings
        self._verbatim = {} if source.is_quantised else self._unknown(known)
        self._held: dict[bool, tuple[_Group, dict[str, Tensor]]] = {}  # by is_experts

    @cached_property
    def specs(self) -> tuple[TensorSpec, ...]:
        """Key, dtype and shape of each tensor, layer by layer."""
        groups = {group.names: group for group in self._group_of.values()}
        converted = [spec for group in groups.values() for spec in group.specs]
        return (*converted, *self._verbatim.values())

    def __iter__(self) -> Iterator[str]:
        return iter(spec.name for spec in self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __getitem__(self, key: str) -> Tensor:
        if key in self._verbatim:
            return self._source.tensor(key).to(TORCH_DTYPES[self._verbatim[key].dtype])
        group = self._group_of[key]
        if self._held.get(group.is_experts, (None,))[0] is not group:
            self._held.pop(group.is_experts, None)  # before others are read: one layer at a time
            self._held[group.is_experts] = group, self._converted(group)
        spec = next(spec for spec in group.specs if spec.name == key)
        converted = self._held[group.is_experts][1]
        return converted[key].to(TORCH_DTYPES[spec.dtype]).contiguous()

    def _converted(self, group: _Group) -> dict[str, Tensor]:
        dtypes = {spec.dtype for spec in group.specs}
        dtype = TORCH_DTYPES[dtypes.pop()] if len(dtypes) == 1 else None
        given = {name: self._state.read(name, dtype=dtype) for name in group.names}
        return given if group.is_plain else self._revert(given)

    def _revert(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        return dict(revert_weight_conversion(self._model, given))

    def _plan(
        self, names: tuple[str, ...], keys: Mapping[str, list[str]], *, is_experts: bool
    ) -> _Group:
        """What becomes of some tensors of the module.

        Raises:
            ConfigError: The source has keys for them that the conversion does not give back.
        """
        empty = {name: self._empty(name) for name in names}
        made = self._revert(dict(empty))
        theirs = {key for name in names for key in keys.get(name, ())}
        is_plain = not theirs <= set(made) and theirs <= set(names)
        made = empty if is_plain else made
        lost = sorted(theirs - set(made))
        if lost and not self._source.is_quantised:
            raise ConfigError(f"{self._source.folder}: no tensor of the model becomes {lost[0]}")
        specs = tuple(self._spec(key, tensor) for key, tensor in made.items())
        return _Group(names=names, specs=specs, is_plain=is_plain, is_experts=is_experts)

    def _empty(self, name: str) -> Tensor:
        spec = self._state.spec(name)
        return torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype], device="meta")

    def _spec(self, key: str, tensor: Tensor) -> TensorSpec:
        """Dtype and shape of a key of the export.

        Raises:
            ConfigError: The source has another shape.
        """
        there = self._source.specs.get(key)
        shape = tuple(tensor.shape)
        if there is not None and there.shape != shape and not self._source.is_quantised:
            raise ConfigError(
                f"{self._source.folder}: {key} is {list(there.shape)} there, and {list(shape)} "
                f"in the checkpoint"
            )
        own = DTYPE_NAMES[tensor.dtype]
        if own not in _FLOATING:
            return TensorSpec(name=key, dtype=own, shape=shape)
        is_kept = there is not None and there.dtype in (own, *_WIDE)
        usual = there.dtype if there is not None and is_kept else None
        return TensorSpec(name=key, dtype=self._dtype or usual or self._source.dtype, shape=shape)

    def _unknown(self, known: set[str]) -> dict[str, TensorSpec]:
        """Tensors of the source that the model does not load; they are copied as they are."""
        found = {}
        for key, spec in self._source.specs.items():
            if key not in known and spec.dtype in DTYPE_NAMES.values():
                kind = self._dtype if self._dtype and spec.dtype in _FLOATING else spec.dtype
                found[key] = TensorSpec(name=key, dtype=kind, shape=spec.shape)
        return found


def module_state_of(folder: Path, state: StoredState) -> ModuleState:
    """A run's state under the names of ``model.state_dict()``, of the model of a folder.

    Raises:
        ConfigError: The folder is of no model, or of another one than the state.
    """
    model = SourceFolder(folder).empty_model()
    return _module_state(model, state, where=folder, left_out=frozenset())


def _module_state(
    model: nn.Module, state: StoredState, *, where: Path, left_out: Collection[str]
) -> ModuleState:
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return ModuleState(
        state,
        shapes={name: shape for name, shape in shapes.items() if name not in left_out},
        tied=_tied(model),
        spare=_scratch(model),
        where=str(where),
    )


def _conversions(model: nn.Module) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    found = get_model_conversion_mapping(model, add_legacy=False)
    return [step for step in found if not isinstance(step, PrefixChange)]


def _keys_of_names(model: nn.Module, specs: Mapping[str, TensorSpec]) -> dict[str, list[str]]:
    """For each name of the module, the keys of a checkpoint that it is loaded from."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    found: dict[str, list[str]] = {}
    for key in sorted(specs, key=dot_natural_key):
        name, _ = rename_source_key(key, renamings, converters)
        found.setdefault(name, []).append(key)
    return found


def _tied(model: nn.Module) -> dict[str, str]:
    """For each tied name of the model, the name whose tensor it shares."""
    found = getattr(model, "all_tied_weights_keys", None) or {}
    return {str(name): str(owner) for name, owner in found.items()}


def _scratch(model: nn.Module) -> frozenset[str]:
    """Buffers of the model that are not part of its state dict."""
    return frozenset(name for name, _ in model.named_buffers()) - frozenset(model.state_dict())

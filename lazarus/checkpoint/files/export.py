"""Export a checkpoint's model as one safetensors file that can be read without Lazarus. EFFECTS.

There are two layouts. ``model`` has the names of ``model.state_dict()``, with the experts of each
layer stacked into ``{path}.experts.weight`` [E, P] (and frozen ones into ``.frozen`` [E, F]);
``load_state_dict`` accepts it unchanged.
``experts`` has one tensor per expert and field, ``{path}.experts.{id}.{field}``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dispatcher.layer.layout import ROW_MULTIPLE
from lazarus.checkpoint.files.reader import LazyState, open_state_dict, tied_of
from lazarus.checkpoint.files.storage import open_storage, write_file
from lazarus.checkpoint.files.tensors import bytes_of
from lazarus.checkpoint.format.image import TensorSpec, layout_image
from lazarus.checkpoint.format.manifest import FROZEN, WEIGHTS, LayerEntry, Manifest
from lazarus.checkpoint.format.stored_state import StoredState

LAYOUTS = ("model", "experts")

_MODEL = "model."


class StackedState(Mapping[str, Tensor]):
    """A lazy state with the experts of each layer stacked, as ``model.state_dict()`` has them."""

    def __init__(self, state: LazyState) -> None:
        self._state = state
        self._layers = {
            f"{layer.path}.experts.{name}": (layer, part)
            for layer in state.manifest.layers
            for name, part in (("weight", WEIGHTS), ("frozen", FROZEN))
            if part == WEIGHTS or layer.tensors.get(part)
        }
        for other, name in tied_of(state.manifest).items():
            if name in self._layers:  # a layer that is used in several places
                self._layers[other] = self._layers[name]
        inside = {
            name
            for layer, part in self._layers.values()
            for expert in range(layer.num_experts)
            for name, _ in _fields(layer, part, expert)
        }
        self._names = sorted([*(name for name in state if name not in inside), *self._layers])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._layers:
            return self._state[name]
        (layer, part), spec = self._layers[name], self.spec(name)
        stacked = torch.zeros(spec.shape)
        for expert in range(layer.num_experts if _fields(layer, part, 0) else 0):
            fields = [self._state[field].reshape(-1) for field, _ in _fields(layer, part, expert)]
            row = torch.cat(fields)
            stacked = stacked.to(row.dtype)
            stacked[expert, : row.numel()] = row
        return stacked

    def spec(self, name: str) -> TensorSpec:
        """Name, dtype and shape of a tensor; reads no file."""
        if name not in self._layers:
            return self._state.spec(name)
        layer, part = self._layers[name]
        fields = _fields(layer, part, 0)
        count = sum(math.prod(spec.shape) for _, spec in fields)
        padded = -(-count // ROW_MULTIPLE) * ROW_MULTIPLE
        dtype = fields[0][1].dtype if fields else "F32"
        return TensorSpec(name=name, dtype=dtype, shape=(layer.num_experts, padded))


def _fields(layer: LayerEntry, part: str, expert: int) -> list[tuple[str, TensorSpec]]:
    """Name and spec of each of an expert's tensors in this part, in the order of the record."""
    return [
        (spec.name.removeprefix(_MODEL).replace("{e}", str(expert)), spec)
        for spec in layer.tensors.get(part, ())
    ]


def export(
    url: str, target: str, *, step: int | None = None, layout: str = "model"
) -> tuple[Manifest, int]:
    """Write the model of a checkpoint as one safetensors file.

    Args:
        url: Root of the checkpoints.
        target: File or fsspec URL to write; written atomically.
        step: Step of the checkpoint; by default the newest usable one.
        layout: ``model`` or ``experts``, see the module.

    Returns:
        The manifest of the exported checkpoint, and the bytes written.

    Raises:
        CheckpointError: There is no such checkpoint, or a file of it is damaged.
        ValueError: ``layout`` is unknown.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is none of {', '.join(LAYOUTS)}")
    plain = open_state_dict(url, step=step)
    state: StoredState = StackedState(plain) if layout == "model" else plain
    num_bytes = write_state(state, target)
    return plain.manifest, num_bytes


def write_state(state: StoredState, target: str) -> int:
    """Write all tensors of a state as one safetensors file; return the bytes written.

    Args:
        state: Tensors by name; each is read when it is written.
        target: File or fsspec URL to write; written atomically.
    """
    image = layout_image([state.spec(name) for name in state], metadata={"format": "pt"})

    def chunks() -> Iterator[bytes | memoryview]:
        yield image.header
        for spec in image.specs:
            yield bytes_of(state[spec.name])

    folder, slash, name = target.rpartition("/")
    storage = open_storage(folder or slash or ".")
    num_bytes, _ = write_file(storage, name, chunks(), kind="export")
    return num_bytes

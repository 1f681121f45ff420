"""Write the adapters of a run in the format of peft. EFFECTS.

A run of a model that peft wrapped trains the adapters alone; their names in the run are those of
the wrapped model. In peft's format the name of the adapter is left out of a tensor's name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lazarus.checkpoint.files.export import write_state
from lazarus.checkpoint.files.ranges import TORCH_DTYPES
from lazarus.checkpoint.files.storage import open_storage, write_file
from lazarus.checkpoint.format.image import TensorSpec
from lazarus.checkpoint.format.manifest import Manifest
from lazarus.checkpoint.format.stored_state import StoredState
from lazarus.errors import ConfigError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
DEFAULT = "default"
_START = "base_model.model."
_EXPERT_ADAPTER = re.compile(
    r"(?P<path>.+)\.lazarus\.experts\.(?P<expert>\d+)\.(?P<field>\w+)\.(?P<kind>lora_[AB])"
)
_KEPT_WHOLE = "modules_to_save"  # peft's name for modules that are trained beside the adapters


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """What was written: the weight files, the number of tensors, and the tensors' bytes."""

    files: tuple[str, ...]
    tensors: int
    num_bytes: int


def adapters_of(manifest: Manifest) -> Mapping[str, Mapping[str, Any]]:
    """The peft configurations of the run's adapters by name; empty if the model has none."""
    found: Mapping[str, Mapping[str, Any]] = manifest.meta.get("adapters", {})
    return found


def save_adapters(
    state: StoredState,
    configs: Mapping[str, Mapping[str, Any]],
    *,
    out: str,
    base: str,
    dtype: str | None = None,
) -> Saved:
    """Write the adapters of a run as peft does.

    Args:
        state: State of the run.
        configs: peft's configuration of each adapter. The adapter named "default" is written to
            ``out``, others to folders below it.
        out: Folder or fsspec URL.
        base: Folder of the model that was adapted.
        dtype: safetensors name of the dtype of all floating tensors; None keeps each dtype.

    Raises:
        ConfigError: An adapter is of another kind than LoRA, or the state has no tensors of it.
    """
    states = {}
    for name, config in configs.items():
        if config.get("peft_type") != "LORA":
            raise ConfigError(f"adapter {name} is of kind {config.get('peft_type')}, not LORA")
        states[name] = AdapterState(state, name, dtype=dtype)
    files, num_bytes = [], 0
    for name, adapter in states.items():
        folder = out if name == DEFAULT else f"{out}/{name}"
        num_bytes += write_state(adapter, f"{folder}/{WEIGHTS}")
        files.append(WEIGHTS if name == DEFAULT else f"{name}/{WEIGHTS}")
        config = {**configs[name], "base_model_name_or_path": base, "inference_mode": True}
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        write_file(open_storage(folder), CONFIG, [text.encode()], kind="export", is_new=False)
    count = sum(len(adapter) for adapter in states.values())
    return Saved(files=tuple(files), tensors=count, num_bytes=num_bytes)


class AdapterState(Mapping[str, Tensor]):
    """The tensors of one adapter under peft's names.

    Raises:
        ConfigError: The state has none.
    """

    def __init__(self, state: StoredState, adapter: str, *, dtype: str | None) -> None:
        self._state, self._dtype = state, dtype
        found: dict[str, tuple[str, ...]] = {
            own: (name,) for name in state if (own := _peft_name(name, adapter))
        }
        found |= _stacks(state) if adapter == DEFAULT else {}
        if not found:
            raise ConfigError(f"the checkpoint has no tensors of the adapter {adapter}")
        self._names = dict(sorted(found.items()))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> Tensor:
        parts = [self._state[part] for part in self._names[name]]
        joined = parts[0] if not _is_stack(self._names[name]) else _joined(parts, name)
        return joined.to(TORCH_DTYPES[self.spec(name).dtype]).contiguous()

    def spec(self, name: str) -> TensorSpec:
        """Name, dtype and shape of a tensor; reads no file."""
        parts = self._names[name]
        spec = self._state.spec(parts[0])
        rows, columns = spec.shape if _is_stack(parts) else (0, 0)
        stacked = (
            (rows, columns * len(parts)) if ".lora_B." in name else (rows * len(parts), columns)
        )
        is_cast = self._dtype is not None and TORCH_DTYPES[spec.dtype].is_floating_point
        dtype = self._dtype if is_cast and self._dtype is not None else spec.dtype
        shape = stacked if _is_stack(parts) else spec.shape
        return TensorSpec(name=name, dtype=dtype, shape=shape)


def _stacks(state: StoredState) -> dict[str, tuple[str, ...]]:
    """The experts' adapters under peft's names, each with the tensors of all experts in order.

    peft puts one wrapper around the experts module for each adapted tensor, the first innermost.
    """
    experts: dict[tuple[str, str], dict[str, dict[int, str]]] = {}
    for name in state:
        if match := _EXPERT_ADAPTER.fullmatch(name):
            fields = experts.setdefault((match["path"], match["kind"]), {})
            fields.setdefault(match["field"], {})[int(match["expert"])] = name
    found = {}
    for (path, kind), fields in experts.items():
        inner = path if path.startswith(_START) else _START + path
        for depth, (_, by_id) in enumerate(sorted(fields.items(), key=_wrapping_order)):
            layers = ".base_layer" * depth
            found[f"{inner}{layers}.{kind}.weight"] = tuple(by_id[e] for e in sorted(by_id))
    return found


def _wrapping_order(field: tuple[str, object]) -> int:
    """The outermost wrapper first; transformers' experts have ``down_proj`` last."""
    return 0 if field[0] == "down_proj" else 1


def _is_stack(parts: tuple[str, ...]) -> bool:
    return _EXPERT_ADAPTER.fullmatch(parts[0]) is not None


def _joined(parts: Sequence[Tensor], name: str) -> Tensor:
    """The adapters of all experts as one matrix: A is [E * r, in], B is [out, r * E]."""
    if ".lora_A." in name:
        return torch.cat(list(parts))
    return torch.stack(list(parts), dim=-1).flatten(1)


def _peft_name(name: str, adapter: str) -> str:
    """The name of a tensor in peft's format; empty if the tensor is not the adapter's."""
    start = name.find(_START)
    parts = name[start:].split(".")
    for at, part in enumerate(parts[:-1]):
        if parts[at + 1] != adapter:
            continue
        if part == _KEPT_WHOLE:
            return ".".join(parts[:at] + parts[at + 2 :]) if start >= 0 else ""
        if part.startswith("lora_") and start >= 0:
            rest = [] if part == "lora_magnitude_vector" else parts[at + 2 :]
            return ".".join(parts[: at + 1] + rest)
    return ""

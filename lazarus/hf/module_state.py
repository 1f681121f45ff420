"""The state of a transformers module, read from a state with the names of a run.

A run names an adopted model's expert tensors ``P.lazarus.experts.E.FIELD``; in a plain transformers
module they are one parameter ``P.FIELD`` with a leading expert axis. All other names are equal. A
model that was wrapped in another module has its path in front of all names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lazarus.checkpoint.files.ranges import TORCH_DTYPES
from lazarus.checkpoint.format.image import TensorSpec
from lazarus.checkpoint.format.stored_state import StoredState
from lazarus.errors import ConfigError

_EXPERT = re.compile(r"(?P<path>.+)\.lazarus\.experts\.(?P<expert>\d+)\.(?P<field>.+)")


class ModuleState(Mapping[str, Tensor]):
    """A stored state under the names and in the shapes of a transformers module.

    Args:
        state: Tensors under the names of a run, or already under those of the module.
        shapes: The module's own names and shapes.
        tied: For each tied name of the module, the name of the tensor that it shares.
        spare: Names that the state may have beside the module's, such as scratch buffers.
        where: The folder of the module's configuration, for messages.

    Raises:
        ConfigError: The state lacks a tensor, has another shape, or has tensors that the module
            does not have.
    """

    def __init__(
        self,
        state: StoredState,
        *,
        shapes: Mapping[str, tuple[int, ...]],
        tied: Mapping[str, str],
        spare: frozenset[str],
        where: str,
    ) -> None:
        self._state = state
        self._shapes = dict(shapes)
        stored = _stacked(state)
        prefix = _prefix(stored, self._shapes)
        self._parts: dict[str, tuple[str, ...]] = {}
        missing = []
        for name in self._shapes:
            twins = [name, tied.get(name, ""), *(t for t, s in tied.items() if s == name)]
            found = next((prefix + t for t in twins if prefix + t in stored), None)
            if found is None:
                missing.append(name)
            else:
                self._parts[name] = stored[found]
        known = {prefix + name for name in {*self._shapes, *tied, *tied.values(), *spare}}
        extra = [name for name in stored if name not in known]
        _refuse(where, "the checkpoint lacks", missing)
        _refuse(where, "the model in this folder does not have", extra)
        for name, shape in self._shapes.items():
            if self.spec(name).shape != shape:
                raise ConfigError(
                    f"{where}: {name} is {list(shape)} there, and {list(self.spec(name).shape)} "
                    f"in the checkpoint"
                )

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def spec(self, name: str) -> TensorSpec:
        """Name, dtype and shape of a tensor; reads no file."""
        parts = self._parts[name]
        first = self._state.spec(parts[0])
        shape = (len(parts), *first.shape) if self._is_stack(name) else first.shape
        return TensorSpec(name=name, dtype=first.dtype, shape=shape)

    def is_expert(self, name: str) -> bool:
        """Whether the tensor holds one field of all experts of a layer."""
        return self._is_stack(name)

    def read(self, name: str, *, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor. Experts are read one after the other, and cast to ``dtype`` one by one."""
        parts = self._parts[name]
        if not self._is_stack(name):
            tensor = self._state[parts[0]]
            return tensor if dtype is None else tensor.to(dtype)
        spec = self.spec(name)
        stack = torch.empty(spec.shape, dtype=dtype or TORCH_DTYPES[spec.dtype])
        for expert, part in enumerate(parts):
            stack[expert].copy_(self._state[part])
        return stack

    def _is_stack(self, name: str) -> bool:
        return _EXPERT.fullmatch(self._parts[name][0]) is not None


def _stacked(state: StoredState) -> dict[str, tuple[str, ...]]:
    """The state's names with the experts of each layer under one name, in the order of their ids.

    Raises:
        ConfigError: An expert between others is missing.
    """
    experts: dict[str, dict[int, str]] = {}
    found: dict[str, tuple[str, ...]] = {}
    for name in state:
        match = _EXPERT.fullmatch(name)
        if match is None:
            found[name] = (name,)
        else:
            stack = f"{match['path']}.{match['field']}"
            experts.setdefault(stack, {})[int(match["expert"])] = name
    for stack, by_id in experts.items():
        if sorted(by_id) != list(range(len(by_id))):
            gap = next(e for e in range(max(by_id)) if e not in by_id)
            raise ConfigError(f"the checkpoint lacks expert {gap} of {stack}")
        found[stack] = tuple(by_id[expert] for expert in range(len(by_id)))
    return found


def _prefix(stored: Mapping[str, object], shapes: Mapping[str, object]) -> str:
    """What a module around the model puts in front of all names; mostly nothing."""
    counts: dict[str, int] = {"": sum(name in stored for name in shapes)}
    longest = max(shapes, key=len, default="")
    for name in stored:
        if name.endswith("." + longest):
            prefix = name.removesuffix(longest)
            counts[prefix] = sum(prefix + own in stored for own in shapes)
    return max(counts, key=lambda prefix: counts[prefix])


def _refuse(where: str, what: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ConfigError(f"{where}: {what} {', '.join(names[:3])}{more}")

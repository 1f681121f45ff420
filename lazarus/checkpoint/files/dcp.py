"""Write and read folders in the format of ``torch.distributed.checkpoint`` (DCP). EFFECTS.

Tensors are written and read one at a time, by PyTorch's own planner, writer and reader in one
process. The metadata file of the format is a pickle; of it, only the classes that describe tensors
are accepted.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lazarus.basics.careful import open_regular
from lazarus.checkpoint.errors import DamagedError
from lazarus.checkpoint.files.ranges import TORCH_DTYPES
from lazarus.checkpoint.files.tensors import DTYPE_NAMES
from lazarus.checkpoint.format.image import TensorSpec
from lazarus.checkpoint.format.stored_state import StoredState
from lazarus.errors import ConfigError

METADATA = ".metadata"
_NOT_OF_THE_MODEL = ("optim", "optimizer", "lr_scheduler", "dataloader", "train_state")
_DESCRIPTIONS = frozenset(
    {
        ("builtins", "set"),
        ("builtins", "frozenset"),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("pathlib", "PurePosixPath"),
        ("torch", "Size"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        *(
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            )
        ),
    }
)


def write_dcp(state: StoredState, folder: str | Path, *, dtype: str | None = None) -> int:
    """Write all tensors of a state as one DCP folder; return the bytes of the tensors.

    Args:
        state: The tensors by name; each is read when it is written.
        folder: Local folder.
        dtype: safetensors name of the dtype of all floating tensors; None leaves them as they are.
    """
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    specs = {name: _cast(state.spec(name), dtype) for name in state}

    class OneAtATime(DefaultSavePlanner):
        """A planner whose tensors have no data until they are written."""

        def lookup_object(self, index: Any) -> Tensor:
            return state[index.fqn].to(TORCH_DTYPES[specs[index.fqn].dtype]).contiguous()

    empty = {
        name: torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype], device="meta")
        for name, spec in specs.items()
    }
    writer = FileSystemWriter(folder, single_file_per_rank=False)  # else it holds all of them
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process.*")
        save(empty, storage_writer=writer, planner=OneAtATime(), no_dist=True)
    return sum(spec.num_bytes for spec in specs.values())


def _cast(spec: TensorSpec, dtype: str | None) -> TensorSpec:
    if dtype is None or not TORCH_DTYPES[spec.dtype].is_floating_point:
        return spec
    return TensorSpec(name=spec.name, dtype=dtype, shape=spec.shape)


class DcpState(Mapping[str, Tensor]):
    """The model's tensors in a DCP folder, each read on access.

    A checkpoint of a whole training state has its model under the name ``model``; that name is
    taken off, and what belongs to optimizer, schedule and data is left out.

    Raises:
        ConfigError: The folder is no DCP checkpoint.
        DamagedError: Its metadata holds anything else than descriptions of tensors.
    """

    def __init__(self, folder: str | Path) -> None:
        from torch.distributed.checkpoint.filesystem import FileSystemReader

        self._folder = Path(folder)
        self._metadata = _read_metadata(self._folder)
        self._reader = FileSystemReader(self._folder)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._specs: dict[str, TensorSpec] = {}
        self._keys: dict[str, str] = {}
        for key, name in _model_names(self._metadata).items():
            entry = self._metadata.state_dict_metadata[key]
            dtype = DTYPE_NAMES.get(entry.properties.dtype)
            if dtype is None:
                raise ConfigError(f"{folder}: {key} has the dtype {entry.properties.dtype}")
            self._specs[name] = TensorSpec(name=name, dtype=dtype, shape=tuple(entry.size))
            self._keys[name] = key

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def spec(self, name: str) -> TensorSpec:
        """Name, dtype and shape of a tensor; reads no file."""
        return self._specs[name]

    def __getitem__(self, name: str) -> Tensor:
        from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

        spec, key = self._specs[name], self._keys[name]
        tensor = torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype])
        planner = DefaultLoadPlanner(flatten_state_dict=False)
        planner.set_up_planner({key: tensor}, self._metadata, is_coordinator=True)
        try:
            plan = planner.finish_plan(planner.create_local_plan())
            self._reader.read_data(plan, planner).wait()
        except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            what = " ".join(str(error).split())
            raise DamagedError(f"{self._folder}: {key} cannot be read: {what}") from error
        return tensor


def _read_metadata(folder: Path) -> Any:
    """The metadata of a DCP folder, without running any code that it may carry."""
    try:
        with open_regular(folder / METADATA) as file:
            return _Descriptions(file).load()
    except FileNotFoundError as error:
        raise ConfigError(f"{folder} has no {METADATA}: it is no DCP checkpoint") from error
    except (pickle.UnpicklingError, EOFError, AttributeError, ValueError, TypeError) as error:
        raise DamagedError(f"{folder}/{METADATA}: {error}") from error


class _Descriptions(pickle.Unpickler):
    """Unpickles descriptions of tensors and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) not in _DESCRIPTIONS and not is_dtype:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of a checkpoint's metadata")
        return super().find_class(module, name)


def _model_names(metadata: Any) -> dict[str, str]:
    """Keys of the model's tensors in the folder, each with its name in the model."""
    paths = metadata.planner_data or {}
    found: dict[str, tuple[str, ...]] = {}
    for key, entry in metadata.state_dict_metadata.items():
        path = tuple(str(part) for part in paths.get(key, (key,)))
        if hasattr(entry, "size") and path[0].split(".")[0] not in _NOT_OF_THE_MODEL:
            found[key] = path
    if all(path[0] == "model" and len(path) > 1 for path in found.values()):
        found = {key: path[1:] for key, path in found.items()}
    return {key: ".".join(path) for key, path in found.items()}

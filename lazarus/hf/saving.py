"""Write the state of a run as a Hugging Face checkpoint. EFFECTS.

The folder gets the keys, shapes and dtypes of the checkpoint that the model came from, with its
configuration and tokenizer files. transformers' own conversion turns the module's tensors into
those of a checkpoint; ``lazarus.hf.conversion`` plans it on tensors without data. Then the tensors
are read, converted and written layer by layer: never is more than one layer's experts in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from lazarus.checkpoint.files.reader import LazyState
from lazarus.checkpoint.files.storage import (
    Storage,
    delete_file,
    list_folder,
    open_storage,
    write_file,
)
from lazarus.checkpoint.files.tensors import bytes_of
from lazarus.checkpoint.format.image import TensorSpec, layout_image
from lazarus.checkpoint.format.manifest import Manifest
from lazarus.checkpoint.format.stored_state import StoredState
from lazarus.errors import ConfigError
from lazarus.hf.adapters import Saved, adapters_of, save_adapters
from lazarus.hf.conversion import Conversion, SourceFolder

MAX_SHARD_BYTES = 5_000_000_000
_ONE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")


def export_model(
    state: LazyState,
    *,
    like: str | Path | None,
    out: str | Path,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Saved:
    """Write the model of a run's checkpoint; of a model with adapters, the adapters alone.

    Args:
        state: The checkpoint.
        like: See ``save_pretrained``; None takes the folder that the run recorded.
        out: See ``save_pretrained``.
        dtype: See ``save_pretrained``. Adapters keep their own dtypes by default.
        max_shard_bytes: See ``save_pretrained``; adapters are one file.

    Raises:
        ConfigError: As ``save_pretrained``; or the run recorded no folder.
    """
    folder = str(like or source_of(state.manifest))
    if configs := adapters_of(state.manifest):
        return save_adapters(state, configs, out=str(out), base=folder, dtype=dtype)
    return save_pretrained(
        state, like=folder, out=out, dtype=dtype, max_shard_bytes=max_shard_bytes
    )


def save_pretrained(
    state: StoredState,
    *,
    like: str | Path,
    out: str | Path,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Saved:
    """Write a state as a Hugging Face folder.

    Args:
        state: Lazy state of a run, as ``lazarus.checkpoint.files.reader.open_state_dict`` opens it.
        like: Folder of the checkpoint that the model came from.
        out: Folder or fsspec URL to write. Each file is written atomically, ``config.json`` last.
        dtype: safetensors name of a dtype for all floating tensors; by default each tensor has the
            dtype that it has in ``like``.
        max_shard_bytes: Most bytes of a file's tensors, unless one tensor is larger.

    Raises:
        ConfigError: ``like`` is no folder of a model, or of another one than the state's.
        CheckpointError: A file of the state is damaged.
    """
    source = SourceFolder(Path(like))
    conversion = Conversion(source, state, dtype=dtype)
    storage = open_storage(str(out))
    shards = cut(conversion.specs, max_shard_bytes)
    names = shard_names(len(shards))
    for name, specs in zip(names, shards, strict=True):
        _write_shard(storage, name, specs, conversion)
    _drop_old_weights(storage, keep=names)
    total = sum(spec.num_bytes for spec in conversion.specs)
    if len(shards) > 1:
        weight_map = {s.name: n for n, specs in zip(names, shards, strict=True) for s in specs}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_text(storage, _INDEX, json.dumps(index, indent=2) + "\n")
    _copy_others(storage, source)
    _write_text(storage, "config.json", source.config_text(dtype))
    return Saved(files=names, tensors=len(conversion.specs), num_bytes=total)


def source_of(manifest: Manifest) -> str:
    """The folder that the model of a run came from, as the run recorded it.

    Raises:
        ConfigError: The run's model came from no folder.
    """
    folder = manifest.meta.get("source")
    if not folder:
        raise ConfigError("the run does not say which folder its model came from: name it, --like")
    return str(folder)


def cut(specs: Sequence[TensorSpec], max_bytes: int) -> tuple[tuple[TensorSpec, ...], ...]:
    """Divide tensors, in their order, into files of at most ``max_bytes`` of tensors each."""
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.num_bytes
    return tuple(tuple(shard) for shard in shards)


def shard_names(count: int) -> tuple[str, ...]:
    """The names that transformers gives to the weight files of a checkpoint."""
    if count == 1:
        return (_ONE_FILE,)
    return tuple(f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1))


def _write_shard(
    storage: Storage, name: str, specs: Sequence[TensorSpec], tensors: Conversion
) -> None:
    image = layout_image(specs, metadata={"format": "pt"})

    def chunks() -> Iterator[bytes | memoryview]:
        yield image.header
        for spec in image.specs:
            yield bytes_of(tensors[spec.name])

    write_file(storage, name, chunks(), kind="export", is_new=False)


def _drop_old_weights(storage: Storage, *, keep: Sequence[str]) -> None:
    """Delete weight files of an older export into the same folder, and their index."""
    for name, is_folder in list_folder(storage):
        old = name.startswith("model") and name.endswith(".safetensors") and name not in keep
        if not is_folder and (old or name == _INDEX):
            delete_file(storage, name)


def _copy_others(storage: Storage, source: SourceFolder) -> None:
    """Copy the source's files without weights: tokenizer, generation defaults, licence."""
    for path in sorted(source.folder.iterdir()):
        is_weight = path.name.endswith(_WEIGHTS) or path.name.endswith(".index.json")
        if path.is_file() and path.name != "config.json" and not is_weight:
            write_file(storage, path.name, [path.read_bytes()], kind="export", is_new=False)


def _write_text(storage: Storage, name: str, text: str) -> None:
    write_file(storage, name, [text.encode()], kind="export", is_new=False)

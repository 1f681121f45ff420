"""``load``: a transformers model from a folder, whose experts are read where they are placed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig

from lazarus.hf.adopting import AdoptOptions, Stripped, attach_experts, finish_adoption, strip
from lazarus.hf.dequantise import FORMATS, dequantised_tensors
from lazarus.hf.experts import expert_fields, experts_modules
from lazarus.hf.source import CheckpointSource
from lazarus.hf.stored import stored_tensors


def load(
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    aux_coef: float | None = 0.0,
    bias_rate: float = 0.0,
    recompute: bool = False,
    **settings: Any,
) -> Any:
    """Build the model of a folder; dense tensors are loaded, experts are read where they are held.

    In the builder of a run's model a rank reads the experts that are placed on it, one by one. An
    expert that lost every copy is read from the folder again. Outside of a run all experts are
    read. Experts are float32 whatever the files hold; fp8 and mxfp4 files are dequantised.

    Args:
        folder: A folder with ``config.json`` and safetensors files that every node sees.
        dtype: Dtype of dense tensors; a run trains float32.
        aux_coef: See ``adopt``.
        bias_rate: See ``adopt``.
        recompute: See ``adopt``.
        settings: Keys of the configuration to change.

    Returns:
        A model of the class that the configuration names, in train mode.

    Raises:
        ValueError: The folder is incomplete, its tensors do not fit the configuration, it is
            quantised in a way that cannot be read; or as for ``adopt``.
    """
    place = Path(folder).expanduser()
    model, stripped, source = _load_dense(opened(place, settings), dtype=dtype)
    options = AdoptOptions(aux_coef=aux_coef, bias_rate=bias_rate, recompute=recompute)
    with torch.device("cpu"):
        for path, part in stripped.items():
            values = partial(source.expert, path, part.layout.fields)
            attach_experts(model, path, part, values=values, options=options)
    finish_adoption(model)
    _name(model, place)
    return model.train()


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """A folder whose files were looked at.

    Attributes:
        kind: Class of the model.
        config: The model's configuration.
        twin: The model on the meta device.
        source: Reads the checkpoint's tensors.
    """

    kind: Any
    config: PreTrainedConfig
    twin: Any
    source: CheckpointSource


def opened(folder: Path, settings: dict[str, Any]) -> Opened:
    """Look at the files of a folder; of safetensors files only the headers are read.

    Raises:
        ValueError: As for ``load``.
    """
    config = _config(folder, settings)
    block = _take_quantisation(config)
    kind = model_class(config)
    with torch.device("meta"):
        twin = kind(config)
    fields = {path: expert_fields(module) for path, module in experts_modules(twin).items()}
    tensors = dequantised_tensors(stored_tensors(folder), block=block)
    source = CheckpointSource(twin, tensors, fields)
    return Opened(kind=kind, config=config, twin=twin, source=source)


def _config(folder: Path, settings: dict[str, Any]) -> PreTrainedConfig:
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} has no config.json; give the folder of a transformers model")
    config: PreTrainedConfig = AutoConfig.from_pretrained(folder, **settings)
    return config


def _take_quantisation(config: Any) -> tuple[int, int] | None:
    """Forget how the files are quantised; return the size of an fp8 block.

    Raises:
        ValueError: They are quantised in a way that cannot be read.
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    found = found if isinstance(found, dict) else found.to_dict()
    if found.get("quant_method") not in FORMATS:
        raise ValueError(
            f"the files are quantised as {found.get('quant_method')!r}; lazarus.hf reads "
            f"{' and '.join(FORMATS)}"
        )
    del config.quantization_config
    block = found.get("weight_block_size")
    return None if block is None else (int(block[0]), int(block[1]))


def model_class(config: Any) -> Any:
    """The class of transformers that a configuration names.

    Raises:
        ValueError: It names none.
    """
    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    try:
        return AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise ValueError(
            f"{type(config).__name__} names no architecture of transformers "
            f"{transformers.__version__}"
        ) from None


def _load_dense(
    found: Opened, *, dtype: torch.dtype
) -> tuple[nn.Module, dict[str, Stripped], CheckpointSource]:
    """The model with its dense tensors and without experts, what was taken off, and its source."""
    kind, config, source = found.kind, found.config, found.source
    stripped: dict[str, Stripped] = {}

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, *args, **kwargs)
        stripped.update(strip(self))

    # transformers makes the model; a subclass for a moment takes the experts off before it reads.
    bare: Any = type(kind.__name__, (kind,), {"__init__": init, "__module__": kind.__module__})
    model, info = bare.from_pretrained(
        None, config=config, state_dict=source.dense(), dtype=dtype, output_loading_info=True
    )
    model.__class__ = kind
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"the checkpoint has no {', '.join(missing[:4])} ({len(missing)} tensors in all)"
        )
    own = {name: p.requires_grad for name, p in found.twin.named_parameters()}
    for name, parameter in model.named_parameters():  # transformers forgets what its class froze
        parameter.requires_grad_(own.get(name, True))
    for part in stripped.values():
        part.tensors.clear()  # they are on the meta device
    return model, stripped, source


def _name(model: Any, folder: Path) -> None:
    model.config.name_or_path = model.name_or_path = str(folder)
    if (folder / "generation_config.json").exists() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(folder)

"""What a checkpoint says of its model's origin, so that the model can be exported without the code.

transformers and peft leave it in attributes of the model, which are read without importing them.
The model may be inside other modules.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn


def origin_of(model: nn.Module) -> dict[str, Any]:
    """JSON-able: the ``source`` folder, and the configurations of ``adapters`` by their names."""
    return {"source": source_folder(model), "adapters": adapter_configs(model)}


def source_folder(model: nn.Module) -> str:
    """The Hugging Face folder that the model was loaded from; empty if there is none.

    transformers leaves its name in ``name_or_path``. The model may be inside another module.
    """
    for module in model.modules():
        name = getattr(module, "name_or_path", None)
        if isinstance(name, str) and name and (Path(name) / "config.json").is_file():
            return str(Path(name).absolute())
    return ""


def adapter_configs(model: nn.Module) -> dict[str, Any]:
    """peft's configuration of each adapter by name; empty if the model has none."""
    for module in model.modules():
        found = getattr(module, "peft_config", None)
        if isinstance(found, dict) and all(hasattr(c, "to_dict") for c in found.values()):
            plain = {str(name): config.to_dict() for name, config in found.items()}
            return dict(json.loads(json.dumps(plain, default=_plain)))
    return {}


def _plain(value: Any) -> Any:
    """Sets as lists, and what JSON does not know as text."""
    return sorted(value) if isinstance(value, set | frozenset) else str(value)

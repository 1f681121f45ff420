"""Models of Hugging Face transformers: into a run, and out of it again.

``load`` builds a model from a folder, ``adopt`` takes one that is in memory, ``release`` gives it
back; the code runs in every worker, where the model is built. ``saving`` writes the state of a run
as a Hugging Face folder. Start reading at ``adopting.py``; ``source.py`` reads one expert out of a
checkpoint. Everything here needs the extra ``hf``, and nothing outside imports it before it is
used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lazarus.hf.adopting import adopt, release
    from lazarus.hf.expert_lora import lora
    from lazarus.hf.loading import load
    from lazarus.hf.losses import causal_loss
    from lazarus.hf.masks import token_mask

__all__ = ["adopt", "causal_loss", "load", "lora", "release", "token_mask"]

_MODULES = {
    "adopt": "lazarus.hf.adopting",
    "causal_loss": "lazarus.hf.losses",
    "load": "lazarus.hf.loading",
    "lora": "lazarus.hf.expert_lora",
    "release": "lazarus.hf.adopting",
    "token_mask": "lazarus.hf.masks",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is used: most of them need transformers."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_MODULES[name]), name)
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError(
            "lazarus.hf needs transformers; install it with: pip install 'lazarus-moe[hf]'"
        ) from error

"""Elastic, fault-tolerant training of Mixture-of-Experts models."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lazarus.version import __version__

if TYPE_CHECKING:
    from lazarus.config.train_config import TrainConfig
    from lazarus.model.experts import ExpertBank
    from lazarus.model.groups import param_groups
    from lazarus.model.loss import LossSum
    from lazarus.model.moe import MoELayer
    from lazarus.model.routed import RoutedExperts
    from lazarus.run.result import Result
    from lazarus.run.trainer import ElasticTrainer, RunHandle
    from lazarus.runtime.training.context import WorkerContext

__all__ = [
    "ElasticTrainer",
    "ExpertBank",
    "LossSum",
    "MoELayer",
    "Result",
    "RoutedExperts",
    "RunHandle",
    "TrainConfig",
    "WorkerContext",
    "__version__",
    "param_groups",
]

_HOMES = {
    "ElasticTrainer": "lazarus.run.trainer",
    "ExpertBank": "lazarus.model.experts",
    "LossSum": "lazarus.model.loss",
    "MoELayer": "lazarus.model.moe",
    "Result": "lazarus.run.result",
    "RoutedExperts": "lazarus.model.routed",
    "RunHandle": "lazarus.run.trainer",
    "TrainConfig": "lazarus.config.train_config",
    "WorkerContext": "lazarus.runtime.training.context",
    "param_groups": "lazarus.model.groups",
}


def _refuse_foreign_packages() -> None:
    """Check that ``placement`` and ``dispatcher`` are Lazarus' own packages.

    Another package of one of these common names could shadow them.

    Raises:
        ImportError: A package of one of these names comes from elsewhere.
    """
    home = Path(__file__).resolve().parent.parent
    for name in ("placement", "dispatcher"):
        spec = find_spec(name)
        origin = None if spec is None or spec.origin is None else Path(spec.origin).resolve()
        if origin is None or origin.parent.parent != home:
            raise ImportError(
                f"`{name}` is imported from {origin}, not from {home / name}: another package of "
                f"that name shadows the one of Lazarus; rename or remove it from sys.path"
            )


_refuse_foreign_packages()


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that ``import lazarus`` is fast."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module `lazarus` has no attribute `{name}`")

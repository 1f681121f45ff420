"""Check and pickle the user's functions, once, in the driver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cloudpickle
from torch import nn

from lazarus.errors import ConfigError
from lazarus.runtime.spec import UserCode

MAX_INSTANCE_BYTES = 256 << 20


def builder_of(model: Any) -> Callable[[Any], nn.Module] | None:
    """The function that builds the model in each worker; None for ``config.model``.

    Raises:
        ConfigError: ``model`` is a built module, or not callable.
    """
    if not isinstance(model, nn.Module):
        if model is not None and not callable(model):
            raise ConfigError(f"model is {type(model).__name__}; pass a function that builds it")
        build: Callable[[Any], nn.Module] | None = model
        return build
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if size > MAX_INSTANCE_BYTES:
        count = sum(p.numel() for p in model.parameters())
        raise ConfigError(
            f"model has {count / 1e9:.1f} B parameters ({size / 1e9:.1f} GB); pass a function that "
            f"builds it, it will run in each worker"
        )
    raise ConfigError(
        "model is a module whose experts are all built already; pass a function that builds it "
        "(def model(ctx): return MyModel(...)), it will run in each worker"
    )


def pickled(user: UserCode) -> bytes:
    """Pickle all of the user's functions together.

    Raises:
        ConfigError: A function cannot be pickled; the message names the captured variable.
    """
    for name in ("model", "data", "eval_data", "collate", "loss", "optimizer", "schedule", "hooks"):
        value = getattr(user, name)
        try:
            cloudpickle.dumps(value)
        except Exception as problem:
            reason = str(problem).splitlines()[0]
            raise ConfigError(
                f"{name} cannot be sent to the workers ({_culprit(value)}{reason}); open files, "
                f"locks and clients inside the function instead of capturing them"
            ) from problem
    blob: bytes = cloudpickle.dumps(user)
    return blob


def _culprit(value: Any) -> str:
    """A text that names the captured variable that cannot be pickled; empty if unknown."""
    code, closure = getattr(value, "__code__", None), getattr(value, "__closure__", None)
    captured = dict(zip(code.co_freevars, closure, strict=True)) if code and closure else {}
    found = {name: cell.cell_contents for name, cell in captured.items()}
    if code is not None:
        scope = value.__globals__
        found |= {name: scope[name] for name in code.co_names if name in scope}
    for name, content in found.items():
        try:
            cloudpickle.dumps(content)
        except Exception:  # noqa: BLE001 - pickling runs the object's own code
            return f"it captures `{name}`, a {type(content).__name__}: "
    return ""

"""Import the functions that the configuration names in place of arguments of ``ElasticTrainer``."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

from lazarus.config import layers
from lazarus.config.train_config import TrainConfig
from lazarus.errors import ConfigError, Problem

# Argument of ``ElasticTrainer`` -> the key that names a function for it, and the function's
# arguments.
NAMED: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "model": ("model.builder", ("ctx",)),
    "data": ("data.source", ("ctx",)),
    "loss": ("train.loss", ("model", "batch")),
    "optimizer": ("optim.builder", ("groups",)),
}


def with_named(config: TrainConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``ElasticTrainer``, completed by the functions that ``config`` names.

    An argument that is not None is kept, and the function of its key is not imported.

    Raises:
        ConfigError: A function cannot be imported, or cannot be called with its arguments; all
            problems found.
    """
    found, problems = dict(given), []
    for argument, (key, parameters) in NAMED.items():
        name = layers.value_of(config, key)
        if name is None or given[argument] is not None:
            continue
        try:
            found[argument] = _imported(name)
            _check_call(found[argument], parameters)
        except _RefusedError as problem:
            problems.append(Problem(f'{key} = "{name}" {problem}', key=key))
    if problems:
        raise ConfigError(layers.located(problems, config.origins))
    return found


class _RefusedError(Exception):
    """Says in half a line why a name is of no use."""


def _imported(name: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        return attrgetter(attribute)(importlib.import_module(module))
    except (Exception, SystemExit) as problem:  # the module runs the user's code
        kind = "" if isinstance(problem, ImportError | AttributeError) else type(problem).__name__
        said = next(iter(str(problem).splitlines()), "")
        reason = ": ".join(part for part in (kind, said) if part)
        raise _RefusedError(f"cannot be imported: {reason}") from problem


def _check_call(function: Callable[..., Any], parameters: tuple[str, ...]) -> None:
    must = f"it is called with ({', '.join(parameters)})"
    if not callable(function):
        raise _RefusedError(f"is a {type(function).__name__}, which cannot be called; {must}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # no signature, for example of a function in C
    try:
        signature.bind(*parameters)
    except TypeError as problem:
        raise _RefusedError(f"takes {signature}: {problem}; {must}") from problem

"""Policies of somebody else by dotted path: found, made, and callable as their protocol says."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from lazarus.errors import ConfigError


def imported_policy(path: str, *, key: str, like: type) -> Any:
    """The object behind ``package.module:Name``; a class is made into an instance.

    Args:
        key: What named the path, such as ``placement.policy``.
        like: The protocol that the object follows, such as ``PlacementPolicy``.

    Raises:
        ConfigError: It cannot be imported or made, or cannot be called as the protocol is.
    """
    module, _, name = path.partition(":")
    asked = f'{key} = "{path}"'
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, SyntaxError, ValueError) as problem:
        raise ConfigError(f"{asked} cannot be imported: {problem}") from problem
    if isinstance(found, type):
        try:
            found = found()
        except TypeError as problem:
            wanted = "a class is called without arguments"
            raise ConfigError(f"{asked} cannot be made: {problem}; {wanted}") from problem
    check_call(found, what=asked, like=like)
    return found


def check_call(policy: Any, *, what: str, like: type) -> None:
    """Whether ``policy`` takes the arguments of the protocol ``like``.

    Raises:
        ConfigError: It does not; the message names it and says what it must offer.
    """
    asked = list(inspect.signature(like.__call__).parameters.values())[1:]
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in asked]
    must = f"a {like.__name__} is called with {inspect.Signature(plain)}"
    if not callable(policy):
        raise ConfigError(f"{what} is a {type(policy).__name__}, which cannot be called; {must}")
    try:
        signature = inspect.signature(policy)
    except (TypeError, ValueError):
        return  # written in C, say: only the call itself can tell
    named = {p.name: None for p in asked if p.kind is inspect.Parameter.KEYWORD_ONLY}
    placed = [None for p in asked if p.name not in named]
    try:
        signature.bind(*placed, **named)
    except TypeError as problem:
        raise ConfigError(f"{what} takes {signature}: {problem}; {must}") from problem

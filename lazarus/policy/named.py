"""Policies of somebody else, by dotted path or entry point: found, made, and callable as asked."""

from __future__ import annotations

import importlib
import inspect
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from lazarus.errors import ConfigError

# Entry points under which an installed package offers policies.
PLACEMENTS, RECOVERIES = "lazarus.placement", "lazarus.recovery"


def imported_policy(text: str, *, key: str, group: str, like: type) -> Any:
    """The object behind ``package.module:Name`` or an entry point; a class is made an instance.

    Args:
        key: What named it, such as ``placement.policy``.
        group: Of entry points, ``PLACEMENTS`` or ``RECOVERIES``.
        like: The protocol that the object follows, such as ``PlacementPolicy``.

    Raises:
        ConfigError: It cannot be found, imported or made, or not be called as the protocol is.
    """
    asked = f'{key} = "{text}"'
    try:
        found = _imported(text) if ":" in text else _entry_point(text, group).load()
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


def offered(group: str) -> dict[str, EntryPoint]:
    """What installed packages offer there, by name."""
    return {point.name: point for point in entry_points(group=group)}


def _imported(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _entry_point(name: str, group: str) -> EntryPoint:
    found = offered(group)
    if name not in found:
        known = ", ".join(sorted(found)) or "none"
        raise ImportError(
            f"no installed package offers {name!r} in the entry points {group} (there: {known}); "
            f"or give package.module:Name"
        )
    return found[name]


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

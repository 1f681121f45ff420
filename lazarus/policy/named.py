"""Import users' policies by dotted path or entry point, and check that they can be called."""

from __future__ import annotations

import importlib
import inspect
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from lazarus.errors import ConfigError

# Entry points under which an installed package offers policies.
PLACEMENTS, RECOVERIES = "lazarus.placement", "lazarus.recovery"


def imported_policy(text: str, *, key: str, group: str, like: type) -> Any:
    """Import a policy. A class is instantiated without arguments.

    Args:
        text: ``package.module:Name``, or the name of an entry point.
        key: The configuration key that names the policy, such as ``placement.policy``.
        group: Group of entry points, ``PLACEMENTS`` or ``RECOVERIES``.
        like: The protocol that the policy must follow, such as ``PlacementPolicy``.

    Raises:
        ConfigError: The policy cannot be imported, instantiated, or called like the protocol.
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
    """The entry points of installed packages in a group, by name."""
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
    """Check that ``policy`` accepts the arguments of the protocol ``like``.

    Args:
        policy: The object to check.
        what: Names the policy in the error.
        like: The protocol, such as ``PlacementPolicy``.

    Raises:
        ConfigError: ``policy`` cannot be called like the protocol.
    """
    asked = list(inspect.signature(like.__call__).parameters.values())[1:]
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in asked]
    must = f"a {like.__name__} is called with {inspect.Signature(plain)}"
    if not callable(policy):
        raise ConfigError(f"{what} is a {type(policy).__name__}, which cannot be called; {must}")
    try:
        signature = inspect.signature(policy)
    except (TypeError, ValueError):
        return  # no signature, for example of a function in C
    named = {p.name: None for p in asked if p.kind is inspect.Parameter.KEYWORD_ONLY}
    placed = [None for p in asked if p.name not in named]
    try:
        signature.bind(*placed, **named)
    except TypeError as problem:
        raise ConfigError(f"{what} takes {signature}: {problem}; {must}") from problem

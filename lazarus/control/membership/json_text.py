"""Parses the JSON that some messages carry as text, and refuses what is no plain object. PURE."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_DEEPEST = 16  # nesting of JSON in a message


def parsed(text: str, *, what: str) -> tuple[Mapping[str, Any], str]:
    """Parse a JSON object that a message carries as text.

    Args:
        text: The text; empty stands for an empty object.
        what: What the text is, for the reason.

    Returns:
        The object, and why it is refused (the object is then empty) or an empty string.
    """
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError) as problem:
        return {}, f"{what} is no JSON: {type(problem).__name__}"
    if not isinstance(found, dict):
        return {}, f"{what} is no JSON object"
    if not _is_shallow(found, _DEEPEST):
        return {}, f"{what} is nested deeper than {_DEEPEST}"
    return found, ""


def _is_shallow(value: Any, depth: int) -> bool:
    if isinstance(value, dict):
        return depth > 0 and all(_is_shallow(item, depth - 1) for item in value.values())
    if isinstance(value, list):
        return depth > 0 and all(_is_shallow(item, depth - 1) for item in value)
    return True

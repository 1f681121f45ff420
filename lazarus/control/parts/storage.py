"""The checkpoints and expert versions that stand on storage, and what cannot be read there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lazarus.checkpoint.restoring.restore_choice import StoredCheckpoint
from lazarus.control.ports import Stored


@dataclass(frozen=True, kw_only=True, slots=True)
class Storage:
    """What a restore may choose from; ``saving/losses.py`` chooses."""

    checkpoints: tuple[StoredCheckpoint, ...] = ()
    stored: tuple[Stored, ...] = ()
    readable: Mapping[tuple[int, int], int] = field(  # newest stored step that all ranks can read
        default_factory=dict
    )
    bad_sources: frozenset[str] = frozenset()  # copies that could not be read: never chosen again
    refused: frozenset[str] = frozenset()  # those among them that storage refused to read
    refusal: tuple[str, str, str] = ("", "", "")  # the last such refusal: URL, operation, message

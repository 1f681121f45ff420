"""Errors of checkpoints, one type for each kind of problem."""

from __future__ import annotations

from lazarus.errors import CheckpointError as CheckpointError
from lazarus.errors import StorageError as StorageError


class DamagedError(CheckpointError):
    """Data does not match its manifest or checksum. Callers use the next best copy."""


class UnknownFormatError(CheckpointError):
    """A manifest has a format number that this release cannot read."""

    def __init__(self, *, path: str, found: object, supported: tuple[int, ...]) -> None:
        known = ", ".join(str(n) for n in supported)
        super().__init__(
            f"{path}: manifest format {found!r}, this release reads {known}; "
            f"use the release that wrote it, or a newer one"
        )
        self.path, self.found, self.supported = path, found, supported


class IncompleteCheckpointError(CheckpointError):
    """A checkpoint lacks experts or tensors; ``missing`` names them."""

    def __init__(self, *, where: str, missing: tuple[str, ...]) -> None:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if missing[5:] else "")
        super().__init__(f"{where} lacks {shown}")
        self.where, self.missing = where, missing


class ForeignCheckpointError(CheckpointError):
    """A run would overwrite a checkpoint of another run that uses the same ``checkpoint.url``."""

    def __init__(self, *, where: str, step: int, job: str) -> None:
        super().__init__(
            f"the checkpoint of step {step} in {where} belongs to another run, {job}: give each "
            f"run a checkpoint.url of its own"
        )
        self.where, self.step, self.job = where, step, job


class NoCheckpointError(CheckpointError):
    """There is no usable checkpoint at a URL; the message says what was found instead."""


class KeeperUnavailableError(CheckpointError):
    """The node's keeper does not answer; training goes on without a snapshot."""


class RefusedError(CheckpointError):
    """A keeper refused a request: an old term or generation, an unknown key, a wrong secret."""

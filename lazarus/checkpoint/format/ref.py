"""A reference to a checkpoint: its URL and step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CheckpointRef:
    """The URL and step of a checkpoint. ``str`` gives "URL STEP", as in messages and records."""

    url: str
    step: int

    def __str__(self) -> str:
        return f"{self.url} {self.step}"

    @classmethod
    def parse(cls, text: str) -> CheckpointRef:
        """The inverse of ``str``.

        Raises:
            ValueError: The text names no checkpoint.
        """
        url, space, step = text.rpartition(" ")
        if not space or not url or not step.isdecimal():
            raise ValueError(f"{text!r} is not a URL and a step")
        return cls(url, int(step))

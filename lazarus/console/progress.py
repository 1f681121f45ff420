"""Show a run's progress: a redrawn line on a terminal, else one line every 10 seconds."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, TextIO

from lazarus.basics.format import count_text, loss_text, plural, seconds_text
from lazarus.console.narrator import Narrator

Mode = Literal["auto", "line", "json", "off"]
_EVERY_S = 10.0
_REDRAW_S = 0.2


class Progress:
    """A callback in the driver that gets every event of the record and writes to stderr.

    Args:
        mode: "auto" redraws a line on a terminal, else prints lines; "line" always prints lines;
            "json" prints every event as JSON; "off" prints nothing.
        steps: Steps of the run.
        stream: Where to write; default: stderr.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        mode: Mode = "auto",
        *,
        steps: int,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._redraws = mode == "auto" and self._stream.isatty()
        self._mode, self._steps, self._clock = mode, steps, clock
        self._drawn = 0  # length of the redrawn line
        self._last_s = -float("inf")
        self._latest: Mapping[str, Any] | None = None
        self._wanted = 0
        self._started: tuple[float, int] | None = None  # clock and step of the first commit
        self._speeds: list[tuple[float, int]] = []  # last commits: seconds, tokens
        self._checkpoint: int | None = None
        self._narrator = Narrator()

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Handle the next event of the record."""
        if self._mode == "off":
            return
        if self._mode == "json":
            self._stream.write(json.dumps(dict(event)) + "\n")
            self._stream.flush()
            return
        match event["event"]:
            case "step_committed":
                self._step(event)
            case "run_started":
                self._wanted = int(event["num_nodes"])
            case "checkpoint_persisted":
                self._checkpoint = int(event["step"])
            case _:
                pass
        for line in self._narrator.tell(event):
            self._say(line)

    def _step(self, event: Mapping[str, Any]) -> None:
        now = self._clock()
        self._latest = event
        self._speeds = [*self._speeds[-19:], (float(event["wall_s"]), int(event["tokens"]))]
        self._started = self._started or (now, int(event["step"]))
        last = int(event["step"]) >= self._steps
        if last or now - self._last_s >= (_REDRAW_S if self._redraws else _EVERY_S):
            self._last_s = now
            self._draw()

    def _draw(self) -> None:
        line = self._status()
        if self._redraws:
            pad = " " * max(0, self._drawn - len(line))
            self._stream.write(f"\r{line}{pad}")
            self._drawn = len(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def _say(self, line: str) -> None:
        if self._drawn:
            self._stream.write("\r" + " " * self._drawn + "\r")
            self._drawn = 0
        self._stream.write(line + "\n")
        if self._redraws and self._latest is not None:
            self._draw()
        self._stream.flush()

    def finish(self) -> None:
        """End the redrawn line, so that further output starts on a new line."""
        if self._drawn:
            self._stream.write("\n")
            self._stream.flush()
            self._drawn = 0

    def _status(self) -> str:
        event = self._latest
        assert event is not None
        seconds = sum(s for s, _ in self._speeds)
        speed = sum(tokens for _, tokens in self._speeds) / seconds if seconds > 0 else 0.0
        parts = [f"step {event['step']:,}/{self._steps:,}", f"loss {loss_text(event['loss'])}"]
        if "lr" in event:
            parts.append(f"lr {event['lr']:.1e}")
        parts.append(f"{count_text(speed)} tok/s")
        parts.append(f"{event['num_nodes']}/{max(self._wanted, event['num_nodes'])} nodes")
        if "load_max_over_mean" in event:
            parts.append(f"load {event['load_max_over_mean']:.2f}")
        if self._checkpoint is not None:
            parts.append(f"ckpt {plural(event['step'] - self._checkpoint, 'step')} ago")
        if (left := self._eta_s(int(event["step"]))) is not None:
            parts.append(f"eta {seconds_text(left)}")
        return "  ".join(parts)

    def _eta_s(self, step: int) -> float | None:
        if self._started is None or step <= self._started[1] or step >= self._steps:
            return None
        pace_s = (self._clock() - self._started[0]) / (step - self._started[1])
        return pace_s * (self._steps - step)

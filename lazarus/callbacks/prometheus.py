"""``RayMetrics``: export a run's figures as Ray metrics, for Prometheus to scrape.

Ray prefixes each name with ``ray_``. There are no per-expert series, because there would be
thousands; per-expert loads are in the record.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from lazarus.basics.threads import say_so, spawn
from lazarus.callbacks import Callback
from lazarus.record.typed import Event

REPEAT_S = 5.0  # Ray drops a gauge that has not been set for about 28 s
_STEP_BOUNDS_S = [0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]

# name -> kind, meaning, labels in addition to `run`. The alert rules and the dashboard in deploy/
# use these names; a test compares them.
METRICS: Mapping[str, tuple[str, str, tuple[str, ...]]] = {
    "lazarus_step": ("gauge", "last committed step", ()),
    "lazarus_loss": ("gauge", "loss of the last committed step", ()),
    "lazarus_committed_tokens_total": ("counter", "tokens of committed steps", ()),
    "lazarus_step_seconds": ("histogram", "length of a committed step", ()),
    "lazarus_nodes": ("gauge", "nodes by state: live, wanted, draining", ("state",)),
    "lazarus_generation": ("gauge", "generation", ()),
    "lazarus_holding": ("gauge", "1 while the state is held and nothing trains", ()),
    "lazarus_tolerated_stall_seconds": ("gauge", "recovery.tolerated_stall_s", ()),
    "lazarus_reconfigurations_total": ("counter", "by cause", ("cause",)),
    "lazarus_reconfiguration_seconds": ("gauge", "the last one, by phase", ("phase",)),
    "lazarus_nodes_lost_total": ("counter", "by cause", ("cause",)),
    "lazarus_replica_floor": ("gauge", "fewest replicas of any expert, on distinct nodes", ()),
    "lazarus_replica_floor_wanted": ("gauge", "placement.min_replicas", ()),
    "lazarus_lost_steps_total": ("counter", "committed steps that a rollback undid", ()),
    "lazarus_lost_copies_total": ("counter", "routed copies lost by restores", ()),
    "lazarus_checkpoint_step": ("gauge", "step of the newest checkpoint", ()),
    "lazarus_checkpoint_every": ("gauge", "steps between checkpoints, as configured", ()),
    "lazarus_checkpoint_bytes_total": ("counter", "bytes written to storage", ()),
    "lazarus_checkpoint_failures_total": ("counter", "checkpoints that failed", ()),
    "lazarus_replica_mismatch_total": ("counter", "replicas of an expert that differed", ()),
    "lazarus_rank_slowdown": ("gauge", "how many times slower than the others", ("rank",)),
}


class Series(Protocol):
    """One metric: called with a value and its labels."""

    def __call__(self, value: float, labels: Mapping[str, str]) -> None: ...


class RayMetrics(Callback):
    """Callback that exports events as Ray metrics; runs in the driver.

    Ray drops a gauge that has not been set for about 28 s, so all gauges are set again every
    ``repeat_s`` seconds until ``close``.

    Args:
        run: Value of the label `run` until the event ``run_started`` names the run.
        constants: Name -> value of gauges that do not change, such as configured limits.
        make: Factory of a series from (name, kind, meaning, labels); None: Ray's metrics.
        repeat_s: Seconds after which gauges are set again.
    """

    def __init__(
        self,
        run: str,
        *,
        constants: Mapping[str, float] | None = None,
        make: Callable[[str, str, str, tuple[str, ...]], Series] | None = None,
        repeat_s: float = REPEAT_S,
    ) -> None:
        self._run, self._make = run, make or ray_series
        self._series: dict[str, Series] = {}
        self._constants = dict(constants or {})
        self._committed = 0
        self._draining: set[int] = set()
        self._lock = threading.Lock()
        self._gauges: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._over = threading.Event()
        self._repeat_s = repeat_s
        self._thread: threading.Thread | None = None

    def on_event(self, event: Event) -> None:
        """Update the metrics that the event concerns."""
        handle = _HANDLERS.get(event["event"])
        if handle is not None:
            handle(self, event)

    def emit(self, name: str, value: float | None, **labels: str) -> None:
        """Set a gauge, add to a counter, or add an observation to a histogram; None is ignored."""
        if value is None:
            return
        kind, meaning, extra = METRICS[name]
        if name not in self._series:
            self._series[name] = self._make(name, kind, meaning, ("run", *extra))
        given = {"run": self._run, **labels}
        with self._lock:
            if kind == "gauge":
                self._gauges[name, tuple(given.items())] = float(value)
            self._series[name](float(value), given)

    def _repeat(self) -> None:
        while not self._over.wait(self._repeat_s):
            with self._lock:
                for (name, given), value in self._gauges.items():
                    self._series[name](value, dict(given))

    def close(self) -> None:
        """Stop setting gauges again, so that Ray drops them. Call this when the run is over."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _started(self, event: Event) -> None:
        self._run = str(event.get("run") or self._run)
        if self._thread is None:  # if the thread dies, training goes on without metrics
            self._thread = spawn("metrics", self._repeat, on_death=say_so)
        for name, value in self._constants.items():
            self.emit(name, value)
        self.emit("lazarus_nodes", event["num_nodes"], state="wanted")
        self.emit("lazarus_nodes", event["num_nodes"], state="live")
        self.emit("lazarus_holding", 0)

    def _committed_step(self, event: Event) -> None:
        undone = max(0, self._committed + 1 - int(event["step"])) if self._committed else 0
        self._committed = int(event["step"])
        if undone:
            self.emit("lazarus_lost_steps_total", undone)
        self.emit("lazarus_step", event["step"])
        self.emit("lazarus_loss", event["loss"])
        self.emit("lazarus_committed_tokens_total", event["tokens"])
        self.emit("lazarus_step_seconds", event["wall_s"])
        self.emit("lazarus_nodes", event["num_nodes"], state="live")
        self.emit("lazarus_generation", event["generation"])

    def _reconfigured(self, event: Event) -> None:
        self.emit("lazarus_reconfigurations_total", 1, cause=str(event["reason"]))
        for phase, seconds in event["phases"].items():
            self.emit("lazarus_reconfiguration_seconds", seconds, phase=str(phase))
        self.emit("lazarus_nodes", event["num_nodes"], state="live")
        self.emit("lazarus_generation", event["generation"])
        self.emit("lazarus_holding", 0)

    def _drain(self, event: Event) -> None:
        self._draining ^= {int(event["node"])}
        self.emit("lazarus_nodes", len(self._draining), state="draining")

    def _plan(self, event: Event) -> None:
        self.emit("lazarus_replica_floor", event.get("floor"))
        self.emit("lazarus_replica_floor_wanted", event.get("requested_floor"))

    def _persisted(self, event: Event) -> None:
        self.emit("lazarus_checkpoint_step", event["step"])
        self.emit("lazarus_checkpoint_bytes_total", event["bytes"])


_HANDLERS: Mapping[str, Callable[[RayMetrics, Event], None]] = {
    "run_started": RayMetrics._started,
    "step_committed": RayMetrics._committed_step,
    "reconfigured": RayMetrics._reconfigured,
    "plan_adopted": RayMetrics._plan,
    "checkpoint_persisted": RayMetrics._persisted,
    "drain_notice": RayMetrics._drain,
    "node_left": RayMetrics._drain,
    "node_lost": lambda m, e: m.emit("lazarus_nodes_lost_total", 1, cause=str(e["cause"])),
    "quorum_lost": lambda m, e: m.emit("lazarus_holding", 1),
    "checkpoint_failed": lambda m, e: m.emit("lazarus_checkpoint_failures_total", 1),
    "replica_mismatch": lambda m, e: m.emit("lazarus_replica_mismatch_total", 1),
    "expert_restored": lambda m, e: m.emit("lazarus_lost_copies_total", e["lost_copies"]),
    "rank_slow": lambda m, e: m.emit("lazarus_rank_slowdown", e["slowdown"], rank=str(e["rank"])),
}


def ray_series(name: str, kind: str, meaning: str, labels: tuple[str, ...]) -> Series:
    """Create a gauge, counter or histogram of ``ray.util.metrics``."""
    metrics: Any = importlib.import_module("ray.util.metrics")
    if kind == "gauge":
        gauge = metrics.Gauge(name, description=meaning, tag_keys=labels)
        return lambda value, labels: gauge.set(value, tags=dict(labels))
    if kind == "counter":
        counter = metrics.Counter(name, description=meaning, tag_keys=labels)
        return lambda value, labels: counter.inc(value, tags=dict(labels)) if value > 0 else None
    histogram = metrics.Histogram(
        name, description=meaning, boundaries=_STEP_BOUNDS_S, tag_keys=labels
    )
    return lambda value, labels: histogram.observe(value, tags=dict(labels))

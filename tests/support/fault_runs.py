"""Small real runs in which a test acts from outside when the record says that it is time."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lazarus import ElasticTrainer, TrainConfig
from lazarus.record.events import read_events
from lazarus.record.journal_reader import read_journal
from lazarus.run.trainer import RunHandle

SMALL = (
    "cluster.launcher=process",
    "model.layers=2",
    "model.dim=32",
    "model.heads=2",
    "model.seq_len=16",
    "model.experts=6",
    "model.top_k=2",
    "model.moe_every=1",
    "model.ffn_mult=2",
    "train.global_batch=11",
    "train.micro_batch_size=2",
    "optim.lr=0.003",
    "optim.warmup_steps=2",
    "placement.slots_per_node=4",
    "checkpoint.full_at_end=false",
    "checkpoint.every=0",
    "metrics.progress=off",
    "cluster.join_debounce_s=0.05",
    # Tests end processes from outside and then count who is left: no machine takes their place.
    "cluster.replace_lost=false",
)

Event = Mapping[str, Any]
Action = Callable[["Watched"], object]
Act = tuple[Callable[[Event], bool], Action]


@dataclass
class Watched:
    """A run under way and what it left."""

    folder: Path
    handle: RunHandle | None = None
    events: Sequence[Event] = field(default_factory=list)
    digest: str = ""
    status: str = ""

    def of(self, *kinds: str) -> list[Event]:
        return [event for event in self.events if event["event"] in kinds]

    @property
    def steps(self) -> list[int]:
        return [event["step"] for event in self.of("step_committed")]

    def journal(self) -> list[dict[str, Any]]:
        return journal_of(self.folder)

    # ---- while it runs -------------------------------------------------------------------------

    def stop(self) -> None:
        """End after the next commit."""
        assert self.handle is not None
        self.handle.stop()

    def start_node(self) -> None:
        assert self.handle is not None
        self.handle.start_node()

    def pids(self, node: str) -> list[int]:
        """Processes of one node, as they register themselves."""
        assert self.handle is not None
        folder = self.handle._driver._spec.scratch / node
        return [int(path.name) for path in folder.iterdir() if path.name.isdigit()]

    def node_names(self) -> list[str]:
        assert self.handle is not None
        scratch = self.handle._driver._spec.scratch
        return sorted(path.name for path in scratch.iterdir() if path.is_dir())

    def number_of(self, node: str) -> int:
        """The number in the events of the node with this name; they count in order of arrival."""
        return next(e["node"] for e in self.journal() if e.get("key") == node)

    def name_of(self, number: int) -> str:
        """The name of the node with this number in the events."""
        serials = (e for e in self.journal() if e["kind"] == "serial")
        return next(str(e["key"]) for e in serials if e["node"] == number)

    def controller_pid(self) -> int:
        return next(e["pid"] for e in reversed(self.journal()) if e["kind"] == "term")

    def signal(self, node: str, number: int) -> None:
        for pid in self.pids(node):
            os.kill(pid, number)


def journal_of(folder: Path) -> list[dict[str, Any]]:
    return read_journal(folder / "journal")


def at_step(step: int, action: Action) -> Act:
    """Act when that step, or a later one, is committed."""
    return (lambda e: e["event"] == "step_committed" and e["step"] >= step), action


def after(*kinds: str, nodes: int | None = None, action: Action) -> Act:
    """Act at the first commit behind all these events, with that many nodes."""
    seen: set[str] = set()

    def due(event: Event) -> bool:
        seen.add(event["event"])
        committed = event["event"] == "step_committed" and seen >= set(kinds)
        return committed and nodes in (None, event["num_nodes"])

    return due, action


def watch(
    folder: Path,
    *faults: str,
    nodes: int,
    steps: int,
    settings: Sequence[str] = (),
    acts: Sequence[Act] = (),
    on_event: Callable[[Watched, Event], None] | None = None,
    resume: Path | None = None,
    **options: Any,
) -> Watched:
    """Run to the end; each act happens once, in the driver, when its event comes.

    ``options`` are ElasticTrainer's.
    """
    watched = Watched(folder=folder)
    waiting = list(acts)

    class Bus:
        def on_event(self, event: Event) -> None:
            for item in tuple(waiting):
                if item[0](event):
                    waiting.remove(item)
                    item[1](watched)
            if on_event is not None:
                on_event(watched, event)

    config = TrainConfig.load(
        overrides=[
            *SMALL,
            f"cluster.nodes={nodes}",
            f"train.steps={steps}",
            f"run.dir={folder}",
            *settings,
        ]
    )
    trainer = ElasticTrainer(config, faults=faults, callbacks=[Bus()], **options)
    watched.handle = trainer.start(resume=resume)
    try:
        result = watched.handle.wait()
        watched.digest, watched.status = result.state_digest, result.status
    finally:
        watched.events = read_events(folder / "events.jsonl")
        watched.handle = None
    assert not waiting, "an act of the test never came to its turn"
    return watched

"""Real runs for fault tests: real processes, real sockets, a model small enough to be quick."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fault_runs import SMALL

from lazarus import ElasticTrainer, TrainConfig
from lazarus.record.events import read_events
from lazarus.record.journal_reader import read_journal
from lazarus.record.metrics import committed_steps


@dataclass(frozen=True)
class Outcome:
    """What a run left: its record, read back."""

    folder: Path
    events: Sequence[Mapping[str, Any]]
    digest: str
    steps: int

    def of(self, *kinds: str) -> list[Mapping[str, Any]]:
        return [event for event in self.events if event["event"] in kinds]

    @property
    def losses(self) -> dict[int, float]:
        return {s: float(e["loss"]) for s, e in committed_steps(self.events).items()}

    def resumed_at(self, generation: int) -> int:
        """The committed step b that the journal names for a generation's RESUME."""
        for entry in read_journal(self.folder / "journal"):
            if entry["kind"] == "resume" and entry["generation"] == generation:
                return int(entry["step"])
        raise LookupError(f"generation {generation} never resumed")

    def assert_exactly_once(self, steps: int) -> None:
        """Every step committed once and only once, in order."""
        assert [e["step"] for e in self.of("step_committed")] == list(range(1, steps + 1))


Run = Callable[..., Outcome]


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run a small job to its end in real processes and read its record."""

    def go(
        *faults: str,
        nodes: int = 5,
        steps: int = 8,
        settings: Sequence[str] = (),
        resume: Path | None = None,
        **options: Any,
    ) -> Outcome:
        """``options`` are ElasticTrainer's; ``resume`` the folder of an earlier run."""
        folder = tmp_path_factory.mktemp("run") if resume is None else resume
        config = TrainConfig.load(
            overrides=[
                *SMALL,
                "metrics.report=false",
                f"cluster.nodes={nodes}",
                f"train.steps={steps}",
                f"run.dir={folder}",
                *settings,
            ]
        )
        trainer = ElasticTrainer(config, faults=faults, **options)
        result = trainer.fit(resume=None if resume is None else "auto")
        events = read_events(folder / "events.jsonl")
        return Outcome(folder=folder, events=events, digest=result.state_digest, steps=result.steps)

    go.small = (*SMALL, "metrics.report=false")  # type: ignore[attr-defined]
    return go

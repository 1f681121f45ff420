"""What ``Result.history`` is made of: as the record's committed steps, in little memory."""

from __future__ import annotations

import math
import sys
from random import Random

from lazarus.record.metrics import committed_steps
from lazarus.record.step_history import StepHistory


def test_steps_done_again_count_as_they_were_done_last() -> None:
    rng, step, events, history = Random(0), 0, [], StepHistory()
    for _ in range(2_000):
        step = max(0, step - rng.randrange(30)) if rng.random() < 0.02 else step
        step += 1
        fields = {"loss": rng.choice([None, rng.random()]), "tokens": 3, "num_nodes": 2}
        events.append({"event": "step_committed", "step": step, **fields, "wall_s": rng.random()})
        history.add(events[-1])
    wanted = committed_steps(events)
    assert [record.step for record in history] == sorted(wanted) == list(wanted)
    assert len(history) == len(wanted) and history[-1].step == max(wanted)
    for record in history[10:20]:
        event = wanted[record.step]
        assert record.wall_s == event["wall_s"] and (record.tokens, record.num_nodes) == (3, 2)
        assert math.isnan(record.loss) if event["loss"] is None else record.loss == event["loss"]


def test_a_step_takes_forty_bytes() -> None:
    history = StepHistory()
    for step in range(1, 100_001):
        history.add({"step": step, "loss": 1.0, "tokens": 1, "num_nodes": 1, "wall_s": 1.0})
    columns = list(vars(history).values())
    assert sum(sys.getsizeof(column) for column in columns) < 100_000 * 48

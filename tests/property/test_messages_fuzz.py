"""Whatever a peer sends is refused and counted: no exception leaves the decisions or a service."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
from control_basics import Broken
from control_desk import running
from control_play import play
from odd_messages import BODIES, odd_body

from lazarus.control import machine
from lazarus.control.cluster.state import Control, Phase
from lazarus.control.membership import checks
from lazarus.control.messages import (
    Body,
    Evaluated,
    FaultFired,
    Hello,
    ReplicaMismatch,
    ShareReported,
    ToDriver,
    ToWorker,
    UserError,
)
from lazarus.control.ports import (
    DriverSaid,
    Event,
    Journal,
    Publish,
    Tell,
    TellDriver,
    Tick,
    WorkerSaid,
)
from lazarus.runtime.rpc import codec

SELDOM: Sequence[Body] = (  # what the plays do not say
    ShareReported(generation=1, step=3, record='{"kind": "persist", "ok": true, "files": []}'),
    ReplicaMismatch(generation=1, step=3, what='{"layer": 0, "expert": 1}'),
    FaultFired(generation=1, step=3, kind="join", count=2),
    Evaluated(generation=1, step=3, loss_sum=1.0, count=2.0),
    UserError(generation=1, step=3, error="x", traceback="y"),
)
Situation = tuple[Control, float]


def situations(
    rng: Random, monkeypatch: pytest.MonkeyPatch, *, plays: int
) -> tuple[list[Situation], list[Body]]:
    """States of random plays, with real messages heard in them; every phase is among them."""
    states: list[Situation] = []
    heard: list[Body] = []
    decide = machine.decide

    def spy(state: Control, event: Event) -> Any:
        if rng.random() < 0.05:
            states.append((state, event.at_s))
        if isinstance(event, WorkerSaid) and type(event.body) in BODIES and rng.random() < 0.1:
            heard.append(event.body)
        return decide(state, event)

    with monkeypatch.context() as patch:
        patch.setattr(machine, "decide", spy)
        for _ in range(plays):
            play(rng.randrange(1 << 30))
    desk = running(nodes=3)
    return [*states, (desk.state, desk.now_s)], [*heard, *SELDOM]


def carried_out(commands: Sequence[Any]) -> None:
    """What the shell does with commands, so far as it can fail for what they hold."""
    for command in commands:
        match command:
            case Tell(body=body):
                codec.encode(ToWorker(body))  # type: ignore[arg-type]
            case TellDriver(body=body):
                codec.encode(ToDriver(body))  # type: ignore[arg-type]
            case Journal(entry=entry):
                json.dumps(entry)
            case Publish(fields=fields):
                json.dumps(dict(fields))


def said(rng: Random, state: Control, body: Body, at_s: float) -> Event:
    if rng.random() < 0.15:
        return DriverSaid(body=body, at_s=at_s)
    worker = rng.choice([*state.roster.workers, *state.roster.workers, "stranger.0", ""])
    if isinstance(body, Hello) and rng.random() < 0.5:
        worker = body.worker
    return WorkerSaid(worker=worker, body=body, at_s=at_s)


def fuzz(
    rng: Random, states: Sequence[Situation], heard: Sequence[Body], *, messages: int
) -> Counter[str]:
    """Chains of odd messages from every kind of state; returns how often each type was sent."""
    sent: Counter[str] = Counter()
    while sum(sent.values()) < messages:
        state, at_s = rng.choice(states)
        for _ in range(rng.randrange(1, 6)):
            body = rng.choice(heard) if rng.random() < 0.1 else odd_body(rng, state, heard)
            sent[type(body).__name__] += 1
            event = said(rng, state, body, at_s)
            refused, phase = state.rejected.num_refused, state.phase
            try:
                state, commands = machine.decide(state, event)
                carried_out(commands)
                for wait_s in rng.sample([0.0, 0.2, 1.5, 50.0], 2):
                    at_s += wait_s
                    state, commands = machine.decide(state, Tick(at_s=at_s))
                    carried_out(commands)
            except Exception as problem:
                raise Broken(
                    "total", f"{type(problem).__name__}: {problem}\n{event}\nin {phase}"
                ) from problem
            sent["refused"] += state.rejected.num_refused - refused
    return sent


@pytest.mark.parametrize(
    "messages", [1500, pytest.param(20_000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_no_message_breaks_a_decision(monkeypatch: pytest.MonkeyPatch, messages: int) -> None:
    """C9: wrong lengths, NaN, nested JSON, replayed, reordered; every type, in every phase."""
    rng = Random(12)
    states, heard = situations(rng, monkeypatch, plays=4 if messages < 5000 else 40)
    phases = {state.phase for state, _ in states}
    assert phases >= {Phase.RUNNING, Phase.FENCING, Phase.ALIGNING, Phase.PREPARING}
    sent = fuzz(rng, states, heard, messages=messages)
    assert set(sent) >= {cls.__name__ for cls in BODIES}
    assert sent["refused"] > messages / 10


def test_no_message_of_ours_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What real processes send passes every check, in plays full of faults."""
    refusals: list[str] = []
    decide = machine.decide

    def spy(state: Control, event: Event) -> Any:
        after, commands = decide(state, event)
        if after.rejected.num_refused > state.rejected.num_refused and isinstance(
            event, WorkerSaid
        ):
            reason = checks.wrong_with(state, event.worker, event.body)
            if reason:
                refusals.append(f"{event}: {reason}")
        return after, commands

    monkeypatch.setattr(machine, "decide", spy)
    for seed in range(25):
        play(seed)
    assert not refusals

"""What people see while a run goes on."""

import io
import json
from typing import Any

from lazarus.console.progress import Progress

NODES = {"num_nodes": 4, "world_size": 4}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def commit(step: int, **more: Any) -> dict[str, Any]:
    base = {"t": float(step), "event": "step_committed", "generation": 1, "step": step}
    return base | {"loss": 2.417, "tokens": 4096, "num_nodes": 4, "wall_s": 0.25} | more


LOST = {"t": 1.0, "event": "node_lost", "generation": 1, "node": 2, "cause": "stream closed"}
BACK = {
    "t": 1.3,
    "event": "reconfigured",
    "generation": 2,
    "reason": "loss",
    "wall_s": 0.31,
    "phases": {"plan": 0.001, "detect": 0.01, "transfer": 0.19},
    "num_nodes": 3,
    "moves": 4,
    "bytes_moved": 3 * 2**20,
    "step": 14,
}


def shown(events: list[dict[str, Any]], *, mode: Any = "auto", stream: io.StringIO) -> str:
    clock = Clock()
    progress = Progress(mode, steps=40, stream=stream, clock=clock)
    for event in events:
        clock.now = event["t"]
        progress.on_event(event)
    progress.finish()
    return stream.getvalue()


def test_a_pipe_gets_one_line_per_ten_seconds_and_the_last_step() -> None:
    start = {"t": 0.0, "event": "run_started", "generation": 1} | NODES
    out = shown([start, *map(commit, range(1, 41))], stream=io.StringIO()).splitlines()
    assert [line.split()[1] for line in out] == ["1/40", "11/40", "21/40", "31/40", "40/40"]
    assert out[1] == "step 11/40  loss 2.417  16.4k tok/s  4/4 nodes  eta 29 s"


def test_a_loss_and_its_recovery_are_one_line_with_the_phases_below() -> None:
    out = shown([*map(commit, range(1, 15)), LOST, BACK], stream=io.StringIO()).splitlines()
    assert out[-2:] == [
        "x node 2 lost (stream closed) in step 15: back in 0.31 s, 0 steps lost, 3 nodes",
        "    detect 0.01  plan 0.00  transfer 0.19  moved 3.0 MiB, 4 experts",
    ]


def test_a_rollback_says_how_many_steps_it_cost() -> None:
    out = shown([*map(commit, range(1, 15)), LOST, BACK | {"step": 10}], stream=io.StringIO())
    assert "4 steps lost" in out


def test_a_terminal_is_redrawn_and_news_stand_on_their_own_lines() -> None:
    out = shown([commit(1), commit(2), LOST, BACK, commit(15)], stream=Terminal())
    assert out.count("\n") == 3  # two lines of news and the end
    assert "\rstep 2/40" in out
    assert "\rx node 2 lost" in out


def test_json_mode_is_the_events_and_off_is_silence() -> None:
    lines = shown([commit(1), LOST], mode="json", stream=io.StringIO()).splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["step_committed", "node_lost"]
    assert shown([commit(1), LOST, BACK], mode="off", stream=io.StringIO()) == ""


def test_a_loss_that_is_no_number_is_said_so() -> None:
    assert "loss not finite" in shown([commit(1, loss=None)], stream=io.StringIO())


def test_unknown_events_are_passed_over() -> None:
    assert shown([{"t": 0.0, "event": "new", "generation": 1}], stream=io.StringIO()) == ""

"""A controller that died while it ended the run: its next life says what was not heard."""

from __future__ import annotations

import errno
import json
import queue
import threading
from pathlib import Path

import pytest

from lazarus.basics.clock import now_s
from lazarus.checkpoint.restoring.restore_choice import StoredCheckpoint
from lazarus.control.cluster.state import ControlConfig
from lazarus.control.commit import commits
from lazarus.control.messages import Body, DriverHello, FromDriver, Record, RunOver, StopRun
from lazarus.control.ports import DriverSaid, Journal
from lazarus.control.restart.replay import initial_state
from lazarus.runtime.controller.controller_end import UnrecordedError, unrecorded_end
from lazarus.runtime.controller.journal import Journal as Storage
from lazarus.runtime.controller.shell import Controller, open_controller
from lazarus.runtime.rpc.credentials import Credentials
from lazarus.runtime.rpc.link import Link
from lazarus.runtime.spec import ControllerSpec


def end_entry(config: ControlConfig) -> dict[str, object]:
    state = initial_state(config, term=1, now_s=0.0)
    _, commands = commits.end(state, status="finished", failure=None, at_s=7.0)
    (journaled,) = (c for c in commands if isinstance(c, Journal))
    return dict(journaled.entry)


def spec_of(folder: Path, config: ControlConfig) -> ControllerSpec:
    return ControllerSpec(
        host="127.0.0.1",
        port=0,
        credentials=Credentials(secret="s3cret"),
        run_dir=folder,
        config=config,
    )


def driver_of(controller: Controller) -> tuple[queue.SimpleQueue[Body], Link]:
    """A driver that comes (back) to a controller, and what it hears."""
    heard: queue.SimpleQueue[Body] = queue.SimpleQueue()
    link = Link(
        f"127.0.0.1:{controller.port}",
        credentials=Credentials(secret="s3cret"),
        speaker=FromDriver,
        hello=lambda: DriverHello(run="r"),
        on_message=lambda term, body: heard.put(body),
        on_dead=print,
        allowance_s=30.0,
    )
    link.start()
    return heard, link


def test_a_run_that_ends_before_its_driver_is_back_tells_it_in_the_same_life(
    tmp_path: Path,
) -> None:
    """Otherwise one more controller has to start, only to say that the run is over."""
    controller = open_controller(spec_of(tmp_path, ControlConfig(steps=3)))
    controller._events.put((DriverSaid(body=StopRun(), at_s=now_s()), None))
    thread = threading.Thread(target=controller.run)
    thread.start()
    record = tmp_path / "events.jsonl"
    look, deadline_s = threading.Event(), now_s() + 30
    while b"run_finished" not in record.read_bytes() and now_s() < deadline_s:
        look.wait(0.01)
    heard, link = driver_of(controller)
    said = [heard.get(timeout=20)]
    while not isinstance(said[-1], RunOver):
        said.append(heard.get(timeout=20))
    assert said[-1].status == "short"
    thread.join(20)
    assert not thread.is_alive()
    link.close()


def test_the_next_life_tells_the_driver_and_the_record(tmp_path: Path) -> None:
    config = ControlConfig(steps=3)
    storage = Storage(tmp_path / "journal")
    storage.append({"kind": "header", "run": "r", "format": 1})
    storage.append(end_entry(config))
    spec = spec_of(tmp_path, config)
    for life in range(2):  # it may die there again
        controller = open_controller(spec)
        thread = threading.Thread(target=controller.run)
        thread.start()
        heard, link = driver_of(controller)
        said = heard.get(timeout=20)
        if life == 0:
            assert isinstance(said, Record) and json.loads(said.line)["event"] == "run_finished"
            said = heard.get(timeout=20)
        assert isinstance(said, RunOver) and said.status == "finished" and said.failure is None
        thread.join(20)
        assert not thread.is_alive()
        link.close()
    record = (tmp_path / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in record] == ["run_finished"]


@pytest.mark.parametrize(
    ("url", "status", "way_out"),
    [
        ("{run}/checkpoints", "failed", "start again"),
        ("file://{run}/checkpoints", "failed", "start again"),
        ("s3://bucket/x", "short", "go on with: lazarus train --resume s3://bucket/x"),
    ],
)
def test_of_a_folder_that_was_removed_nothing_is_said_to_stand(
    tmp_path: Path, url: str, status: str, way_out: str
) -> None:
    """A2: checkpoints in it went with it; those elsewhere stand, and are what can be resumed."""
    run = tmp_path / "run"
    config = ControlConfig(
        steps=3,
        checkpoint_url=url.format(run=run),
        checkpoints=(StoredCheckpoint(generation=1, step=2, is_full=True),),
    )
    state = initial_state(config, term=1, now_s=0.0)
    problem = UnrecordedError(OSError(errno.ENOENT, "No such file or directory"), folder=run)
    ended, failure = unrecorded_end(state, problem)
    assert (ended, failure.way_out) == (status, way_out)
    assert f"the run's folder was removed: {run}" in failure.message
    assert ("the checkpoint of step 2 stands" in failure.message) == (status == "short")

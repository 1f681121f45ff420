"""A thread that dies is news, whichever it was."""

from __future__ import annotations

import queue
import threading
from pathlib import Path
from typing import Any

import pytest

from lazarus.control.messages import FromWorker
from lazarus.control.ports import ManifestDone, WriteManifest
from lazarus.control.state import ControlConfig
from lazarus.runtime import controller as controlling
from lazarus.runtime import manifests
from lazarus.runtime.controller import open_controller
from lazarus.runtime.launch import ProcessLauncher
from lazarus.runtime.link import Link
from lazarus.runtime.manifests import ManifestWriter
from lazarus.runtime.rpc.credentials import Credentials
from lazarus.runtime.spec import ControllerSpec
from lazarus.runtime.threads import spawn

News = queue.SimpleQueue[tuple[str, BaseException]]


def fails(*_: Any, **__: Any) -> Any:
    raise RuntimeError("on purpose")


def spec(folder: Path) -> ControllerSpec:
    return ControllerSpec(
        run_id="r",
        host="127.0.0.1",
        port=0,
        credentials=Credentials(secret="s"),
        run_dir=folder,
        config=ControlConfig(steps=3),
    )


def test_the_death_is_told_once_with_name_and_problem() -> None:
    news: News = queue.SimpleQueue()
    spawn("one", fails, on_death=lambda name, problem: news.put((name, problem))).join(10)
    name, problem = news.get(timeout=10)
    assert name == "one" and str(problem) == "on purpose"
    assert news.empty()


def test_any_exception_while_a_manifest_is_written_is_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A3: later orders are still carried out."""
    monkeypatch.setattr(manifests, "write_manifest", fails)
    done: queue.SimpleQueue[ManifestDone] = queue.SimpleQueue()
    writer = ManifestWriter(spec(tmp_path), done.put, on_death=fails)
    for step in (1, 2):
        writer.order(WriteManifest(step=step, generation=1, parts=(), meta={}, final=step == 2))
        answer = done.get(timeout=10)
        assert (answer.step, answer.final) == (step, step == 2)
        assert answer.error == "RuntimeError: on purpose"
    writer.close()


def test_an_error_in_any_thread_of_the_controller_ends_it(tmp_path: Path) -> None:
    """A3: the loop raises, so that the process ends and another one follows."""
    controller = open_controller(spec(tmp_path))
    spawn("odd", fails, on_death=controller._thread_died).join(10)
    with pytest.raises(Exception, match="thread odd died") as caught:
        controller.run()
    assert str(caught.value.__cause__) == "on purpose"


def test_an_exception_in_the_loop_ends_the_controller_and_not_the_loop_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A1: whatever a message makes the loop raise."""
    monkeypatch.setattr(controlling, "decide", fails)
    controller = open_controller(spec(tmp_path))
    raised: list[BaseException] = []

    def run() -> None:
        try:
            controller.run()
        except RuntimeError as problem:
            raised.append(problem)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    assert not thread.is_alive() and str(raised[0]) == "on purpose"


def test_a_control_thread_that_dies_tells_its_owner() -> None:
    """A3: a worker or driver that nobody can command does not wait for commands for ever."""
    dead: queue.SimpleQueue[str] = queue.SimpleQueue()
    link = Link(
        "127.0.0.1:1",
        credentials=Credentials(secret="s"),
        speaker=FromWorker,
        hello=fails,
        on_message=lambda term, body: None,
        on_dead=dead.put,
        allowance_s=60.0,
    )
    link.start()
    assert "RuntimeError: on purpose" in dead.get(timeout=10)
    link.close()


def test_a_launcher_that_sees_no_deaths_any_more_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A3: the driver ends the run instead of waiting for news that will not come."""
    news: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
    monkeypatch.setattr(ProcessLauncher, "_watch", fails)
    launcher = ProcessLauncher(lambda name, cause: news.put((name, cause)))
    assert news.get(timeout=10) == ("launcher", "RuntimeError: on purpose")
    launcher.close(grace_s=0.0)

"""A thread that dies is news, whichever it was."""

from __future__ import annotations

import queue
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from lazarus.basics.threads import say_so, spawn
from lazarus.callbacks.bus import CallbackBus
from lazarus.callbacks.prometheus import RayMetrics
from lazarus.control.cluster.state import ControlConfig
from lazarus.control.messages import FromWorker
from lazarus.control.ports import ManifestDone, WriteManifest
from lazarus.faults import parse_chaos
from lazarus.record import ownership
from lazarus.runtime.comm.groups import Group
from lazarus.runtime.controller import manifests
from lazarus.runtime.controller import shell as controlling
from lazarus.runtime.controller.manifests import ManifestWriter
from lazarus.runtime.controller.shell import open_controller
from lazarus.runtime.driver.chaos import Chaos
from lazarus.runtime.launch.launcher import ProcessLauncher
from lazarus.runtime.launch.ray_actors import ControllerActor
from lazarus.runtime.rpc.credentials import Credentials
from lazarus.runtime.rpc.link import Link
from lazarus.runtime.spec import ControllerSpec

News = queue.SimpleQueue[tuple[str, BaseException]]


def fails(*_: Any, **__: Any) -> Any:
    raise RuntimeError("on purpose")


def spec(folder: Path) -> ControllerSpec:
    return ControllerSpec(
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


# ---- every other thread of a run ---------------------------------------------------------------


def test_chaos_that_stops_striking_ends_the_run() -> None:
    """A drill that nobody was struck in must not pass for one that was survived."""
    news: News = queue.SimpleQueue()

    class Nodes:
        has_room = inject = live_nodes = fails

        def thread_died(self, name: str, problem: BaseException) -> None:
            news.put((name, problem))

    chaos = Chaos(parse_chaos("mtbf=10ms,seed=1"), Nodes())
    name, problem = news.get(timeout=10)
    assert (name, str(problem)) == ("chaos", "on purpose")
    chaos.close()


def test_an_owner_whose_beats_end_says_that_the_folder_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: queue.SimpleQueue[str] = queue.SimpleQueue()
    monkeypatch.setattr(ownership, "_BEATS", 1000)
    held = ownership.take(tmp_path, run="r", gone_after_s=10.0)
    held.on_lost = lost.put
    monkeypatch.setattr(ownership, "_newest", fails)
    assert "on purpose" in lost.get(timeout=10)
    held.release()


def test_a_callback_that_leaves_the_process_is_off_and_the_others_go_on() -> None:
    heard: queue.SimpleQueue[str] = queue.SimpleQueue()

    class Leaves:
        def on_event(self, event: dict[str, Any]) -> None:
            raise SystemExit(3)

    class Stays:
        def on_event(self, event: dict[str, Any]) -> None:
            heard.put(event["event"])

    bus = CallbackBus([Leaves(), Stays()], fail=True)
    failed: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
    bus.on_failure = failed.put
    bus.publish({"event": "one"})
    bus.publish({"event": "two"})
    assert [heard.get(timeout=10), heard.get(timeout=10)] == ["one", "two"]
    assert isinstance(failed.get(timeout=10), SystemExit) and failed.empty()
    bus.close()


def test_a_bus_whose_thread_is_dead_ends_the_run_and_is_closed_without_a_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(CallbackBus, "_call", fails)
    bus = CallbackBus([object()], fail=False)
    failed: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
    bus.on_failure = failed.put
    bus.publish({"event": "one"})
    assert str(failed.get(timeout=10)) == "on purpose"
    bus._thread.join(10)
    for _ in range(5000):  # more than may wait
        bus.publish({"event": "two"})
    began = time.monotonic()
    bus.close()
    assert time.monotonic() - began < 5 and bus.dropped


def test_metrics_that_end_are_said_once_and_training_goes_on(
    capfd: pytest.CaptureFixture[str],
) -> None:
    calls = []

    def series(value: float, labels: Any) -> None:
        calls.append(value)
        if len(calls) > 2:
            fails()

    metrics = RayMetrics("r", make=lambda *_: series, repeat_s=0.001)
    metrics.emit("lazarus_step", 1.0)
    metrics._thread = spawn("metrics", metrics._repeat, on_death=say_so)
    metrics._thread.join(10)
    assert "thread metrics of this process has died" in capfd.readouterr().err
    metrics.close()


@pytest.mark.parametrize("how", [RuntimeError, SystemExit])
def test_whoever_waits_for_a_thread_that_builds_a_group_gets_its_error(how: type) -> None:
    def make() -> None:
        raise how("on purpose")

    group = Group(generation=1)
    with pytest.raises(how, match="on purpose"):
        group._unless_released(make)


def test_a_ray_launcher_that_sees_nothing_any_more_says_so() -> None:
    pytest.importorskip("ray")
    from lazarus.runtime.launch.ray_launcher import RayLauncher

    news: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
    launcher: Any = object.__new__(RayLauncher)
    launcher._threads, launcher._closing = [], threading.Event()
    launcher._on_exit = lambda name, cause: news.put((name, cause))
    for name in ("launcher", "ray-nodes"):
        launcher._spawn(name, fails)
        assert news.get(timeout=10) == ("launcher", f"{name}: RuntimeError: on purpose")


def test_a_controller_that_dies_in_its_actor_ends_it_with_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controlling.Controller, "run", fails)
    actor = ControllerActor(spec(tmp_path))
    with pytest.raises(RuntimeError, match="on purpose"):
        actor.wait()

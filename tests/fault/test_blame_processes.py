"""Processes of our own that hang, stop, fail or cannot write: noticed, replaced, or named."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_runs import Watched, at_step, watch

from lazarus.errors import LazarusError
from lazarus.record.events import read_events
from lazarus.record.journal_reader import read_journal
from lazarus.runtime.host.sockets import connections, peer_of

STALL_S = 2.0
QUICK = (f"recovery.tolerated_stall_s={STALL_S}", "metrics.report=false")
ENDLESS = 100_000


def terms(folder: Path) -> list[int]:
    return [e["term"] for e in read_journal(folder / "journal") if e["kind"] == "term"]


def assert_in_order(run: Watched) -> None:
    assert run.steps == list(range(1, len(run.steps) + 1))
    assert not run.of("node_lost")


def stop_when_back(run: Watched, event: Any) -> None:
    """End the run a few commits after a new life of the controller."""
    if event["event"] == "controller_restarted":
        run.digest = "back"
    elif event["event"] == "step_committed" and run.digest:
        run.stop()


@pytest.mark.slow
def test_a_stopped_controller_is_replaced_and_training_goes_on(tmp_path: Path) -> None:
    """A4: SIGSTOP of the controller for longer than it is allowed to be silent."""
    stopped: list[int] = []

    def stop(run: Watched) -> None:
        pid = run.controller_pid()
        os.kill(pid, signal.SIGSTOP)
        stopped.append(pid)

    run = watch(
        tmp_path,
        nodes=2,
        steps=ENDLESS,
        settings=QUICK,
        acts=[at_step(3, stop)],
        on_event=stop_when_back,
    )
    assert not Path(f"/proc/{stopped[0]}").exists()
    assert run.status == "stopped" and terms(tmp_path) == [1, 2]
    assert_in_order(run)
    back = next(i for i, e in enumerate(run.events) if e["event"] == "controller_restarted")
    before = sum(e["event"] == "step_committed" for e in run.events[:back])
    assert len(run.steps) > before + 5  # the steps of the silence, said at once, and a few more


@pytest.mark.slow
def test_a_driver_whose_stream_breaks_is_back_and_has_missed_nothing(tmp_path: Path) -> None:
    """Both processes live: the run goes on, and every line of the record reaches the driver."""
    broken: list[int] = []
    heard: list[Any] = []

    def cut(run: Watched) -> None:
        """Break this process's connections to the controller, as a reset on the way does."""
        (port,) = {e["port"] for e in run.journal() if e["kind"] == "term"}
        for _, copy in connections(besides=set()):
            with copy:
                if (peer_of(copy) or ("", 0))[1] == port:
                    copy.shutdown(socket.SHUT_RDWR)
                    broken.append(port)

    run = watch(
        tmp_path,
        nodes=2,
        steps=16,
        settings=QUICK,
        acts=[at_step(step, cut) for step in (3, 6, 9, 12)],
        on_event=lambda _, event: heard.append(event),
    )
    assert len(broken) >= 2, "each cut at a connection that was there"
    assert run.status == "finished" and terms(tmp_path) == [1]
    assert run.steps == list(range(1, 17))
    assert_in_order(run)
    assert heard == list(run.events)


@pytest.mark.slow
def test_a_controller_that_is_killed_without_end_ends_the_run(tmp_path: Path) -> None:
    """A5: it dies again and again: pauses between its lives, and an end with the cause."""
    killed: list[float] = []

    def kill(run: Watched, event: Any) -> None:
        if event["event"] == "step_committed" and event["step"] >= 3:
            pid = run.controller_pid()
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)
                killed.append(time.monotonic())

    with pytest.raises(LazarusError, match=r"controller's process died 8 times in a row: SIGKILL"):
        watch(tmp_path, nodes=2, steps=ENDLESS, settings=QUICK, on_event=kill)
    assert len(terms(tmp_path)) == 8
    assert killed[-1] - killed[0] >= 0.25 + 0.5 + 1 + 2 + 2  # the pauses between its lives


@pytest.mark.slow
def test_deaths_with_good_lives_between_them_are_forgiven(tmp_path: Path) -> None:
    """A5: the count is of deaths in a row; a life of three stalls starts it anew."""
    last = [0.0]

    def kill(run: Watched, event: Any) -> None:
        if event["event"] != "step_committed" or time.monotonic() - last[0] < 2.0:
            return
        if len(terms(tmp_path)) == 11:
            run.stop()
            return
        last[0] = time.monotonic()
        os.kill(run.controller_pid(), signal.SIGKILL)

    settings = ("recovery.tolerated_stall_s=0.5", "metrics.report=false")
    run = watch(tmp_path, nodes=2, steps=ENDLESS, settings=settings, on_event=kill)
    assert run.status == "stopped"
    assert_in_order(run)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with room for 120 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=120k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(options, capture_output=True).returncode:
        pytest.skip("a file system of its own takes root and the right to mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_run_whose_folder_is_full_ends_and_says_what_stands(full_disk: Path) -> None:
    """A2: ENOSPC in the journal or the record is an end, within seconds, on record if it fits."""
    began = time.monotonic()
    last = [began]

    def note(run: Watched, event: Any) -> None:
        last[0] = time.monotonic()

    settings = (*QUICK, "checkpoint.every=2")
    with pytest.raises(LazarusError, match="the run's folder is full") as caught:
        watch(full_disk, nodes=2, steps=ENDLESS, settings=settings, on_event=note)
    assert time.monotonic() - last[0] < 30
    free = os.statvfs(full_disk)
    assert str(full_disk) in str(caught.value) and "No space left" in str(caught.value)
    assert free.f_bavail * free.f_frsize < 120 * 1024


def fork_server() -> int:
    from multiprocessing import forkserver

    pid: int = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    return pid


@pytest.mark.slow
def test_a_fork_server_that_is_killed_is_a_machine_that_fails_not_the_users_code(
    tmp_path: Path,
) -> None:
    """D15: every process goes with it and nobody has their exit codes; the run begins again."""

    def kill(run: Watched) -> None:
        os.kill(fork_server(), signal.SIGKILL)

    def back(run: Watched, event: Any) -> None:
        if event["event"] == "step_committed" and event["step"] > 8:
            run.stop()

    run = watch(
        tmp_path,
        nodes=3,
        steps=ENDLESS,
        settings=(*QUICK, "checkpoint.every=2", "cluster.replace_lost=true"),
        acts=[at_step(5, kill)],
        on_event=back,
    )
    assert run.status == "stopped" and len(terms(tmp_path)) > 1
    assert not run.of("user_error", "worker_died")
    assert run.of("node_lost") and run.steps[-1] > 8


@pytest.mark.slow
def test_a_damaged_journal_ends_the_run_in_one_line_and_a_resume_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """D10, D11: a controller that dies later cannot start again; what is durable is not lost."""

    def damage(run: Watched) -> None:
        pid = run.controller_pid()
        os.kill(pid, signal.SIGSTOP)
        for path in (tmp_path / "journal").glob("0*.json"):
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 4
            path.write_bytes(data)
        os.kill(pid, signal.SIGKILL)

    settings = (*QUICK, "checkpoint.every=2", "metrics.progress=off")
    with pytest.raises(LazarusError, match=r"is damaged.*go on with: lazarus train") as caught:
        watch(tmp_path, nodes=2, steps=ENDLESS, settings=settings, acts=[at_step(6, damage)])
    assert caught.value.exit_code == 3
    end = read_events(tmp_path)[-1]
    assert (end["event"], end["status"], end["cause"]) == ("run_finished", "short", "storage")
    assert "Traceback" not in capfd.readouterr().err
    again = watch(tmp_path, nodes=2, steps=end["steps"] + 2, settings=settings, resume=tmp_path)
    assert again.status == "finished"


@pytest.mark.slow
def test_a_damaged_line_of_the_record_does_not_end_the_run(tmp_path: Path) -> None:
    """D10: also not when a controller has to start again; the line is kept aside."""

    def damage(run: Watched) -> None:
        pid = run.controller_pid()
        os.kill(pid, signal.SIGSTOP)
        path = tmp_path / "events.jsonl"
        lines = path.read_bytes().split(b"\n")
        lines[3] = b"\0" * len(lines[3])
        path.write_bytes(b"\n".join(lines))
        os.kill(pid, signal.SIGKILL)

    run = watch(
        tmp_path,
        nodes=2,
        steps=ENDLESS,
        settings=QUICK,
        acts=[at_step(6, damage)],
        on_event=stop_when_back,
    )
    assert run.status == "stopped" and terms(tmp_path) == [1, 2]
    assert not run.of("node_lost")
    assert len((tmp_path / "events.damaged").read_text().splitlines()) == 1

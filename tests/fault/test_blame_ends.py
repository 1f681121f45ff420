"""Every way a run can end: record, exit code, exception and last line say the same."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from file_events import wait_until
from user_scripts import environment, script_of

from lazarus.record.events import FILE_NAME, read_events

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

FOREVER = ("train.steps=100000",)


@dataclass(frozen=True, kw_only=True)
class End:
    """One way to end, and what all must say of it."""

    status: str
    cause: str
    code: int
    said: str  # in the last lines of stderr, or of stdout for a good end
    act: Callable[[subprocess.Popen[str], Path], None] = lambda run, folder: None
    body: str = ""
    settings: tuple[str, ...] = FOREVER
    nodes: int = 2


def after_step(run: subprocess.Popen[str], folder: Path, *, step: int = 3) -> None:
    """Wait for a commit in the record."""
    if not wait_until(lambda: has_step(folder, step), folder.parent, run):
        raise AssertionError((run.communicate()[1] or "")[-3000:])


def has_step(folder: Path, step: int) -> bool:
    path = folder / FILE_NAME
    return path.exists() and f'"step":{step},' in path.read_text(encoding="utf-8")


def asked_by(number: int) -> Callable[[subprocess.Popen[str], Path], None]:
    def act(run: subprocess.Popen[str], folder: Path) -> None:
        after_step(run, folder)
        run.send_signal(number)

    return act


def ask_twice(run: subprocess.Popen[str], folder: Path) -> None:
    """The second Ctrl-C comes when the first has been heard."""
    after_step(run, folder)
    run.send_signal(signal.SIGINT)
    assert run.stderr is not None
    assert any("Ctrl-C: the run stops after its next step" in line for line in run.stderr)
    run.send_signal(signal.SIGINT)


NO_NEXT_STEP = """
os.path.exists("never") or os.mkfifo("never") if __name__ == "__main__" else None
NEVER = os.path.abspath("never")
class Hook:
    def on_commit(self, ctx, step):
        os.environ["STEP"] = str(step)
options["hooks"] = [Hook()]
def loss(model, batch):
    if int(os.environ.get("STEP", "0")) >= 3:
        open(NEVER).read()  # nobody will ever write
    return LossSum(model(batch["x"]).square().sum(), batch["x"].numel())
"""
CALLBACK = """
class Watch:
    def on_event(self, event):
        if event["event"] == "step_committed":
            raise LookupError("no dashboard")
options["callbacks"] = [Watch()]
"""
BROKEN_DRIVER = """
from lazarus.runtime.driver.driver import Driver
def broken(self, event):
    if event["event"] == "step_committed":
        raise AssertionError("a bug of ours")
Driver._recorded = broken
"""
NO_MACHINE = """
from lazarus.runtime.launch.launcher import ProcessLauncher
free, taken = ProcessLauncher.machines, []
ProcessLauncher.machines = lambda self: () if taken else free(self)
class Watch:
    def on_event(self, event):
        if event["event"] == "run_started":
            taken.append("all")
options["callbacks"] = [Watch()]
"""
ENDS = {
    "finished": End(
        status="finished", cause="", code=0, said="status finished steps 8", settings=()
    ),
    "stopped": End(
        status="stopped", cause="request", code=0, said="status stopped",
        body="""
        import threading
        class Stopper:
            def on_event(self, event):
                if event["event"] == "step_committed" and event["step"] == 3:
                    handle.stop()
        options["callbacks"] = [Stopper()]
        class ElasticTrainer(ElasticTrainer):
            def fit(self):
                global handle
                handle = self.start()
                return handle.wait()
        """,
    ),
    "ctrl-c": End(
        status="stopped", cause="request", code=-signal.SIGINT, said="stopped by Ctrl-C at step",
        act=asked_by(signal.SIGINT),
    ),
    "sigterm": End(
        status="short", cause="request", code=1, said="stopped by SIGTERM at step",
        act=asked_by(signal.SIGTERM),
    ),
    "ctrl-c twice": End(
        status="short", cause="request", code=-signal.SIGINT, said="stopped by Ctrl-C at step",
        act=ask_twice, body=NO_NEXT_STEP,
    ),
    "quorum": End(
        status="short", cause="node", code=1, said="QuorumTimeoutError: ", body=NO_MACHINE,
        settings=(
            *FOREVER,
            'faults.specs=["kill:1@3"]',
            "cluster.min_nodes=2",
            "cluster.quorum_timeout_s=3",
        ),
    ),
    "user": End(
        status="failed", cause="user_code", code=1, said="ZeroDivisionError",
        body='options["schedule"] = lambda s: 1/(3-s)',
    ),
    "callback": End(
        status="failed", cause="user_code", code=1, said="LookupError: no dashboard",
        body=CALLBACK, settings=(*FOREVER, "metrics.on_callback_error=fail"),
    ),
    "lost-expert": End(
        status="short",
        cause="node",
        code=1,
        said="LostExpertError: no live replica of",
        settings=(
            *FOREVER,
            'faults.specs=["kill:1@3"]',
            "placement.min_replicas=1",
            "placement.slots_per_node=2",
            "recovery.on_lost_expert=fail",
        ),
    ),
    "internal": End(
        status="failed", cause="internal", code=1, said="a bug of ours", body=BROKEN_DRIVER
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_record_exit_code_exception_and_screen_agree(tmp_path: Path, name: str) -> None:
    """The taxonomy: one table of ends."""
    end, folder = ENDS[name], tmp_path / "run"
    script = script_of(tmp_path, end.body, nodes=end.nodes, settings=end.settings)
    run = subprocess.Popen(
        [sys.executable, str(script)], cwd=tmp_path, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    end.act(run, folder)
    out, err = run.communicate(timeout=200)
    assert run.returncode == end.code, err[-3000:]
    events = read_events(folder)
    ends = [event for event in events if event["event"] == "run_finished"]
    assert [(e["status"], e["cause"]) for e in ends] == [(end.status, end.cause)], err[-3000:]
    assert events[-1] == ends[0]
    shown = out if end.code == 0 else "\n".join(err.splitlines()[-8:])
    assert end.said in shown, err[-3000:]
    status = of_command("status", str(folder), "--json")
    assert (status["phase"], status["ended"]) == ("ENDED", end.status)
    assert status["cause"] == end.cause
    reports = list(folder.glob("internal-error-*.txt"))
    assert len(reports) == (1 if end.cause == "internal" else 0)
    if reports:
        text = reports[0].read_text()
        assert "a bug of ours" in text and "step_committed" in text and str(reports[0]) in err


def of_command(*arguments: str) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-m", "lazarus", *arguments],
        capture_output=True, text=True, check=True, env=environment(), timeout=100,
    )  # fmt: skip
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("controller", ["lives", "dies first"])
def test_a_killed_driver_is_found_out_by_the_next_status(tmp_path: Path, controller: str) -> None:
    """A driver killed with -9: its controller records the end; without one, its readers see it."""
    folder = tmp_path / "run"
    script = script_of(tmp_path, "", nodes=2, settings=FOREVER)
    log = (tmp_path / "log").open("w")
    run = subprocess.Popen(
        [sys.executable, str(script)], cwd=tmp_path, env=environment(), stdout=log, stderr=log,
        start_new_session=True,
    )  # fmt: skip
    found = wait_until(lambda: has_step(folder, 3), tmp_path, run)
    assert found, (tmp_path / "log").read_text()[-3000:]
    assert of_command("status", str(folder), "--json")["phase"] != "ENDED"
    if controller == "dies first":
        run.send_signal(signal.SIGSTOP)  # it starts no other one
        os.kill(controller_of(folder), signal.SIGKILL)
    run.kill()
    run.wait()
    until = time.monotonic() + 60.0
    while (status := of_command("status", str(folder), "--json"))["phase"] != "ENDED":
        assert time.monotonic() < until
    if controller == "dies first":  # its workers would train on until they miss a controller
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    assert (status["ended"], status["cause"]) == ("short", "node")
    written = [e for e in read_events(folder) if e["event"] == "run_finished"]
    assert len(written) == (1 if controller == "lives" else 0)
    said = subprocess.run(
        [sys.executable, "-m", "lazarus", "events", str(folder), "--follow"],
        capture_output=True, text=True, check=True, env=environment(), timeout=100,
    ).stdout  # fmt: skip
    assert "short (node)" in said.splitlines()[-1]
    subprocess.run(
        [sys.executable, "-m", "lazarus", "report", str(folder)],
        check=True, env=environment(), timeout=200, capture_output=True,
    )  # fmt: skip
    assert "short (node)" in (folder / "report.html").read_text(encoding="utf-8")


def controller_of(folder: Path) -> int:
    from lazarus.record.journal_reader import read_journal

    (journal,) = folder.glob("journal*")
    return next(int(e["pid"]) for e in reversed(read_journal(journal)) if e["kind"] == "term")


def test_a_loop_without_end_does_not_outlive_a_killed_driver(tmp_path: Path) -> None:
    """The driver ends such processes. Where it is gone, a process that was told to end does so."""
    body = """
    def loss(model, batch):
        pid = str(os.getpid())
        with open(os.path.join(FOLDER, pid + ".pid"), "w") as file:
            file.write(pid)
        while True:
            pass
    """
    settings = (*FOREVER, "recovery.tolerated_stall_s=1")
    place = f"FOLDER = {str(tmp_path)!r}\n"
    script = script_of(tmp_path, place + textwrap.dedent(body), nodes=2, settings=settings)
    log = (tmp_path / "log").open("w")
    run = subprocess.Popen(
        [sys.executable, str(script)], cwd=tmp_path, env=environment(), stdout=log, stderr=log,
        start_new_session=True,
    )  # fmt: skip

    def looping() -> list[int]:
        found = [int(text) for p in tmp_path.glob("*.pid") if (text := p.read_text())]
        return found if len(found) == 2 else []

    workers = wait_until(looping, tmp_path, run)
    assert workers, (tmp_path / "log").read_text()[-3000:]
    ends = [os.pidfd_open(pid) for pid in workers]
    run.kill()
    run.wait()
    for end in ends:
        assert select.select([end], [], [], 120.0)[0], "a process that nobody can end"
        os.close(end)

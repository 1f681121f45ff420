"""Runs on an embedded Ray, through the real command line: nothing stays, however they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lazarus.record.events import read_events
from lazarus.record.journal_reader import read_journal

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


def start(books: Any, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "lazarus", "train", "configs/tiny.toml", *arguments],
        cwd=ROOT,
        env=books.environment(HOME=str(folder), TMPDIR=str(folder)),
        stdout=(folder / "out").open("w"),
        stderr=(folder / "err").open("w"),
        text=True,
    )


def committed(record: Path) -> list[int]:
    if not (record / "events.jsonl").exists():
        return []
    return [e["step"] for e in read_events(record) if e["event"] == "step_committed"]


def ray_folders(folder: Path) -> list[Path]:
    return sorted(folder.glob("lz-*"))


def test_a_node_is_killed_and_the_run_ends_with_nothing_left(
    books: Any, short_folder: Path, quick: list[str], poll: Any
) -> None:
    record = short_folder / "r"
    began = time.monotonic()
    arguments = (*quick, "--steps", "8", "--fault", "kill:2@4", "--run-dir", str(record))
    run = start(books, short_folder, *arguments)
    assert poll(
        lambda: any((f / "token").exists() for f in ray_folders(short_folder)), timeout_s=60
    )
    (home,) = ray_folders(short_folder)
    assert (home / "token").stat().st_mode & 0o777 == 0o600
    assert home.stat().st_mode & 0o777 == 0o700
    assert run.wait(400) == 0, (short_folder / "err").read_text()
    print(f"the whole run took {time.monotonic() - began:.0f} s")
    assert committed(record) == list(range(1, 9))
    events = read_events(record)
    assert [e["node"] for e in events if e["event"] == "node_lost"] == [2]
    assert len([e for e in events if e["event"] == "reconfigured"]) >= 1
    assert books.wait_until_empty(15) == {}
    assert ray_folders(short_folder) == []
    assert list(short_folder.glob("lazarus-*")) == []
    assert not (short_folder / ".ray").exists()


def test_a_stopped_controller_is_replaced_here_too(
    books: Any, short_folder: Path, quick: list[str], poll: Any
) -> None:
    """A4: Ray does not end a process that does not run; the driver does."""
    record = short_folder / "r"
    settings = ("--set", "recovery.tolerated_stall_s=10", "--steps", "100000")
    run = start(books, short_folder, *quick, *settings, "--run-dir", str(record))
    assert poll(lambda: len(committed(record)) > 2 or run.poll() is not None, timeout_s=300)
    stopped = controllers(record)[-1]
    os.kill(stopped, signal.SIGSTOP)
    assert poll(lambda: len(controllers(record)) == 2, timeout_s=120), (
        short_folder / "err"
    ).read_text()
    at = max(committed(record))
    assert poll(lambda: max(committed(record)) > at + 2, timeout_s=120)
    run.send_signal(signal.SIGINT)
    assert run.wait(120) == 130, (short_folder / "err").read_text()
    lost = [e for e in read_events(record) if e["event"] == "node_lost"]
    assert [(e["node"], e["cause"]) for e in lost] == []
    assert committed(record) == list(range(1, max(committed(record)) + 1))
    assert books.wait_until_empty(15) == {}


def controllers(record: Path) -> list[int]:
    """The controller's process in each of its lives."""
    return [int(e["pid"]) for e in read_journal(record / "journal") if e["kind"] == "term"]


def test_ctrl_c_ends_the_run_in_seconds_and_a_killed_driver_takes_all_along(
    books: Any, short_folder: Path, quick: list[str], poll: Any
) -> None:
    record = short_folder / "r"
    run = start(books, short_folder, *quick, "--steps", "100000", "--run-dir", str(record))
    assert poll(lambda: len(committed(record)) > 2 or run.poll() is not None, timeout_s=300)
    asked = time.monotonic()
    run.send_signal(signal.SIGINT)
    assert run.wait(120) == 130, (short_folder / "err").read_text()
    assert time.monotonic() - asked < 60  # a loaded machine; seconds on a quiet one
    assert "Traceback" not in (short_folder / "err").read_text()
    assert read_events(record)[-1]["event"] == "run_finished"
    assert books.wait_until_empty(15) == {}
    assert ray_folders(short_folder) == []

    record = short_folder / "r2"
    run = start(books, short_folder, *quick, "--steps", "100000", "--run-dir", str(record))
    assert poll(lambda: len(committed(record)) > 2 or run.poll() is not None, timeout_s=300)
    assert len(books.alive()) > 5
    run.kill()
    run.wait()
    assert books.wait_until_empty(90) == {}
    assert committed(record)[:3] == [1, 2, 3]


BROKEN = """
import sys
import lazarus.run.trainer as trainer
from lazarus.cli import main
from torch import nn

def build(ctx):
    from lazarus import MoELayer

    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = MoELayer(dim=8, hidden=8, num_experts=8, top_k=1)

        def forward(self, tokens):
            raise ValueError("my own mistake")

    return Mine()

class Own(trainer.ElasticTrainer):
    def __init__(self, config, **options):
        super().__init__(config, model=build, loss=lambda m, b: m(b["tokens"]), **options)

trainer.ElasticTrainer = Own
sys.exit(main(["train", *sys.argv[1:]]))
"""


def test_an_exception_in_the_users_model_crosses_ray_with_its_traceback(
    books: Any, short_folder: Path, quick: list[str]
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BROKEN, *quick, "--nodes", "2", "--steps", "3", "--run-dir", "r"],
        cwd=short_folder,
        env=books.environment(HOME=str(short_folder), TMPDIR=str(short_folder)),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "ValueError: my own mistake" in done.stderr
    assert "in forward" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert books.wait_until_empty(15) == {}
    assert ray_folders(short_folder) == []


WHERE = """
import json, sys
from lazarus import ElasticTrainer, TrainConfig

class Seen:
    def __call__(self, ctx):
        import lazarus, os
        open(os.path.join(sys_folder, f"{os.getpid()}"), "w").write(lazarus.__file__)
        from lazarus.config.train_config import TrainConfig
        from lazarus.runtime.training import defaults as builtin
        return builtin.model(TrainConfig.load("configs/tiny.toml"))

sys_folder = sys.argv[1]
config = TrainConfig.load("configs/tiny.toml", overrides=sys.argv[2:])
result = ElasticTrainer(config, model=Seen()).fit()
print(json.dumps({"steps": result.steps}))
"""


def test_workers_import_the_library_from_where_the_driver_has_it(
    books: Any, short_folder: Path, quick: list[str]
) -> None:
    seen = short_folder / "seen"
    seen.mkdir()
    settings = [s for s in quick if s != "--set" and not s.startswith("model.")]
    settings += ["cluster.nodes=2", "train.steps=2", f"run.dir={short_folder / 'r'}"]
    settings += ["placement.slots_per_node=8"]
    done = subprocess.run(
        [sys.executable, "-c", WHERE, str(seen), *settings],
        cwd=ROOT,
        env=books.environment(HOME=str(short_folder), TMPDIR=str(short_folder)),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"steps": 2}
    places = {path.read_text() for path in seen.iterdir()}
    assert len(list(seen.iterdir())) == 2
    assert places == {str(ROOT / "lazarus" / "__init__.py")}

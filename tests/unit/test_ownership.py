"""A run's folder has one owner, and anybody can tell whether that one still lives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lazarus.errors import ConfigError
from lazarus.record import ownership
from lazarus.record.ownership import owner_of, take

_TAKE = """
import sys
from pathlib import Path
from lazarus.record.ownership import take
take(Path(sys.argv[1]), run="other", gone_after_s=60.0)
print("taken", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that owns the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", _TAKE, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "taken\n"
    yield process
    process.kill()
    process.communicate()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_second_owner_is_refused_by_name_and_leaves_no_trace(
    tmp_path: Path, other: subprocess.Popen[str]
) -> None:
    before = names(tmp_path)
    with pytest.raises(ConfigError, match=f"process {other.pid} on "):
        take(tmp_path, run="mine", gone_after_s=60.0)
    assert names(tmp_path) == before
    owner = owner_of(tmp_path)
    assert owner is not None
    assert (owner.pid, owner.state) == (other.pid, "alive")


def test_a_killed_owner_has_gone_at_once_even_if_nobody_reaped_it(
    tmp_path: Path, other: subprocess.Popen[str]
) -> None:
    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # dead, and still a zombie
    owner = owner_of(tmp_path)
    assert owner is not None
    assert owner.state == "gone"
    mine = take(tmp_path, run="mine", gone_after_s=60.0)
    assert names(tmp_path) == ["owner-2.json"]
    mine.release()
    assert owner_of(tmp_path) is None


def test_another_process_with_the_number_of_the_dead_one_is_not_the_owner(tmp_path: Path) -> None:
    mine = take(tmp_path, run="mine", gone_after_s=60.0)
    text = json.loads((tmp_path / "owner-1.json").read_text())
    (tmp_path / "owner-1.json").write_text(json.dumps(text | {"started": text["started"] - 1}))
    take(tmp_path, run="next", gone_after_s=60.0).release()
    mine.release()


def test_the_same_process_cannot_take_a_folder_twice(tmp_path: Path) -> None:
    mine = take(tmp_path, run="one", gone_after_s=60.0)
    with pytest.raises(ConfigError, match="this process"):
        take(tmp_path, run="two", gone_after_s=60.0)
    mine.release()
    take(tmp_path, run="two", gone_after_s=60.0).release()


@pytest.mark.parametrize("dead", [False, True])
def test_of_many_that_want_a_folder_one_gets_it(tmp_path: Path, *, dead: bool) -> None:
    """From nothing, and from an owner that was killed."""
    if dead:
        take(tmp_path, run="dead", gone_after_s=60.0)
        path = tmp_path / "owner-1.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"started": 1}))
    start = threading.Barrier(16)

    def want(number: int) -> str:
        start.wait()
        try:
            return take(tmp_path, run=str(number), gone_after_s=60.0).owner.run
        except ConfigError:
            return ""

    with ThreadPoolExecutor(16) as pool:
        winners = [name for name in pool.map(want, range(16)) if name]
    owner = owner_of(tmp_path)
    assert owner is not None
    assert winners == [owner.run]
    assert len(names(tmp_path)) == 1


def test_an_owner_elsewhere_is_known_by_its_beats(tmp_path: Path) -> None:
    """A driver on another machine that shares the folder: alive while it beats, gone after."""
    lines: list[str] = []
    theirs = take(tmp_path, run="theirs", gone_after_s=0.6)
    path = tmp_path / "owner-1.json"
    beat = path.stat().st_mtime_ns
    text = json.loads(path.read_text()) | {"host": "other-machine", "boot": "another"}
    path.write_text(json.dumps(text))
    owner = owner_of(tmp_path)
    assert owner is not None
    assert owner.state == "elsewhere"
    with pytest.raises(ConfigError, match="on other-machine"):
        take(tmp_path, run="mine", gone_after_s=60.0, say=lines.append)
    assert path.stat().st_mtime_ns > beat
    theirs._released.set()  # it beats no more, and leaves its file behind
    theirs._thread.join()
    mine = take(tmp_path, run="mine", gone_after_s=60.0, say=lines.append)
    assert len(lines) == 2
    assert "looking whether that still lives" in lines[0]
    mine.release()


def test_an_owner_that_was_taken_for_gone_is_told_that_it_owns_nothing_any_more(
    tmp_path: Path,
) -> None:
    told = threading.Event()
    mine = take(tmp_path, run="mine", gone_after_s=0.6)
    mine.on_lost = lambda reason: told.set()
    (tmp_path / "owner-2.json").write_text("{}")
    assert told.wait(30)


def claimed(gone_after_s: float) -> str:
    """An owner's file of another machine."""
    return json.dumps(
        {
            "pid": 1,
            "host": "elsewhere",
            "run": "r",
            "boot": "b",
            "namespace": "n",
            "started": 1,
            "gone_after_s": gone_after_s,
        }
    )


def test_an_owners_file_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "owner-7.json"
    for spoil in (
        lambda: path.write_text("{"),
        lambda: path.write_text('{"pid": 1}'),
        lambda: path.write_text("[" * 100_000),
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("/dev/zero"),
        path.mkdir,
        lambda: path.write_text(claimed(-5.0)),
        lambda: path.write_text(claimed(1e300)),
    ):
        spoil()
        with pytest.raises(ConfigError, match=r"owner-7\.json does not say"):
            take(tmp_path, run="mine", gone_after_s=60.0)
        path.rmdir() if path.is_dir() else path.unlink()


def test_the_age_of_the_last_beat_is_for_people(tmp_path: Path) -> None:
    assert ownership.silence_s(tmp_path, now_s=0.0) == 0.0
    mine = take(tmp_path, run="mine", gone_after_s=60.0)
    os.utime(tmp_path / "owner-1.json", (100.0, 100.0))
    assert ownership.silence_s(tmp_path, now_s=130.0) == 30.0
    mine.release()

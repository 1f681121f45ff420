"""Notes that survive the process which wrote them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from lazarus.runtime.fence.whereabouts import LastWords, Note, Whereabouts, read_crash, read_note

DIES = """
import ctypes, sys
from pathlib import Path
from lazarus.runtime.worker.setup import crashes_noted
from lazarus.runtime.fence.whereabouts import Whereabouts
folder = Path(sys.argv[1])
where = Whereabouts.in_folder(folder, 0)
where.generation, where.rank, where.step = 3, 1, 7
where.places = {"forward": "train.py:3 in loss"}
where.enter("data", [1, 2])
where.enter("forward", [4, 9])
def loss():
    ctypes.string_at(0)
with crashes_noted(folder, 0):
    loss()
"""


def test_a_crash_leaves_the_note_and_the_stack(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", DIES, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGSEGV
    note = Note(
        generation=3, rank=1, step=7, phase="forward", sample_ids=(4, 9), place="train.py:3 in loss"
    )
    assert read_note(tmp_path, 0) == note
    text = read_crash(tmp_path, 0)
    assert "Segmentation fault" in text and "in loss" in text


def test_who_has_left_the_users_code_is_nowhere(tmp_path: Path) -> None:
    where = Whereabouts.in_folder(tmp_path, 2)
    where.step = 5
    where.enter("backward", range(100_000))
    assert len(where.now.sample_ids) == 64
    where.leave()
    assert read_note(tmp_path, 2) == Note(step=5)
    assert read_crash(tmp_path, 2) == ""


def test_a_file_name_that_is_no_text_is_noted_too(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.py")  # Latin-1 bytes: a surrogate in the name
    where = Whereabouts.in_folder(tmp_path, 0)
    where.places = {"forward": f"{name}:3 in loss"}
    where.enter("forward", [1])
    assert read_note(tmp_path, 0) == where.now
    assert where.now.place.startswith("caf\udce9.py")


def test_a_note_that_is_not_whole_is_none(tmp_path: Path) -> None:
    assert read_note(tmp_path, 0) is None
    Whereabouts.in_folder(tmp_path, 0)
    assert read_note(tmp_path, 0) is None  # nothing was noted yet
    Whereabouts.in_folder(tmp_path, 0).enter("data")
    path = tmp_path / "note-0"
    held = bytearray(path.read_bytes())
    held[20] ^= 1
    path.write_bytes(held)
    assert read_note(tmp_path, 0) is None


def test_a_note_too_long_for_its_file_loses_its_details_only(tmp_path: Path) -> None:
    where = Whereabouts.in_folder(tmp_path, 0)
    where.places = {"data": "x" * 10_000}
    where.step = 4
    where.enter("data", [1])
    note = read_note(tmp_path, 0)
    assert note is not None
    assert (note.step, note.phase, note.place) == (4, "data", "")


def test_what_a_process_noted_outlives_the_folder_of_its_node(tmp_path: Path) -> None:
    """A node that is taken down loses its folder, maybe before the end of its processes is seen."""
    for key in ("node-1", "node-2"):
        (tmp_path / key).mkdir()
        where = Whereabouts.in_folder(tmp_path / key, 0)
        where.step, where.places = 7, {"forward": "train.py:3 in loss"}
        where.enter("forward", [4])
    words = LastWords(tmp_path)
    words.keep("node-1.0")
    for key in ("node-1", "node-2"):
        shutil.rmtree(tmp_path / key)
    words.keep("node-1.0")  # taken down twice
    died = words.of("node-1.0", "SIGKILL")
    assert (died.worker, died.cause, died.step) == ("node-1.0", "SIGKILL", 7)
    assert (died.phase, died.place, tuple(died.sample_ids)) == (
        "forward",
        "train.py:3 in loss",
        (4,),
    )
    assert words.of("node-2.0", "SIGKILL").phase == ""

"""Storage that refuses: one type of error, nothing left behind, the next source, the next try."""

from __future__ import annotations

import errno
import os
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from lazarus.checkpoint.errors import NoCheckpointError, StorageError
from lazarus.checkpoint.files.patience import patiently
from lazarus.checkpoint.files.place import check_place
from lazarus.checkpoint.files.reader import StoredExperts
from lazarus.checkpoint.files.resumable import newest_resumable
from lazarus.checkpoint.files.retention import retain, sweep
from lazarus.checkpoint.files.storage import no_probe, open_storage, read_file, write_file
from lazarus.checkpoint.files.store import Tag, write_files, writer_of
from lazarus.checkpoint.testing import TAG, ToyState
from lazarus.errors import ConfigError

TOY = ToyState()


class MoodyFileSystem(MemoryFileSystem):
    """An object store that refuses the next so many requests, in words of its own."""

    protocol = "moody"
    refuses = 0

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        self._refuse()
        return super()._open(path, mode=mode, **kwargs)

    def cat_file(self, path: str, **kwargs: Any) -> bytes:
        self._refuse()
        found: bytes = super().cat_file(path, **kwargs)
        return found

    def _refuse(self) -> None:
        if type(self).refuses > 0:
            type(self).refuses -= 1
            raise RuntimeError("503 Slow Down\n  retry later")


@pytest.fixture
def moody() -> Iterator[str]:
    fsspec.register_implementation("moody", MoodyFileSystem, clobber=True)
    MoodyFileSystem.refuses = 0
    yield f"moody://{uuid.uuid4().hex}"
    MoodyFileSystem.refuses = 0


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 0x10
    path.write_bytes(data)


def test_whatever_a_backend_raises_names_the_url_and_what_was_asked(moody: str) -> None:
    storage = open_storage(moody)
    MoodyFileSystem.refuses = 2
    with pytest.raises(StorageError) as caught:
        write_file(storage, "a/b", [b"x"], kind="file")
    assert caught.value.operation == "write" and moody in caught.value.url
    assert str(caught.value).endswith("RuntimeError: 503 Slow Down retry later")
    with pytest.raises(StorageError, match=r"^read moody://"):
        read_file(storage, "a/b")
    with pytest.raises(FileNotFoundError):
        read_file(storage, "a/b")  # that it is not there is an answer


@pytest.mark.parametrize("url", ["foo://bucket/x", "gs://bucket/x"])
def test_a_protocol_that_cannot_be_spoken_is_bad_input(url: str) -> None:
    with pytest.raises(ConfigError, match=url):
        check_place(url, name="probe", patience_s=1.0)


def test_a_place_that_can_be_used_is_left_as_it_was(tmp_path: Path, moody: str) -> None:
    check_place(str(tmp_path / "ck"), name="probe", patience_s=1.0)
    assert not (tmp_path / "ck").exists()
    MoodyFileSystem.refuses = 2
    check_place(moody, name="probe", patience_s=5.0)
    assert not open_storage(moody).fs.find(open_storage(moody).root)


def test_a_folder_that_is_a_file_is_refused_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "ck").write_text("not a folder")
    with pytest.raises(ConfigError, match=str(tmp_path / "ck")):
        check_place(str(tmp_path / "ck"), name="probe", patience_s=1.0)


def test_a_share_that_cannot_be_written_whole_leaves_nothing(tmp_path: Path) -> None:
    """D9: no temporary file, no file of the share, no folder."""
    count = 0

    def full(label: str) -> None:
        nonlocal count
        count += label == "file.written"
        if count == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    records = TOY.records(10, TOY.all_experts())
    with pytest.raises(StorageError, match="No space left") as caught:
        write_files(str(tmp_path / "ck"), records, tag=TAG, probe=full)
    assert caught.value.is_full
    assert not list((tmp_path / "ck").rglob("*"))
    write_files(str(tmp_path / "ck"), records, tag=TAG, probe=no_probe)


def test_half_an_upload_is_not_an_object(moody: str) -> None:
    def broken(label: str) -> None:
        if label == "file.written":
            raise TimeoutError("connection reset")

    with pytest.raises(StorageError, match="connection reset"):
        write_files(moody, TOY.records(10, []), tag=TAG, probe=broken)
    assert not open_storage(moody).fs.find(open_storage(moody).root)


def test_a_store_that_refuses_for_a_while_is_asked_again(moody: str) -> None:
    write_file(open_storage(moody), "a", [b"x"], kind="file")
    MoodyFileSystem.refuses = 3
    waited = []
    found = patiently(
        lambda: read_file(open_storage(moody), "a"),
        for_s=20.0,
        stuck_s=20.0,
        waiting=lambda: waited.append(1),
        place=moody,
        operation="read",
    )
    assert found == b"x" and waited and MoodyFileSystem.refuses == 0


def test_a_store_that_never_answers_is_given_up() -> None:
    never = threading.Event()
    with pytest.raises(StorageError, match="no answer within"):
        patiently(never.wait, for_s=0.0, stuck_s=0.5, place="nfs", operation="write")
    never.set()


def test_what_raises_while_waiting_ends_the_wait() -> None:
    class OverError(Exception):
        pass

    def over() -> None:
        raise OverError

    never = threading.Event()
    with pytest.raises(OverError):
        patiently(never.wait, for_s=9, stuck_s=9, waiting=over, place="nfs", operation="read")
    never.set()


def saved(url: str) -> Any:
    """Three checkpoints; expert L0/E1 is saved at 100 and 200, all others at 100 alone."""
    first = TOY.save(url, 100)
    second = TOY.save(url, 200, experts=[(0, 1)], previous=first)
    return TOY.save(url, 300, experts=[], previous=second)


def test_one_flipped_bit_costs_that_expert_some_steps_and_no_checkpoint(tmp_path: Path) -> None:
    """D4: the newest checkpoint is resumed from, with an older version of one expert."""
    newest = saved(str(tmp_path))
    flip(tmp_path / newest.experts[0][1]["weights"].file)
    found = newest_resumable(str(tmp_path))
    (older,) = found.older
    assert found.manifest.step == 300 and (older.layer, older.expert) == (0, 1)
    assert (older.step, older.behind_steps) == (100, 100) and "sha256 differs" in str(older)
    read = StoredExperts(str(tmp_path), lineage=[(1, 0)], resume_step=300).read(0, 1)
    assert read.step == 100


def test_a_damaged_dense_file_falls_to_an_older_checkpoint_and_says_so(tmp_path: Path) -> None:
    """D4: dense state has no older version of its own."""
    newest = saved(str(tmp_path))
    flip(tmp_path / next(iter(newest.dense.values())).file)
    found = newest_resumable(str(tmp_path))
    assert found.manifest.step == 200 and not found.older
    assert "step 300" in found.passed_over[0]


def test_an_expert_without_any_sound_version_makes_its_checkpoints_unusable(
    tmp_path: Path,
) -> None:
    newest = saved(str(tmp_path))
    flip(tmp_path / newest.experts[1][0]["weights"].file)
    with pytest.raises(NoCheckpointError, match="step 300.*sha256 differs"):
        newest_resumable(str(tmp_path))


def test_retention_never_touches_what_other_runs_wrote(tmp_path: Path) -> None:
    """D4: what one life may still need another one does not delete."""
    url, other = str(tmp_path), Tag(job="other-1", term=1, generation=1)
    TOY.save(url, 50, tag=other)
    before = {p for p in tmp_path.rglob("*") if p.is_file()}
    for step in (100, 200, 300):
        TOY.save(url, step)
    kept = retain(url, keep=1, lives=(TAG.job,))
    assert kept.kept == (300,) and before <= {p for p in tmp_path.rglob("*") if p.is_file()}
    assert retain(url, keep=1).removed == (50,)  # who owns all of it may


def test_leftovers_of_a_dead_run_are_swept_and_nothing_else(tmp_path: Path) -> None:
    """D9: its temporary files and shares that no manifest names."""
    url, other = str(tmp_path), Tag(job="other-1", term=1, generation=1)
    TOY.save(url, 100)
    write_files(url, TOY.records(200, [(0, 0)]), tag=TAG)  # it was killed before the manifest
    write_files(url, TOY.records(300, []), tag=other)
    torn = tmp_path / f"step-00000100/L00-E000.{TAG}-ab12.safetensors.00ff.tmp"
    torn.write_bytes(b"half")
    deleted = sweep(url, runs=(TAG.job,))
    assert len(deleted) == 3 and not torn.exists() and not (tmp_path / "step-00000200").exists()
    assert list((tmp_path / "step-00000300").iterdir())
    assert newest_resumable(url).manifest.step == 100


def test_a_file_name_says_which_run_wrote_it() -> None:
    assert writer_of("L00-E001.exp-1-ab-2-13-00ff.safetensors") == "exp-1-ab"
    assert writer_of("L00-E001.w.exp-ab-2-13-00ff.safetensors.11.tmp") == "exp-ab"
    assert writer_of("dense-00001.exp-ab-full-2-13-00ff.safetensors") == "exp-ab"
    assert writer_of("README") is None and writer_of("manifest.json") is None


@pytest.mark.slow
def test_a_file_of_more_than_a_gibibyte_is_read(tmp_path: Path) -> None:
    """An expert of a large model with its moments; the file of this test is a hole."""
    size = (1 << 30) + 5
    with (tmp_path / "large").open("wb") as file:
        file.truncate(size)
    assert len(read_file(open_storage(str(tmp_path)), "large")) == size

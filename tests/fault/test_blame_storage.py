"""Storage that is full, of the wrong kind, unreachable or damaged: nothing is lost, all is said."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_runs import Event, Watched, watch

from lazarus.checkpoint.files.verify import verify
from lazarus.errors import ConfigError, StorageError
from lazarus.record.events import read_events

pytestmark = pytest.mark.timeout(240)

STEPS = 5
FINAL = ("checkpoint.full_at_end=true", "metrics.report=false", "recovery.tolerated_stall_s=2")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB, which no checkpoint of ours fits on."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    made = subprocess.run(command, capture_output=True) if os.geteuid() == 0 else None
    if made is None or made.returncode != 0:
        pytest.skip("a small disk can be mounted by root only")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("foo://bucket/run", "Protocol not known"),
        ("gs://bucket/run", "gcsfs"),
        ("/proc/lazarus", "/proc/lazarus"),
        ("http://127.0.0.1:1/x", "NotImplementedError"),
        ("reference://", "TypeError"),
        ("dir://x", "AttributeError"),
    ],
)
def test_a_place_that_cannot_be_written_to_is_refused_before_anything_starts(
    tmp_path: Path, url: str, reason: str
) -> None:
    """C5: a protocol without its package, one that nobody knows, a folder nobody can make."""
    with pytest.raises(ConfigError, match=reason) as caught:
        watch(tmp_path / "run", nodes=2, steps=STEPS, settings=(f"checkpoint.url={url}", *FINAL))
    assert url in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.slow
def test_a_final_checkpoint_that_does_not_fit_is_rescued_and_goes_on_from_there(
    tmp_path: Path, small_disk: Path
) -> None:
    """C5: every step committed, no node lost, the digest on record, the state in `rescue`."""
    folder = tmp_path / "run"
    settings = (f"checkpoint.url={small_disk}", *FINAL)
    with pytest.raises(StorageError, match="No space left on device") as caught:
        watch(folder, nodes=2, steps=STEPS, settings=settings)
    assert caught.value.exit_code == 3 and str(folder / "rescue") in str(caught.value)
    events = read_events(folder)
    end = events[-1]
    assert (end["status"], end["cause"]) == ("short", "storage") and end["state_digest"]
    assert [e["step"] for e in events if e["event"] == "step_committed"] == [1, 2, 3, 4, 5]
    assert not [e for e in events if e["event"] == "node_lost"]
    failed = [e for e in events if e["event"] == "checkpoint_failed"]
    assert failed and failed[0]["step"] == STEPS
    assert verify(str(folder / "rescue")).usable == (STEPS,)
    left = [p for p in small_disk.rglob("*") if p.is_file()]
    assert not left, "failed writes leave nothing behind"


@pytest.mark.slow
def test_a_rescued_run_is_finished_by_a_resume_once_there_is_room(
    tmp_path: Path, small_disk: Path
) -> None:
    """C5: `--resume RUN` finds the rescue, and writes the checkpoint where it belongs."""
    folder = tmp_path / "run"
    settings = (f"checkpoint.url={small_disk}", *FINAL)
    with pytest.raises(StorageError):
        watch(folder, nodes=2, steps=STEPS, settings=settings)
    digest = read_events(folder)[-1]["state_digest"]
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    again = watch(folder, nodes=2, steps=STEPS, settings=settings, resume=folder)
    assert again.status == "finished" and again.digest == digest
    assert verify(str(small_disk)).usable == (STEPS,)


@pytest.mark.slow
def test_a_disk_that_was_full_for_a_while_heals_by_itself(tmp_path: Path, small_disk: Path) -> None:
    """C5, D9: periodic checkpoints fail, training goes on, nothing is left; then they succeed."""
    left: list[Path] = []

    def make_room(watched: Watched) -> None:
        left.extend(p for p in small_disk.rglob("*") if p.is_file())
        subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)

    def failed_twice() -> object:
        seen: list[int] = []

        def due(event: Event) -> bool:
            if event["event"] == "checkpoint_failed":
                seen.append(event["step"])
            return len(set(seen)) >= 2 and event["event"] == "step_committed"

        return due

    run = watch(
        tmp_path / "run",
        nodes=2,
        steps=100_000,
        settings=(
            f"checkpoint.url={small_disk}",
            "checkpoint.every=4",
            "checkpoint.select=full",
            *FINAL,
        ),
        acts=[
            (failed_twice(), make_room),
            (lambda e: e["event"] == "checkpoint_persisted", Watched.stop),
        ],
    )
    assert run.status == "stopped" and not run.of("node_lost")
    found = verify(str(small_disk))
    assert not found.bad and not found.foreign and found.usable[-1] == run.steps[-1]


@pytest.mark.slow
def test_one_flipped_bit_in_a_shared_file_costs_that_expert_some_steps(tmp_path: Path) -> None:
    """D4: whole-state resume takes it from an older version, says so, and counts the tokens."""
    folder = tmp_path / "run"
    settings = (
        "checkpoint.every=2",
        "checkpoint.k_snapshot=2",
        "checkpoint.k_persist=2",
        "checkpoint.keep=20",
        "metrics.report=false",
    )
    stop = (lambda e: e["event"] == "checkpoint_persisted" and e["step"] >= 12, Watched.stop)
    watch(folder, nodes=2, steps=100_000, settings=settings, acts=[stop])
    url = str(folder / "checkpoints")
    newest = verify(url).usable[-1]
    from lazarus.checkpoint.files.store import load_manifest

    manifest = load_manifest(url, newest)
    older = [
        (layer, expert, versions["weights"])
        for layer, row in enumerate(manifest.experts)
        for expert, versions in enumerate(row)
        if 2 < versions["weights"].step < newest
    ]
    layer, expert, version = max(older, key=lambda item: item[2].step)
    path = Path(url) / version.file
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    again = watch(folder, nodes=2, steps=newest + 2, settings=settings, resume=folder)
    assert again.status == "finished"
    life = again.events[max(i for i, e in enumerate(again.events) if e["event"] == "run_started") :]
    (restored,) = [e for e in life if e["event"] == "expert_restored"]
    assert (restored["layer"], restored["expert"]) == (layer, expert)
    assert restored["step"] == newest and restored["lost_copies"] > 0
    assert restored["behind_steps"] > newest - version.step
    assert [e["step"] for e in life if e["event"] == "step_committed"] == [newest + 1, newest + 2]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["all", "one expert's newest file"])
def test_files_that_somebody_removed_are_replaced_by_a_full_checkpoint(
    tmp_path: Path, what: str
) -> None:
    """D9: a rule that deletes old objects; each later partial checkpoint failed until the end."""
    url = tmp_path / "run" / "checkpoints"
    removed: list[int] = []

    def remove(watched: Watched) -> None:
        removed.append(watched.handle is not None)
        if what == "all":
            shutil.rmtree(url)
            return
        from lazarus.checkpoint.files.store import find_checkpoints

        kept = find_checkpoints(str(url)).manifests
        shared = set.intersection(
            *({v.file for row in m.experts for e in row for v in e.values()} for m in kept)
        )
        (url / min(shared)).unlink()

    def persisted(count: int) -> object:
        seen: list[int] = []

        def due(event: Event) -> bool:
            if event["event"] == "checkpoint_persisted" and (count == 2 or removed):
                seen.append(event["step"])
            return len(seen) >= count

        return due

    run = watch(
        tmp_path / "run",
        nodes=2,
        steps=100_000,
        settings=("checkpoint.every=4", "checkpoint.keep=2", "metrics.report=false"),
        acts=[(persisted(2), remove), (persisted(3), Watched.stop)],
    )
    assert run.status == "stopped" and not run.of("node_lost")
    failed = [e["step"] for e in run.of("checkpoint_failed")]
    healed = [e for e in run.of("checkpoint_persisted") if failed and e["step"] > failed[0]]
    assert failed and healed and healed[0]["kind"] == "full"
    assert verify(str(url)).usable[-1] == run.of("checkpoint_persisted")[-1]["step"]

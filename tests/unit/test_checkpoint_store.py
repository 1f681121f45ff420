"""Checkpoints on storage: what is written, found, verified, refused, kept."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lazarus.checkpoint.errors import (
    DamagedError,
    IncompleteCheckpointError,
    NoCheckpointError,
    UnknownFormatError,
)
from lazarus.checkpoint.files.export import export
from lazarus.checkpoint.files.reader import CheckpointReader, StoredExperts, open_state_dict
from lazarus.checkpoint.files.retention import retain
from lazarus.checkpoint.files.storage import anchored, is_url, redacted
from lazarus.checkpoint.files.store import Tag, find_checkpoints, load_manifest
from lazarus.checkpoint.files.verify import newest_usable, verify
from lazarus.checkpoint.format.image import TensorSpec
from lazarus.checkpoint.testing import ToyState

TOY = ToyState()


@pytest.fixture(params=["folder", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "ck") if request.param == "folder" else f"memory://ck-{uuid.uuid4().hex}"


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


def corrupt(path: Path, at: int = -5) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def test_a_full_checkpoint_comes_back_bit_for_bit(url: str) -> None:
    TOY.save(url, 200)
    manifest = newest_usable(url, check="sha256")
    reader = CheckpointReader(url, manifest)
    reader.require(dense=TOY.dense_specs(), layers=TOY.layers())
    assert manifest.kind == "full"
    assert_same(reader.dense(), TOY.dense(200))
    for layer, expert in TOY.all_experts():
        assert_same(reader.expert(layer, expert), TOY.expert(layer, expert, 200))


def test_a_partial_checkpoint_points_to_older_files_for_the_rest(url: str) -> None:
    first = TOY.save(url, 200)
    second = TOY.save(url, 400, experts=[(0, 1), (1, 2)], previous=first)
    reader = CheckpointReader(url, newest_usable(url))
    assert second.kind == "partial"
    assert second.fresh_experts() == 2
    assert_same(reader.dense(), TOY.dense(400))
    for layer, expert in TOY.all_experts():
        step = 400 if (layer, expert) in {(0, 1), (1, 2)} else 200
        assert second.expert_step(layer, expert) == step
        assert_same(reader.expert(layer, expert), TOY.expert(layer, expert, step))
        assert second.experts[layer][expert]["weights"].routed == step * TOY.routed_per_step


def test_the_first_checkpoint_must_have_every_expert_and_every_tensor(url: str) -> None:
    with pytest.raises(IncompleteCheckpointError, match=r"lacks L0/E1 \(weights\)"):
        TOY.save(url, 200, experts=[(0, 0)])
    with pytest.raises(NoCheckpointError):
        newest_usable(url)


def test_a_manifest_is_not_committed_over_a_missing_file(tmp_path: Path) -> None:
    first = TOY.save(str(tmp_path), 200)
    (tmp_path / first.experts[1][3]["weights"].file).unlink()
    with pytest.raises(DamagedError, match="L01-E003.* is missing"):
        TOY.save(str(tmp_path), 400, experts=[(0, 0)], previous=first)
    with pytest.raises(NoCheckpointError):
        load_manifest(str(tmp_path), 400)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_found_named_and_the_previous_checkpoint_is_used(
    tmp_path: Path, damage: str
) -> None:
    TOY.save(str(tmp_path), 200)
    newer = TOY.save(str(tmp_path), 400)
    victim = newer.experts[0][2]["weights"].file
    path = tmp_path / victim
    if damage == "flip":
        corrupt(path)
    elif damage == "truncate":
        path.write_bytes(path.read_bytes()[:-16])
    else:
        path.unlink()
    outcome = verify(str(tmp_path))
    assert [name for name, _ in outcome.bad] == [victim]
    assert outcome.usable == (200,)
    assert newest_usable(str(tmp_path), check="sha256").step == 200
    with pytest.raises(DamagedError, match="L00-E002"):
        CheckpointReader(str(tmp_path), newer).expert(0, 2)


def test_a_restore_takes_the_next_older_version_of_a_damaged_expert(tmp_path: Path) -> None:
    url = str(tmp_path)
    first = TOY.save(url, 200)
    newer = TOY.save(url, 400, experts=[(0, 2)], previous=first)
    TOY.save(url, 600, experts=[(0, 2)], previous=newer)
    victim = newer.experts[0][2]["weights"].file
    corrupt(tmp_path / victim)
    found = StoredExperts(url, lineage=[(1, 0)], resume_step=599).read(0, 2)
    assert (found.step, found.routed) == (200, 2000)
    assert found.passed_over == (f"{victim} sha256 differs (flipped or truncated)",)
    assert_same(dict(found.tensors), TOY.expert(0, 2, 200))
    assert StoredExperts(url, lineage=[(1, 0)], resume_step=600).read(0, 2).step == 600
    with pytest.raises(NoCheckpointError, match="L0/E2 cannot be read"):
        StoredExperts(url, lineage=[(1, 0), (2, 100)], resume_step=100).read(0, 2)


def test_a_flipped_byte_in_a_manifest_is_found(tmp_path: Path) -> None:
    TOY.save(str(tmp_path), 200)
    TOY.save(str(tmp_path), 400)
    path = tmp_path / "step-00000400/manifest.json"
    path.write_text(path.read_text().replace('"routed":4000', '"routed":4001', 1))
    assert newest_usable(str(tmp_path)).step == 200
    assert verify(str(tmp_path)).bad[0][0] == "step-00000400/manifest.json"


def test_an_unknown_format_is_refused_by_number(tmp_path: Path) -> None:
    TOY.save(str(tmp_path), 200)
    path = tmp_path / "step-00000200/manifest.json"
    body = json.loads(path.read_text())
    path.write_text(json.dumps(body | {"format": 7}))
    with pytest.raises(UnknownFormatError, match="format 7, this release reads 1"):
        load_manifest(str(tmp_path), 200)
    with pytest.raises(NoCheckpointError, match="format 7"):
        newest_usable(str(tmp_path))


def test_foreign_files_are_reported_and_harm_nothing(tmp_path: Path) -> None:
    TOY.save(str(tmp_path), 200)
    (tmp_path / "step-00000300").mkdir()
    (tmp_path / "step-00000300/manifest.json").write_bytes(b"\x80\x04cos\nsystem\n")
    (tmp_path / "step-00000200/notes.txt").write_text("mine")
    (tmp_path / "step-banana").mkdir()
    outcome = verify(str(tmp_path))
    assert outcome.foreign == ("step-00000200/notes.txt", "step-banana")
    assert [name for name, _ in outcome.bad] == ["step-00000300/manifest.json"]
    assert newest_usable(str(tmp_path)).step == 200


def test_a_manifest_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    from lazarus.checkpoint.format.manifest import FileEntry
    from lazarus.checkpoint.format.manifest_text import to_text

    manifest = TOY.save(str(tmp_path), 200)
    outside = {"../secret": FileEntry(num_bytes=1, sha256="0" * 64)}
    object.__setattr__(manifest, "files", {**manifest.files, **outside})
    (tmp_path / "step-00000200/manifest.json").write_text(to_text(manifest))
    with pytest.raises(DamagedError, match="leaves the checkpoint folder"):
        load_manifest(str(tmp_path), 200)


def test_a_rolled_back_branch_is_not_usable(url: str) -> None:
    first = TOY.save(url, 200)
    TOY.save(url, 400, previous=first)
    after = Tag(job="toy", term=1, generation=2)
    TOY.save(url, 300, previous=first, tag=after, lineage=[(1, 0), (2, 200)])
    found = find_checkpoints(url)
    assert [m.step for m in found.on_lineage()] == [200, 300]
    assert newest_usable(url).step == 300
    assert found.next_generation() == 3
    assert verify(url).superseded == (400,)


def test_retention_keeps_what_the_newest_checkpoints_point_to(url: str) -> None:
    manifests = [TOY.save(url, 100)]
    for number, chosen in enumerate([[(0, 0)], [(0, 1)], [(1, 0)]], start=2):
        manifests.append(TOY.save(url, 100 * number, experts=chosen, previous=manifests[-1]))
    kept = retain(url, keep=2)
    assert kept.kept == (300, 400)
    assert verify(url).bad == ()
    assert newest_usable(url, check="sha256").step == 400
    assert manifests[0].experts[0][0]["weights"].file in kept.deleted_files
    assert manifests[1].experts[0][0]["weights"].file not in kept.deleted_files
    reader = CheckpointReader(url, load_manifest(url, 400))
    assert_same(reader.expert(1, 3), TOY.expert(1, 3, 100))


def test_retention_counts_usable_checkpoints_only(tmp_path: Path) -> None:
    url = str(tmp_path)
    TOY.save(url, 100)
    newer = TOY.save(url, 200)
    (tmp_path / newer.experts[0][0]["weights"].file).unlink()
    assert retain(url, keep=1).kept == (100,)
    assert newest_usable(url, check="sha256").step == 100


def test_retention_clears_what_a_killed_writer_left(tmp_path: Path) -> None:
    url = str(tmp_path)
    TOY.save(url, 100)
    left = tmp_path / "step-00000100/L00-E000.old-1-0.safetensors.99.tmp"
    left.write_bytes(b"half")
    note = tmp_path / "step-00000100/README"
    note.write_text("a user's note")
    TOY.save(url, 200)
    retain(url, keep=1)
    assert not left.exists()
    assert note.exists()


def test_weights_and_moments_may_have_versions_of_their_own(url: str) -> None:
    from lazarus.checkpoint.files.store import RecordKey, commit_manifest, write_files
    from lazarus.checkpoint.files.tensors import record_of
    from lazarus.checkpoint.testing import TAG

    first = TOY.save(url, 200)
    weights = {n: t for n, t in TOY.expert(0, 1, 400).items() if n.startswith("model.")}
    key = RecordKey(layer=0, expert=1, step=400, generation=1, parts=("weights",))
    records = [*TOY.records(400, []), record_of(key, weights, tag=TAG)]
    names = [s.name for s in TOY.dense_specs()]
    second = commit_manifest(
        url,
        write_files(url, records, tag=TAG),
        tag=TAG,
        step=400,
        layers=TOY.layers(),
        dense_names=names,
        lineage=[(1, 0)],
        meta={},
        previous=first,
    )
    got = CheckpointReader(url, second).expert(0, 1)
    moments = {n: t for n, t in TOY.expert(0, 1, 200).items() if not n.startswith("model.")}
    assert_same(got, weights | moments)
    assert second.expert_step(0, 1) == 200


def test_a_resume_names_what_the_checkpoint_lacks(url: str) -> None:
    reader = CheckpointReader(url, TOY.save(url, 200))
    wanted = TensorSpec(name="model.head.weight", dtype="F32", shape=(3,))
    with pytest.raises(IncompleteCheckpointError, match=r"lacks tensor model\.head\.weight"):
        reader.require(dense=[*TOY.dense_specs(), wanted], layers=TOY.layers())
    with pytest.raises(IncompleteCheckpointError, match="L1/E4"):
        reader.require(dense=TOY.dense_specs(), layers=ToyState(num_experts=5).layers())


def test_the_state_dict_is_lazy_and_exports_to_one_plain_file(tmp_path: Path) -> None:
    url = str(tmp_path / "ck")
    first = TOY.save(url, 200)
    TOY.save(url, 400, experts=[(0, 1)], previous=first)
    state = open_state_dict(url)
    assert "blocks.0.moe.experts.1.w" in state
    assert not [n for n in state if n.startswith("optimizer")]
    target = str(tmp_path / "out/model.safetensors")
    manifest, num_bytes = export(url, target, layout="experts")
    plain = load_file(str(tmp_path / "out/model.safetensors"))
    assert manifest.step == 400
    assert (tmp_path / "out/model.safetensors").stat().st_size == num_bytes
    assert_same(plain, {name: state[name] for name in state})
    want = TOY.expert(0, 1, 400)["model.blocks.0.moe.experts.1.w"]
    assert torch.equal(plain["blocks.0.moe.experts.1.w"], want)


def test_secrets_in_a_url_are_not_shown() -> None:
    assert redacted("s3://key:secret@bucket/run?token=x") == "s3://bucket/run"
    assert redacted("/runs/a") == "/runs/a"


def test_a_full_checkpoint_is_not_replaced_by_a_late_partial_one_of_its_step(url: str) -> None:
    first = TOY.save(url, 200)
    full = TOY.save(url, 400)
    assert TOY.save(url, 400, experts=[(0, 0)], previous=first) == full
    assert newest_usable(url, check="sha256").kind == "full"


def test_a_full_checkpoint_of_the_same_step_replaces_a_partial_one(url: str) -> None:
    first = TOY.save(url, 200)
    TOY.save(url, 400, experts=[(0, 0)], previous=first)
    TOY.save(url, 400)
    assert newest_usable(url, check="sha256").kind == "full"


def test_retention_leaves_files_that_may_belong_to_a_checkpoint_in_the_making(url: str) -> None:
    from lazarus.checkpoint.files.store import write_files
    from lazarus.checkpoint.testing import TAG

    TOY.save(url, 200)
    files = write_files(url, TOY.records(200, [(0, 0)]), tag=TAG)
    assert set(retain(url, keep=1).deleted_files).isdisjoint(f.path for f in files)
    assert {f.path for f in files} <= set(verify(url).foreign)


ODD_NAMES = (
    "exp::3",
    "exp::4",
    "a?b=c",
    "a#b",
    "a%20b",
    "a b",
    "c:foo",
    "file:x",
    "~me",
    "[x]*",
    "zip::y",
    "end ",
)


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_local_path_is_taken_letter_by_letter(tmp_path: Path, scheme: str) -> None:
    """D7: each of these folders keeps its own checkpoints; no folder of another name is made."""
    for number, name in enumerate(ODD_NAMES):
        TOY.save(f"{scheme}{tmp_path / name}", 100 + number)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(ODD_NAMES)
    for number, name in enumerate(ODD_NAMES):
        url = f"{scheme}{tmp_path / name}"
        assert [m.step for m in find_checkpoints(url).manifests] == [100 + number]
        assert newest_usable(url, check="sha256").step == 100 + number
        assert redacted(str(tmp_path / name)) == str(tmp_path / name)


@pytest.mark.parametrize("name", ["c:foo", "exp::3", "a/../b#1", "~/x", "./d/", "d?x=1"])
def test_a_relative_path_is_below_the_folder_that_one_works_in(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D7: also with a tilde, with dots and with a slash at the end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    TOY.save(name, 7)
    place = Path(name).expanduser().absolute()
    assert anchored(name) == str(place)
    assert (place / "step-00000007/manifest.json").is_file()
    monkeypatch.chdir("/")
    assert newest_usable(str(place)).step == 7


@pytest.mark.parametrize(
    ("place", "url"),
    [
        ("s3://bucket/x", True),
        ("simplecache::s3://bucket/x", True),
        ("c://x", False),
        ("x::y", False),
        ("/x/s3://y", False),
    ],
)
def test_a_url_has_a_scheme_and_two_slashes(place: str, *, url: bool) -> None:
    assert is_url(place) is url


def test_of_a_large_file_one_tensor_is_read_and_the_whole_file_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lazarus.checkpoint.files.reader._WHOLE_BYTES", 0)
    url = str(tmp_path)
    manifest = TOY.save(url, 200)
    expected = {name.removeprefix("model."): t for name, t in TOY.dense(200).items()}
    state = open_state_dict(url)
    assert torch.equal(state["embed.weight"], expected["embed.weight"])
    own = TOY.expert(1, 2, 200)["model.blocks.1.moe.experts.2.w"]
    assert torch.equal(state["blocks.1.moe.experts.2.w"], own)
    path = tmp_path / manifest.dense["model.embed.weight"].file
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedError, match="sha256 differs"):
        open_state_dict(url)["embed.weight"]

"""``lazarus checkpoint``: exit codes, names of bad files, JSON, a plain model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lazarus.checkpoint.files.store import RecordKey, commit_manifest, write_files
from lazarus.checkpoint.files.tensors import record_of, specs_of
from lazarus.checkpoint.format.image import TensorSpec
from lazarus.checkpoint.format.manifest import LayerEntry
from lazarus.checkpoint.testing import TAG, ToyState
from lazarus.cli import main
from lazarus.model.moe import MoELayer

TOY = ToyState()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    url = str(tmp_path / "run/checkpoints")
    first = TOY.save(url, 200)
    TOY.save(url, 400, experts=[(0, 1), (1, 2)], previous=first)
    return tmp_path / "run"


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main(["checkpoint", *arguments])
    return code, capsys.readouterr().out


def test_list_shows_versions_and_the_oldest_expert(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = answer(capsys, "list", str(run_dir))
    assert code == 0
    head, first, second = out.splitlines()
    assert head.split()[:2] == ["STEP", "KIND"]
    assert first.split()[:3] == ["200", "full", "8/8"]
    assert second.split()[:3] == ["400", "partial", "2/8"]
    assert "L0/E0 from step 200" in second
    code, out = answer(capsys, "list", str(run_dir), "--experts")
    assert "L1/E2   400        0" in out


def test_list_as_json_is_one_object(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = answer(capsys, "list", str(run_dir), "--json")
    content = json.loads(out)
    assert code == 0
    assert content["schema"] == 1
    assert content["checkpoints"][1]["versions"] == [[200, 400, 200, 200], [200, 200, 400, 200]]
    assert content["checkpoints"][1]["complete"]


def test_verify_is_silent_about_nothing(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = answer(capsys, "verify", str(run_dir))
    assert (code, out.startswith("ok: 2 checkpoints, 12 files")) == (0, True)
    victim = next((run_dir / "checkpoints/step-00000400").glob("L00-E001*"))
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    code, out = answer(capsys, "verify", str(run_dir))
    assert code == 1
    assert f"bad: step-00000400/{victim.name} sha256 differs" in out
    assert "newest usable checkpoint: step 200" in out
    code, out = answer(capsys, "verify", str(run_dir), "--json")
    assert code == 1
    assert json.loads(out)["bad"][0]["file"].endswith(victim.name)


def test_a_place_that_is_none_is_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoint", "list", str(tmp_path / "nowhere")]) == 2
    assert "is no folder and no URL" in capsys.readouterr().err
    assert main(["checkpoint", "verify", str(tmp_path)]) == 1
    assert main(["checkpoint", "export", str(tmp_path), "--out", str(tmp_path / "x")]) == 1
    assert "no usable checkpoint" in capsys.readouterr().err


def test_the_url_of_the_resolved_configuration_is_followed(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.toml").write_text(f'[checkpoint]\nurl = "{run_dir}/checkpoints"\n')
    code, out = answer(capsys, "verify", str(tmp_path / "other"))
    assert (code, out[:3]) == (0, "ok:")


def test_export_refuses_to_overwrite(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "m.safetensors")
    assert main(["checkpoint", "export", str(run_dir), "--out", out, "--layout", "experts"]) == 0
    assert main(["checkpoint", "export", str(run_dir), "--out", out]) == 2
    assert "exists" in capsys.readouterr().err


def test_the_exported_model_loads_without_lazarus_and_computes_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 8),
        MoELayer(dim=8, hidden=6, num_experts=3, top_k=2, activation="swiglu"),
    )
    url = str(tmp_path / "ck")
    save_model(model, url)
    out = tmp_path / "m.safetensors"
    assert main(["checkpoint", "export", url, "--out", str(out)]) == 0
    torch.manual_seed(1)
    other = torch.nn.Sequential(
        torch.nn.Linear(8, 8),
        MoELayer(dim=8, hidden=6, num_experts=3, top_k=2, activation="swiglu"),
    )
    other.load_state_dict(load_file(str(out)), strict=True)
    x = torch.randn(2, 5, 8)
    assert torch.equal(other(x), model(x))


def save_model(model: torch.nn.Module, url: str) -> None:
    """A full checkpoint of a model with one MoE layer named ``1``, without optimizer state."""
    bank = model[1].experts  # type: ignore[index]
    dense = {f"model.{n}": t for n, t in model.state_dict().items() if n != "1.experts.weight"}

    def expert(e: int) -> dict[str, Tensor]:
        row = bank.weight.detach()[e]
        return {f"model.1.experts.{e}.{f}": v for f, v in bank.field_views(row).items()}

    general = [
        TensorSpec(name=s.name.replace(".experts.0.", ".experts.{e}."), dtype="F32", shape=s.shape)
        for s in specs_of(expert(0))
    ]
    layer = LayerEntry(path="1", num_experts=3, tensors={"weights": tuple(general)})
    records = [record_of(RecordKey(layer=-1, expert=0, step=5, generation=1), dense, tag=TAG)]
    for e in range(3):
        key = RecordKey(layer=0, expert=e, step=5, generation=1)
        records.append(record_of(key, expert(e), tag=TAG))
    commit_manifest(
        url,
        write_files(url, records, tag=TAG),
        tag=TAG,
        step=5,
        layers=[layer],
        dense_names=sorted(dense),
        lineage=[(1, 0)],
        meta={},
        previous=None,
    )

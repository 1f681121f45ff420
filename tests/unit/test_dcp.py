"""Models as folders of ``torch.distributed.checkpoint``: out of a run, and into one."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hf_saved import contents, model_of, save_run, save_source
from safetensors.torch import load_file

from lazarus.checkpoint.errors import DamagedError
from lazarus.checkpoint.files.dcp import DcpState, write_dcp
from lazarus.checkpoint.files.export import StackedState
from lazarus.checkpoint.files.reader import open_state_dict
from lazarus.checkpoint.testing import ToyState
from lazarus.cli import main

pytestmark = pytest.mark.filterwarnings("ignore:.*single process.*:UserWarning")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    ToyState().save(str(tmp_path / "run"), 3)
    return tmp_path / "run"


def test_torch_loads_an_export_into_the_state_dict_of_the_model(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["checkpoint", "export", str(run), "--layout", "dcp", "--out", str(out)]) == 0
    stored = StackedState(open_state_dict(str(run)))
    loaded = {name: torch.full_like(tensor, torch.nan) for name, tensor in stored.items()}
    assert "blocks.0.moe.experts.weight" in loaded
    dcp.load(loaded, checkpoint_id=out)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in stored.items())


def test_what_torch_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    state = {
        "a.weight": torch.randn(5, 3),
        "a.half": torch.randn(4).to(torch.bfloat16),
        "count": torch.tensor(7),
        "none": torch.empty(0, 3),
    }
    dcp.save(dict(state), checkpoint_id=tmp_path / "in")
    back = DcpState(tmp_path / "in")
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert back.spec(name).shape == tuple(tensor.shape)
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)


def test_of_a_whole_training_state_the_model_is_taken(run: Path, tmp_path: Path) -> None:
    model = dict(open_state_dict(str(run)))
    whole = {
        "model": model,
        "optimizer": {"state": {"embed.weight": {"exp_avg": torch.ones(3)}}},
        "train_state": {"step": torch.tensor(4)},
        "lr_scheduler": {"last_epoch": 4},
    }
    dcp.save(whole, checkpoint_id=tmp_path / "in")
    out = tmp_path / "model.safetensors"
    assert main(["checkpoint", "import", str(tmp_path / "in"), "--out", str(out)]) == 0
    loaded = load_file(out)
    assert loaded.keys() == model.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.items())


def test_a_transformers_model_goes_out_by_its_own_names_and_comes_back(tmp_path: Path) -> None:
    trained = model_of("Qwen3Moe", seed=1)
    like = str(save_source(model_of("Qwen3Moe"), tmp_path / "source"))
    save_run(trained, str(tmp_path / "run"))
    out, back = str(tmp_path / "dcp"), str(tmp_path / "hf")
    asked = ["--layout", "dcp", "--like", like, "--out", out]
    assert main(["checkpoint", "export", str(tmp_path / "run"), *asked]) == 0
    model = model_of("Qwen3Moe", seed=2)
    state = model.state_dict()  # tied weights have both names in it
    dcp.load(state, checkpoint_id=out)
    assert all(torch.equal(state[n], t) for n, t in trained.state_dict().items())
    assert main(["checkpoint", "import", out, "--like", like, "--out", back]) == 0
    wanted = contents(save_source(trained, tmp_path / "wanted"))
    returned = contents(tmp_path / "hf")
    assert returned.keys() == wanted.keys()
    assert all(torch.equal(returned[key], wanted[key]) for key in wanted)


def test_one_tensor_at_a_time_is_read(tmp_path: Path) -> None:
    class Watched(dict[str, torch.Tensor]):
        alive = 0
        most = 0

        def spec(self, name: str) -> Any:
            from lazarus.checkpoint.files.tensors import specs_of

            return specs_of({name: torch.zeros(1000)})[0]

        def __getitem__(self, name: str) -> torch.Tensor:
            import weakref

            tensor = torch.full((1000,), float(len(name)))
            self.alive += 1
            self.most = max(self.most, self.alive)
            weakref.finalize(tensor.untyped_storage(), self._gone)
            return tensor

        def _gone(self) -> None:
            self.alive -= 1

    state = Watched({f"t{i}": torch.zeros(0) for i in range(20)})
    assert write_dcp(state, tmp_path / "out") == 20 * 4000
    assert state.most <= 2
    assert len(DcpState(tmp_path / "out")) == 20


def test_code_in_the_metadata_is_refused_and_not_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (ran,)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(DamagedError, match="is no part of a checkpoint's metadata"):
        DcpState(tmp_path)
    assert not ran.exists()


def test_mistakes_are_told_in_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    (tmp_path / "empty").mkdir()
    mistakes = {
        "it is no DCP checkpoint": ["import", str(tmp_path / "empty"), "--out", out],
        "writes a folder": ["export", str(run), "--layout", "dcp"],
        "to a local folder": ["export", str(run), "--layout", "dcp", "--out", "s3://b/x"],
        "--max-shard goes with": [
            *["export", str(run), "--layout", "dcp", "--out", out],
            *["--max-shard", "1GB"],
        ],
    }
    for words, arguments in mistakes.items():
        assert main(["checkpoint", *arguments]) == 2, words
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1

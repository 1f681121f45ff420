"""Every family of transformers that can be built small computes the same on Lazarus' experts."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hf_families import NOT_BUILT, assert_same, families, inputs_of, saved, small_batch, small_model
from hf_saved import contents, save_run, save_source

from lazarus.checkpoint.files.reader import open_state_dict
from lazarus.hf import adopt, load
from lazarus.hf.saving import save_pretrained

pytestmark = [pytest.mark.slow]
BUILT = [name for name in families() if name not in NOT_BUILT]


def test_most_families_are_compared() -> None:
    assert len(BUILT) >= 60


@pytest.mark.parametrize("family", BUILT)
def test_logits_and_gradients_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    own, tokens = small_model(family), small_batch()
    extra = inputs_of(family, tokens)
    assert_same(own, adopt(copy.deepcopy(own)), tokens, **extra)
    assert_same(own, load(saved(own, tmp_path)), tokens, **extra)


@pytest.mark.parametrize("family", BUILT)
def test_an_export_is_what_transformers_would_have_saved(family: str, tmp_path: Path) -> None:
    model = small_model(family)
    save_source(model, tmp_path / "source")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.125)
    save_run(model, str(tmp_path / "run"))
    wanted = contents(save_source(model, tmp_path / "wanted"))
    state = open_state_dict(str(tmp_path / "run"))
    save_pretrained(state, like=tmp_path / "source", out=tmp_path / "out")
    exported, source = contents(tmp_path / "out"), contents(tmp_path / "source")
    assert exported.keys() == source.keys()
    for key, tensor in source.items():
        assert (exported[key].dtype, exported[key].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(exported[key], wanted[key]), key
    _, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info

"""Every family of transformers that can be built small computes the same on Lazarus' experts."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from hf_families import NOT_BUILT, assert_same, families, inputs_of, saved, small_batch, small_model

from lazarus.hf import adopt, load

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

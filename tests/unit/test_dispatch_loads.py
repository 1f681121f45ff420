"""Where the dispatcher benchmark sends tokens: as a trace says, and no token twice to an expert."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, with a trace of 3 layers of 32 experts, the hottest with most of all copies."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    found = importlib.import_module("dispatch_loads")
    load = np.random.default_rng(0).integers(0, 50, size=(found.TRACE_AT + 1, 3, 32))
    load[:, :, 9] = 1200
    monkeypatch.setattr(found, "_trace", lambda: load)
    return found


@pytest.mark.parametrize("experts", [8, 16])
@pytest.mark.parametrize("top_k", [1, 2])
def test_experts_are_chosen_as_often_as_the_trace_says(
    loads: ModuleType, experts: int, top_k: int
) -> None:
    setting = loads.Setting(4, experts, top_k, 2, batch=32, trace=True)
    for layer in range(2):
        chosen = loads.choices(setting, rank=0, layer=layer)
        assert chosen.shape == (32 * loads.SEQ, top_k)
        if top_k == 2:
            assert (chosen[:, 0] != chosen[:, 1]).all()
        found = torch.bincount(chosen.flatten(), minlength=experts).numpy() / len(chosen)
        wanted = loads.recorded_load(setting, layer, loads.TRACE_AT).astype(float)
        hot = wanted.argmax()
        if top_k == 1:
            np.testing.assert_allclose(found, wanted / wanted.sum(), atol=0.03)
        else:  # more than one copy a token cannot be: all tokens, and the others in proportion
            assert found[hot] == 1.0
            others = np.delete(wanted, hot)
            np.testing.assert_allclose(np.delete(found, hot), others / others.sum(), atol=0.03)


def test_what_a_run_would_plan_from_is_the_record_before(loads: ModuleType) -> None:
    setting = loads.Setting(4, 16, 1, 2, trace=True)
    before = loads.recorded_load(setting, 1, loads.TRACE_AT - 1)
    assert loads.loads_before(setting, layer=1).tolist() == before.tolist()


def test_forced_routing_is_the_same_for_all_who_ask(loads: ModuleType) -> None:
    for more in ({}, {"zipf": True}, {"hot": True}, {"trace": True}):
        setting = loads.Setting(4, 8, 2, 2, **more)
        one, two = (loads.choices(setting, rank=3, layer=1) for _ in range(2))
        assert torch.equal(one, two) and not (one[:, 0] == one[:, 1]).any()

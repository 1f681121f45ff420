"""A stranger's policy that cannot be called is refused before anything starts, by name."""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from typing import Any

import pytest

from lazarus.checkpoint.policy import RecoveryPolicy
from lazarus.cli import main
from lazarus.config import TrainConfig
from lazarus.control_config import control_config
from lazarus.errors import ConfigError
from lazarus.policy_paths import imported_policy
from placement import PlacementPolicy, PlacementRequest, Plan, replan


class WithoutArguments:
    def __call__(self) -> None: ...


class WantsArguments:
    def __init__(self, weight: float) -> None: ...


def positional(request: PlacementRequest, previous: Plan | None) -> None: ...


def takes_all(*given: Any, **named: Any) -> str:
    return "here and there"


def fails(request: PlacementRequest, *, previous: Plan | None, lost: frozenset[int]) -> Plan:
    raise ZeroDivisionError("nobody thought of this")


def recovers(losses: Sequence[Any], view: Any, *, now_s: float) -> None: ...


THING = 3
WRONG = (
    ("Nobody", "cannot be imported"),
    ("THING", "is a int, which cannot be called"),
    ("WithoutArguments", "takes ()"),
    ("WantsArguments", "cannot be made"),
    ("positional", "unexpected keyword argument 'lost'"),
    ("recovers", "takes (losses"),
)


@pytest.fixture(autouse=True)
def module(monkeypatch: pytest.MonkeyPatch) -> None:
    found = types.ModuleType("strange")
    found.__dict__.update(globals())
    monkeypatch.setitem(sys.modules, "strange", found)


@pytest.mark.parametrize(("name", "said"), WRONG)
def test_simulate_names_the_policy_and_what_it_must_offer(
    name: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--shape", "gpt-s", "--nodes", "8", "--hours", "1"]
    assert main(["simulate", *options, "--policies", f"strange:{name}"]) == 2
    error = capsys.readouterr().err
    assert f'--policies = "strange:{name}"' in error and said in error
    assert "called with (request, *, previous, lost)" in error or "cannot be" in error


@pytest.mark.parametrize("name", ["fails", "takes_all"])
def test_simulate_stops_where_an_answer_cannot_be_used(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--shape", "gpt-s", "--nodes", "8", "--hours", "1"]
    assert main(["simulate", *options, "--policies", f"strange:{name}"]) == 2
    error = capsys.readouterr().err
    assert f"strange:{name} for 8 nodes" in error and "library's plan instead" in error


@pytest.mark.parametrize(("name", "said"), WRONG)
def test_a_live_run_refuses_it_before_it_starts(name: str, said: str) -> None:
    config = TrainConfig.load(overrides=[f"placement.policy=strange:{name}"])
    with pytest.raises(ConfigError, match="placement.policy") as problem:
        control_config(config, placement=None, recovery=None, ranks_per_node=1)
    assert said in str(problem.value)


def test_an_object_is_checked_as_a_path_is() -> None:
    config = TrainConfig.load()
    with pytest.raises(ConfigError, match="is called with"):
        control_config(config, placement=positional, recovery=None, ranks_per_node=1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="is called with"):
        control_config(config, placement=replan, recovery=fails, ranks_per_node=1)  # type: ignore[arg-type]


def test_what_can_be_called_is_given_back() -> None:
    like: type = PlacementPolicy
    assert imported_policy("placement:replan", key="k", like=like) is replan
    assert imported_policy("strange:recovers", key="k", like=RecoveryPolicy) is recovers

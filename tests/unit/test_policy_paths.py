"""A stranger's policy that cannot be called is refused before anything starts, by name."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lazarus.checkpoint.restoring.policy import RecoveryPolicy
from lazarus.cli import main
from lazarus.config.train_config import TrainConfig
from lazarus.errors import ConfigError
from lazarus.policy.checked import CheckedPlacement, CheckedRecovery
from lazarus.policy.named import PLACEMENTS, RECOVERIES, imported_policy
from lazarus.run.control_config import policies_of
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
        policies_of(config, placement=None, recovery=None)
    assert said in str(problem.value)


def test_an_object_is_checked_as_a_path_is() -> None:
    config = TrainConfig.load()
    with pytest.raises(ConfigError, match="is called with"):
        policies_of(config, placement=positional, recovery=None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="is called with"):
        policies_of(config, placement=replan, recovery=fails)  # type: ignore[arg-type]


def test_what_can_be_called_is_given_back() -> None:
    like: type = PlacementPolicy
    assert imported_policy("placement:replan", key="k", group=PLACEMENTS, like=like) is replan
    found = imported_policy("strange:recovers", key="k", group=RECOVERIES, like=RecoveryPolicy)
    assert found is recovers


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package beside ours that offers policies under names."""
    about = tmp_path / "strange-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: strange\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[lazarus.placement]\nmine = placement:replan\ngone = strange:Nobody\n"
        "[lazarus.recovery]\nmy-copy = strange:recovers\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("installed")
def test_an_installed_package_offers_policies_by_name() -> None:
    config = TrainConfig.load(overrides=["placement.policy=mine", "recovery.policy=my-copy"])
    found = policies_of(config, placement=None, recovery=None)
    assert isinstance(found.placement, CheckedPlacement)
    assert isinstance(found.recovery, CheckedRecovery)
    like: type = PlacementPolicy
    assert imported_policy("mine", key="k", group=PLACEMENTS, like=like) is replan


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("yours", "no installed package offers 'yours' in the entry points lazarus.placement"),
        ("yours", "(there: gone, mine); or give package.module:Name"),
        ("my-copy", "no installed package offers 'my-copy'"),
        ("gone", "has no attribute 'Nobody'"),
    ],
)
def test_a_name_that_nobody_offers_is_refused_with_those_there_are(name: str, said: str) -> None:
    config = TrainConfig.load(overrides=[f"placement.policy={name}"])
    with pytest.raises(ConfigError) as problem:
        policies_of(config, placement=None, recovery=None)
    assert said in str(problem.value)


@pytest.mark.usefixtures("installed")
def test_the_simulator_takes_the_same_names(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["simulate", "--nodes", "4", "--hours", "0.1", "--json"]
    assert main([*small, "--policies", "mine,lazarus", "--recovery", "my-copy"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["policy"] for row in rows] == ["mine+my-copy", "lazarus+my-copy"]
    assert rows[0]["goodput_tokens_per_s"] == rows[1]["goodput_tokens_per_s"]
    assert main([*small, "--policies", "yours"]) == 2
    assert "known: lazarus" in (said := capsys.readouterr().err) and "mine" in said

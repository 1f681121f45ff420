"""A real run's checkpoint goes on elsewhere: other node counts, other folders, without Lazarus."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fault_runs import Watched, watch
from safetensors.torch import load_file

from lazarus import ElasticTrainer, TrainConfig
from lazarus.checkpoint.files.verify import newest_usable
from lazarus.cli import main
from lazarus.errors import ConfigError
from lazarus.record.events import read_events
from lazarus.runtime.training import defaults

STILL = ("optim.schedule=constant", "optim.warmup_steps=0")


@dataclass(frozen=True)
class Ended:
    """A run that was stopped once checkpoints stood at a URL; the last one is full."""

    url: str
    step: int
    config: TrainConfig


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Three nodes, checkpoints at a file:// URL."""
    folder = tmp_path_factory.mktemp("first")
    url = f"file://{tmp_path_factory.mktemp('storage')}/ckpt"
    settings = (*STILL, "checkpoint.full_at_end=true", "checkpoint.every=2")
    watched = watch(
        folder,
        nodes=3,
        steps=100_000,
        settings=(*settings, f"checkpoint.url={url}", "metrics.report=false"),
        acts=[(lambda e: e["event"] == "checkpoint_persisted", Watched.stop)],
    )
    config = TrainConfig.load(folder / "config.toml")
    return Ended(url=url, step=watched.steps[-1], config=config)


@pytest.fixture(scope="module")
def whole(run: Any, first: Ended) -> Any:
    return run(nodes=3, steps=first.step + 4, settings=STILL)


def go_on(small: Any, folder: Path, first: Ended, *, nodes: int, settings: Any = ()) -> Any:
    config = TrainConfig.load(
        overrides=[
            *small,
            *STILL,
            f"cluster.nodes={nodes}",
            f"train.steps={first.step + 4}",
            f"run.dir={folder}",
            *settings,
        ]
    )
    ElasticTrainer(config).fit(resume=first.url)
    return read_events(folder / "events.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [2, 5])
def test_a_run_goes_on_from_a_url_on_other_nodes(
    run: Any, first: Ended, whole: Any, tmp_path: Path, nodes: int
) -> None:
    events = go_on(run.small, tmp_path, first, nodes=nodes)
    losses = {e["step"]: e["loss"] for e in events if e["event"] == "step_committed"}
    assert list(losses) == [first.step + i for i in (1, 2, 3, 4)]
    for step, loss in losses.items():
        assert loss == pytest.approx(whole.losses[step], rel=1e-4)


@pytest.mark.slow
def test_with_a_storage_of_its_own_the_first_checkpoint_there_holds_every_expert(
    run: Any, first: Ended, tmp_path: Path
) -> None:
    settings = ("checkpoint.every=2", "checkpoint.k_persist=1", "checkpoint.k_snapshot=2")
    events = go_on(run.small, tmp_path, first, nodes=3, settings=settings)
    persisted = [e for e in events if e["event"] == "checkpoint_persisted"]
    assert persisted[0]["kind"] == "full"
    assert newest_usable(str(tmp_path / "checkpoints")).missing() == ()


@pytest.mark.slow
def test_an_expert_lost_before_its_first_own_checkpoint_comes_from_where_the_run_began(
    run: Any, first: Ended, tmp_path: Path
) -> None:
    config = TrainConfig.load(
        overrides=[
            *run.small,
            *STILL,
            "cluster.nodes=4",
            f"train.steps={first.step + 6}",
            "placement.slots_per_node=3",
            "checkpoint.every=100000",
            f"run.dir={tmp_path}",
        ]
    )
    ElasticTrainer(config, faults=(f"kill:0@{first.step + 3}", f"kill:1@{first.step + 3}")).fit(
        resume=first.url
    )
    events = read_events(tmp_path / "events.jsonl")
    restored = [e for e in events if e["event"] == "expert_restored"]
    assert restored
    assert {(e["source"], e["step"] - e["behind_steps"]) for e in restored} == {
        ("storage", first.step)
    }


@pytest.mark.slow
def test_the_commands_read_a_real_runs_storage(
    first: Ended, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = first.url
    assert main(["checkpoint", "verify", url]) == 0
    capsys.readouterr()
    assert main(["checkpoint", "list", url, "--json"]) == 0
    assert str(first.step) in capsys.readouterr().out
    out = tmp_path / "model.safetensors"
    assert main(["checkpoint", "export", url, "--out", str(out)]) == 0
    model = defaults.model(first.config)
    model.load_state_dict(load_file(out))


@pytest.mark.slow
@pytest.mark.parametrize("part", ["dense", "expert"])
def test_a_flipped_byte_in_the_newest_checkpoint_is_found_before_a_resume(
    run: Any, first: Ended, tmp_path: Path, part: str
) -> None:
    """Damaged dense state costs the newest checkpoint, a damaged expert that expert's newest steps.

    Without an older checkpoint the run does not begin, and the error names the file.
    """
    url = first.url
    folder = Path(url.removeprefix("file://"))
    newest = newest_usable(url)
    own = f"step-{first.step:08d}"
    dense = {entry.file for entry in newest.dense.values()}
    victim = next(
        folder / path
        for path in newest.files
        if path.startswith(own) and (path in dense) == (part == "dense")
    )
    before = victim.read_bytes()
    try:
        victim.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        events = go_on(run.small, tmp_path / "a", first, nodes=3)
        (started,) = [e for e in events if e["event"] == "run_started"]
        assert (started["start_step"] == first.step) == (part == "expert")
        restored = [e for e in events if e["event"] == "expert_restored"]
        assert bool(restored) == (part == "expert")
        assert all(e["behind_steps"] > 0 for e in restored)
        for manifest in folder.glob("step-*/manifest.json"):
            if own not in str(manifest):
                manifest.rename(manifest.with_suffix(".away"))
        with pytest.raises(ConfigError, match=victim.name):
            go_on(run.small, tmp_path / "b", first, nodes=3)
    finally:
        victim.write_bytes(before)
        for manifest in folder.glob("step-*/manifest.away"):
            manifest.rename(manifest.with_suffix(".json"))

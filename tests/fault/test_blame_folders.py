"""A run's folder: whose it is, what goes on in it, what is refused before a byte is written."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from command_runs import PATIENCE_S, Shell, last_step, steps_of, wait_for
from fault_runs import SMALL, watch

from lazarus import ElasticTrainer, TrainConfig
from lazarus.checkpoint.files.verify import newest_usable
from lazarus.checkpoint.format.manifest_text import from_text, to_text
from lazarus.errors import ConfigError
from lazarus.record.ownership import owner_of

FULL = ("checkpoint.full_at_end=true", "checkpoint.every=1000", "metrics.report=false")
LONG = ("--nodes", "2", "--steps", "100000")


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def said_errors(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("error")]


@pytest.mark.slow
@pytest.mark.timeout(600)  # several commands, one after the other
def test_auto_goes_on_with_the_newest_run_of_the_name(shell: Shell) -> None:
    """D5: the default folder and Ctrl-C; then the same folder and the next step."""
    other = shell.interrupted(*LONG, step=2, settings=(*FULL, "run.name=other"))
    folder = shell.interrupted(*LONG, step=5, settings=FULL)
    stopped = last_step(folder)
    code, said = shell.train(
        "--nodes", "2", "--steps", str(stopped + 3), "--resume", "auto", settings=FULL
    )
    assert code == 0, said
    assert f"going on from step {stopped}" in said
    assert steps_of(folder) == list(range(1, stopped + 4))
    assert shell.runs() == sorted([other, folder])
    code, said = shell.train(
        "--nodes", "2", "--steps", str(stopped + 3), "--resume", "auto", settings=FULL
    )
    assert code == 2
    assert "nothing is left to do" in said
    assert owner_of(folder) is None


@pytest.mark.slow
@pytest.mark.timeout(600)  # several commands, one after the other
def test_auto_begins_only_where_nothing_of_the_name_has_a_checkpoint(shell: Shell) -> None:
    """D5: a first start begins and says so; checkpoints that are unusable are not passed over."""
    code, said = shell.train(
        "--nodes", "2", "--steps", "3", "--resume", "auto",
        settings=(*FULL, "checkpoint.every=1", "checkpoint.select=full"),
    )  # fmt: skip
    assert code == 0, said
    assert "no run named lazarus has a checkpoint; this one starts at step 1" in said
    (folder,) = shell.runs()
    for path in (folder / "checkpoints").glob("*/*.safetensors"):
        path.write_bytes(path.read_bytes()[:-9])
    before = sorted(path for path in shell.folder.rglob("*"))
    code, said = shell.train("--nodes", "2", "--steps", "9", "--resume", "auto", settings=FULL)
    assert code == 2
    (error,) = said_errors(said)
    assert "cannot resume from auto: no usable checkpoint at" in error
    assert "truncated" in error
    assert sorted(path for path in shell.folder.rglob("*")) == before


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was stopped, with a full checkpoint."""
    folder = tmp_path_factory.mktemp("done")
    watch(folder, nodes=2, steps=3, settings=FULL)
    return folder


def changed(folder: Path, tmp_path: Path, *settings: str) -> ElasticTrainer:
    return ElasticTrainer(
        TrainConfig.load(
            overrides=[
                *SMALL, *FULL, "cluster.nodes=2", "train.steps=5", f"run.dir={tmp_path / 'new'}",
                *settings,
            ]
        )
    )  # fmt: skip


@pytest.mark.parametrize("door", ["{}", "{}/checkpoints", "file://{}/checkpoints"])
@pytest.mark.parametrize(
    "change", ["run.seed=7", "train.global_batch=12", "model.dim=64", "data.num_shards=3"]
)
def test_another_run_is_refused_at_every_door(
    done: Path, tmp_path: Path, door: str, change: str
) -> None:
    """D6: from Python, by folder and by URL; what is allowed by name passes."""
    place = door.format(done)
    trainer = changed(done, tmp_path, change)
    key = change.partition("=")[0]
    with pytest.raises(ConfigError, match=f"{key} changed since the run began") as refused:
        trainer.fit(resume=place)
    assert len(refused.value.problems) == 1
    assert not (tmp_path / "new").exists()
    with pytest.raises(ConfigError, match="there is no such key"):
        trainer.fit(resume=place, allow_change=["model.dimm"])


@pytest.mark.parametrize("door", ["{}", "{}/checkpoints", "file://{}/checkpoints"])
def test_the_command_line_refuses_it_too(
    done: Path, tmp_path: Path, door: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """D6: ``--resume`` with a folder, its checkpoints, or a URL."""
    from lazarus import cli

    words = ["train", "--resume", door.format(done), "--nodes", "2", "--steps", "5"]
    options = [word for text in (*SMALL, *FULL, "run.seed=7") for word in ("--set", text)]
    if "checkpoints" in door:
        options += ["--set", f"run.dir={tmp_path / 'new'}"]
    before = (done / "config.toml").read_bytes()
    assert cli.main([*words, *options]) == 2
    assert "--allow-change run.seed" in capsys.readouterr().err
    assert (done / "config.toml").read_bytes() == before
    assert owner_of(done) is None
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_what_is_allowed_goes_on_and_an_old_checkpoint_only_warns(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """D6: a manifest from before manifests said it cannot be compared: a warning, no refusal."""
    url = f"file://{done}/checkpoints"
    result = changed(done, tmp_path, "optim.lr=0.001").fit(resume=url, allow_change=["optim.lr"])
    assert steps_of(result.run_dir) == [4, 5]
    after = newest_usable(str(result.run_dir / "checkpoints"))
    assert after.meta["config"]["optim.lr"] == 0.001
    assert "warning" not in capsys.readouterr().err
    (path,) = (done / "checkpoints").glob("*/manifest.json")
    text = path.read_text()
    manifest = from_text(text, path=str(path))
    assert dict(manifest.meta).pop("config")["run.seed"] == 0
    old = {name: value for name, value in manifest.meta.items() if name != "config"}
    try:
        path.write_text(to_text(type(manifest)(**{**vars_of(manifest), "meta": old})))
        (done / "events.jsonl").rename(done / "events.away")
        changed(done, tmp_path, f"run.dir={tmp_path / 'more'}").fit(resume=url)
        assert "warning: the checkpoint of step 3 does not say" in capsys.readouterr().err
        assert steps_of(tmp_path / "more") == [4, 5]
    finally:
        path.write_text(text)
        (done / "events.away").rename(done / "events.jsonl")


def vars_of(manifest: Any) -> dict[str, Any]:
    return {name: getattr(manifest, name) for name in manifest.__dataclass_fields__}


@pytest.mark.slow
def test_what_was_rescued_goes_on_where_it_is_newer(done: Path, tmp_path: Path) -> None:
    """D6: beside a run's own checkpoints its rescue folder counts; the newest usable one wins."""
    folder = tmp_path / "run"
    settings = (*FULL, "train.steps=3")
    watch(folder, nodes=2, steps=3, settings=settings)
    (folder / "checkpoints").rename(folder / "rescue")
    trainer = changed(done, tmp_path, f"run.dir={folder}")
    trainer.fit(resume="auto")
    assert steps_of(folder) == [1, 2, 3, 4, 5]
    first = json.loads((folder / "events.jsonl").read_text().splitlines()[0])
    assert first["event"] == "run_started"
    assert newest_usable(str(folder / "checkpoints")).step == 5
    (folder / "rescue").rename(folder / "away")
    more = changed(done, tmp_path, f"run.dir={folder}", "train.steps=6")
    more.fit(resume="auto")
    assert last_step(folder) == 6


@pytest.mark.slow
def test_runs_in_folders_with_odd_names_keep_their_own_checkpoints(tmp_path: Path) -> None:
    """D7: real runs in ``exp::3`` and ``exp::4``; each goes on from its own."""
    for number, name in ((3, "exp::3"), (4, "exp::4?x=1#y %20")):
        watch(tmp_path / name, nodes=2, steps=number, settings=FULL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exp::3", "exp::4?x=1#y %20"]
    for number, name in ((3, "exp::3"), (4, "exp::4?x=1#y %20")):
        assert newest_usable(str(tmp_path / name / "checkpoints")).step == number


@pytest.mark.slow
@pytest.mark.timeout(600)  # several commands, one after the other
def test_a_second_run_from_another_shell_is_refused_and_a_killed_one_goes_on(shell: Shell) -> None:
    """D8: the owner is named, nothing is touched; after SIGKILL its folder is free at once."""
    folder = shell.folder / "mine"
    settings = (*FULL, "checkpoint.every=1", "checkpoint.select=full")
    words = ("--nodes", "2", "--run-dir", str(folder))
    owner = shell.start(*words, "--steps", "100000", settings=settings)
    wait_for(lambda: (folder / "checkpoints").is_dir() and last_step(folder) >= 6, owner)
    before = (folder / "config.toml").read_bytes(), sorted(p.name for p in folder.iterdir())
    for resume in ((), ("--resume", "auto"), ("--resume", str(folder))):
        code, said = shell.train(*words, "--steps", "9", "--seed", "3", *resume, settings=settings)
        assert code == 2, said
        (error,) = said_errors(said)
        assert f"belongs to a run under way: process {owner.pid} on {os.uname().nodename}" in error
        after = (folder / "config.toml").read_bytes(), sorted(p.name for p in folder.iterdir())
        assert after == before
    step = last_step(folder)
    wait_for(lambda: last_step(folder) > step, owner)  # it trained on all the while
    owner.send_signal(signal.SIGKILL)
    owner.communicate(timeout=PATIENCE_S)
    left = owner_of(folder)
    assert left is not None
    assert (left.pid, left.state) == (owner.pid, "gone")
    killed = newest_usable(str(folder / "checkpoints")).step
    steps = str(last_step(folder) + 2)
    code, said = shell.train(*words, "--steps", steps, "--resume", "auto", settings=settings)
    assert code == 0, said
    assert "belongs to" not in said
    assert f"going on from step {killed}" in said
    assert owner_of(folder) is None


@pytest.mark.slow
def test_twice_from_python_in_one_process(tmp_path: Path) -> None:
    """D8: the second is refused while the first trains, and the folder is free when that ends."""
    refused: list[str] = []

    def again(_: Any) -> None:
        for resume in (None, "auto"):
            with pytest.raises(ConfigError) as problem:
                changed(tmp_path, tmp_path, f"run.dir={tmp_path / 'a'}", "run.seed=9").fit(
                    resume=resume
                )
            refused.append(str(problem.value))

    first = watch(
        tmp_path / "a",
        nodes=2,
        steps=6,
        settings=FULL,
        acts=[(lambda event: event["event"] == "step_committed", again)],
    )
    assert first.steps == [1, 2, 3, 4, 5, 6]
    assert len(refused) == 2
    assert all(f"process {os.getpid()} " in text and "this process" in text for text in refused)
    assert TrainConfig.load(tmp_path / "a" / "config.toml").run.seed == 0
    with pytest.raises(ConfigError, match="already holds the record of a run"):
        changed(tmp_path, tmp_path, f"run.dir={tmp_path / 'a'}").fit()
    more = changed(tmp_path, tmp_path, f"run.dir={tmp_path / 'a'}", "train.steps=7")
    more.fit(resume="auto")
    assert steps_of(tmp_path / "a") == [1, 2, 3, 4, 5, 6, 7]


def test_default_names_of_one_second_are_different(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D8: runs that begin within one second each get a folder, and ``auto`` knows them all."""
    from lazarus.run.run_folders import runs_of_name
    from lazarus.run.run_place import open_place

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    config = TrainConfig.load(overrides=["run.name=a"])
    start = threading.Barrier(12)

    def begin(_: int) -> Path:
        start.wait()
        place = open_place(config, resume=None)
        place.write_config()
        place.release()
        return place.folder

    with ThreadPoolExecutor(12) as pool:
        folders = list(pool.map(begin, range(12)))
    assert len(set(folders)) == 12
    assert len({folder.name[:15] for folder in folders}) <= 2
    assert sorted(runs_of_name(config, in_ray_job=False)) == sorted(folders)
    other = TrainConfig.load(overrides=["run.name=a-2"])
    assert runs_of_name(other, in_ray_job=False) == []


@pytest.mark.parametrize("resume", [None, "auto"])
@pytest.mark.parametrize("name", ["events.jsonl", "config.toml"])
@pytest.mark.parametrize("what", ["folder", "pipe", "endless link"])
def test_what_stands_where_a_file_should_be_is_refused_by_name(
    tmp_path: Path, what: str, name: str, resume: str | None
) -> None:
    """D10: before a process is started, which would wait for the pipe's other end."""
    path = tmp_path / "a" / name
    path.parent.mkdir()
    match what:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case _:
            path.symlink_to(name)
    with pytest.raises(ConfigError, match=rf"{name} is no regular file; move it away"):
        changed(tmp_path, tmp_path, f"run.dir={path.parent}").fit(resume=resume)
    assert [p.name for p in path.parent.iterdir()] == [name]


def test_a_folder_that_does_not_take_the_configuration_is_refused_and_free_again(
    tmp_path: Path,
) -> None:
    """A2, D8: the disk had room for the owner's file alone; this process keeps nothing of it."""
    folder = tmp_path / "a"
    (folder / "config.toml.tmp").mkdir(parents=True)
    trainer = changed(tmp_path, tmp_path, f"run.dir={folder}")
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"config\.toml cannot be written: Is a directory"):
            trainer.fit()
        assert owner_of(folder) is None
    assert [p.name for p in folder.iterdir()] == ["config.toml.tmp"]


def test_a_machine_without_room_for_temporary_files_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A2: the folder is free again, and nothing is in it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="TMPDIR"):
        changed(tmp_path, tmp_path, f"run.dir={tmp_path / 'a'}").fit()
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", ["run.dir", "run.name", "checkpoint.url"])
@pytest.mark.parametrize("value", ["a\0b", "a\udcffb"])
def test_names_that_no_file_can_have_are_refused(name: str, value: str) -> None:
    """D10: a NUL, and a byte of the command line that is no UTF-8."""
    section, _, key = name.partition(".")
    with pytest.raises(ConfigError, match=f"{name} = 'a.*b' holds a byte that is no text"):
        TrainConfig.from_mapping({section: {key: value}})


def test_a_place_to_go_on_from_that_no_folder_can_have_is_refused(tmp_path: Path) -> None:
    """D10: a name of 5,000 letters raised OSError."""
    with pytest.raises(ConfigError, match="cannot resume from /xxx"):
        changed(tmp_path, tmp_path).fit(resume="/" + "x" * 5000)

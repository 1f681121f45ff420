"""The real command line with bad input: one line that helps, exit code 2, nothing started."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lazarus import cli
from lazarus.config.reference import reference
from lazarus.failure import Cause, Failure
from lazarus.record.endings import error_of

ROOT = Path(__file__).resolve().parents[2]


def lazarus(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lazarus", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(cwd)},
        check=False,
    )


BAD = [
    (
        ("train", "--set", "placement.min_replica=2"),
        "unknown key placement.min_replica; did you mean placement.min_replicas?",
    ),
    (
        ("train", "--nodes", "3", "--set", "placement.slots_per_node=1"),
        "8 experts do not fit: 3 nodes x 1 slots = 3 < 8 per layer",
    ),
    (("train", "--set", "data.path=/no/such/text"), '"/no/such/text" does not exist'),
    (("train", "--nodes", "4", "--fault", "kill:7@5"), "there is no node 7"),
    (("train", "--fault", "kil:1@5"), "did you mean kill?"),
    (("train", "--steps", "0"), "--steps: train.steps = 0 must be >= 1"),
    (("train", "missing.toml"), "missing.toml: cannot read the configuration"),
    (("train", "--nodes", "many"), "argument --nodes: invalid int value: 'many'"),
    (("train", "--preset", "huge"), '--preset: preset = "huge" must be'),
    (("trian",), "unknown command 'trian'; did you mean train?"),
    (("train", "--stepss", "5"), "unknown option --stepss; did you mean --steps?"),
    (("train", "--run-dir", "taken"), "already holds the record of a run"),
    (("train", "--run-dir", "file.txt"), "cannot be made"),
    (("config",), "arguments are required: ACTION"),
]


@pytest.mark.parametrize(("arguments", "said"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_ends_at_once_with_a_line_that_helps(
    arguments: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "events.jsonl").write_text("")
    (tmp_path / "file.txt").write_text("")
    before = sorted(tmp_path.rglob("*"))
    done = lazarus(*arguments, cwd=tmp_path)
    errors = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert done.returncode == 2, done.stderr
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert said in errors[0]
    assert done.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_several_mistakes_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("[train]\nstep = 3\n[cluster]\nnodes = 'x'\n")
    done = lazarus("train", "a.toml", "--set", "optim.lr=-1", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: a.toml:2: unknown key train.step; did you mean train.steps?",
        'error: a.toml:4: cluster.nodes = "x" must be int',
        "error: --set optim.lr=-1: optim.lr = -1.0 must be > 0",
    ]


def test_config_show_prints_a_file_that_loads_back_with_origins(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["config", "show", "--nodes", "6", "--preset", "tiny"]) == 0
    out = capsys.readouterr().out
    assert "nodes = 6  # --nodes" in out
    assert "# heartbeat_timeout_s = 10.0" in out
    assert tomllib.loads(out)["optim"]["lr"] == 1e-3


def test_config_show_as_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "show", "--json", "--set", "train.steps=7"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert (content["schema"], content["train"]["steps"]) == (1, 7)
    assert content["origins"]["train.steps"] == "--set train.steps=7"


def test_the_manuals_page_of_keys_is_current() -> None:
    page = ROOT / "docs" / "configuration.md"
    assert page.read_text() == reference(), "run: lazarus config reference > docs/configuration.md"


def test_the_example_configurations_load() -> None:
    found = sorted((ROOT / "configs").glob("*.toml"))
    assert found
    for path in found:
        assert cli.main(["config", "show", str(path)]) == 0


def test_every_command_helps_without_importing_torch_or_ray(tmp_path: Path) -> None:
    for arguments in (["--help"], ["train", "--help"], ["config", "show"]):
        code = (
            "import sys; from lazarus.cli import main\n"
            f"try: main({arguments!r})\n"
            "except SystemExit: pass\n"
            "assert not {'torch', 'ray'} & set(sys.modules), 'heavy import'"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr


def test_ctrl_c_and_errors_have_their_exit_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    from lazarus import errors
    from lazarus.commands import config

    raised: list[BaseException] = [
        KeyboardInterrupt(),
        errors.ConfigError("x"),
        errors.QuorumTimeoutError(live=1, needed=2, waited_s=3.0),
        errors.LostExpertError(experts=[(0, 1)], reason="policy"),
        errors.UserCodeError(where="loss", summary="ValueError: x", traceback_text="Traceback"),
        errors.StoppedError("SIGTERM"),
        errors.BrokenInvariantError("?"),
    ]

    def fail(*_: object) -> str:
        raise raised[0]

    monkeypatch.setattr(config, "reference", fail)
    codes = []
    while raised:
        codes.append(cli.main(["config", "reference"]))
        raised.pop(0)
    assert codes == [130, 2, 3, 3, 1, 3, 1]


def test_errors_keep_type_and_fields_when_pickled() -> None:
    import pickle

    from lazarus import errors

    for error in (
        errors.ConfigError([errors.Problem("a", where="b"), errors.Problem("c")]),
        errors.FencedError(generation=1, fence=2),
        errors.UserCodeError(where="loss", summary="s", traceback_text="t"),
        errors.LostExpertError(experts=[(0, 1)], reason="r"),
        errors.RecordError(path="p", line=3, reason="r"),
    ):
        back = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
        assert type(back) is type(error)
        assert (back.args, back.__dict__) == (error.args, error.__dict__)


def test_lost_experts_are_told_with_the_way_out() -> None:
    """What storage said is no use to a reader who does not know what to do about it."""
    failure = Failure(
        cause=Cause.STORAGE,
        error="LostExpertError",
        message="L0/E3 cannot be read: I/O error",
        way_out="see to the storage, then resume the run",
        details={"experts": [[0, 3]]},
    )
    text = str(error_of(failure, status="short"))
    assert text.endswith("I/O error; see to the storage, then resume the run")

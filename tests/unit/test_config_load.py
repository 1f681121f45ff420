"""Configuration: layers, origins, every error at once, and the complete file of a run."""

import tomllib
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazarus.config import layers
from lazarus.config.layers import Given
from lazarus.config.train_config import ClusterConfig, PlacementConfig, TrainConfig
from lazarus.errors import ConfigError


def problems_of(text: str, tmp_path: Path, **more: object) -> list[str]:
    path = tmp_path / "a.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        TrainConfig.load(path, **more)  # type: ignore[arg-type]
    return [str(p).replace(str(path), "a.toml") for p in caught.value.problems]


def test_an_unknown_key_names_its_line_and_the_nearest_key(tmp_path: Path) -> None:
    text = "[cluster]\nnodes = 3\n\n[placement]\nmin_replica = 2\n"
    assert problems_of(text, tmp_path) == [
        "a.toml:5: unknown key placement.min_replica; did you mean placement.min_replicas?"
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[cluser]\nnodes = 3\n", "a.toml:1: unknown section [cluser]; did you mean [cluster]?"),
        (
            "[cluster]\nsteps = 3\n",
            "a.toml:2: unknown key cluster.steps; did you mean train.steps?",
        ),
        ("cluster = 3\n", "a.toml:1: [cluster] is a section; cluster = 3 makes no sense"),
        ("presets = 'tiny'\n", "a.toml:1: unknown key presets; did you mean preset?"),
        ("[train]\nsteps = 'x'\n", 'a.toml:2: train.steps = "x" must be int'),
        ("[train]\nsteps = true\n", "a.toml:2: train.steps = true must be int"),
        ("[train]\nsteps = 0\n", "a.toml:2: train.steps = 0 must be >= 1"),
        (
            "[train]\nprecision = 'fp16'\n",
            'a.toml:2: train.precision = "fp16" must be "fp32" | "bf16"; did you mean bf16?',
        ),
        (
            "[optim]\nbetas = [\n 0.9, # a comment\n]\nlr = 0.0\n",
            "a.toml:5: optim.lr = 0.0 must be > 0",
        ),
        (
            "placement = { min_replicas = 0 }\n",
            "a.toml:1: placement.min_replicas = 0 must be >= 1",
        ),
        (
            "[cluster]\nnodes = 2\nmin_nodes = 3\n",
            "a.toml:3: cluster.min_nodes=3 is more than cluster.nodes=2",
        ),
        ("[model]\nheads = 3\n", "a.toml:2: model.heads=3 does not divide model.dim=128"),
        ("[model]\ntop_k = 9\n", "a.toml:2: model.top_k=9 is more than model.experts=8"),
        (
            "[placement]\npolicy = 'no colon'\n",
            'a.toml:2: placement.policy = "no colon" must be "package.module:Name" or the name of',
        ),
        ("[security]\ntls = true\n", "a.toml:2: security.tls needs security.cert"),
        ("[faults]\nspecs = ['kil:2@3']\n", "a.toml:2: fault 'kil:2@3': unknown kind 'kil'"),
        ("[optim]\nlr = nan\n", "a.toml:2: optim.lr = nan must be float"),
    ],
)
def test_what_is_wrong_is_said_with_place_and_way_out(text: str, said: str, tmp_path: Path) -> None:
    assert any(said in p for p in problems_of(text, tmp_path)), problems_of(text, tmp_path)


def test_all_errors_come_at_once(tmp_path: Path) -> None:
    text = "[cluster]\nnodes = 0\nnode = 1\n[x]\na = 1\n[model]\nheads = 3\n"
    problems = problems_of(text, tmp_path, overrides=["train.steps=none", "a.b=", "optim.lr"])
    assert len(problems) == 7
    assert '--set train.steps=none: train.steps = "none" must be int' in problems


def test_a_file_that_is_not_toml_or_not_there_is_one_line(tmp_path: Path) -> None:
    assert problems_of("[cluster\n", tmp_path)[0].startswith("a.toml:1: not valid TOML")
    with pytest.raises(ConfigError, match="cannot read the configuration: No such file"):
        TrainConfig.load(tmp_path / "missing.toml")
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        TrainConfig.load(tmp_path)


def test_the_last_layer_wins_and_its_place_is_known(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(
        'preset = "tiny"\n[train]\nsteps = 10\nglobal_batch = 64\n[cluster]\nnodes = 2\n'
    )
    config = TrainConfig.load(
        path,
        overrides=["train.global_batch=16", "run.name=my run"],
        environment={"LAZARUS_SET": "train.global_batch=8;train.micro_batch_size=2", "HOME": "/x"},
        flags={"cluster.nodes": Given(6, "--nodes")},
    )
    assert (config.train.steps, config.train.global_batch) == (10, 16)
    assert (config.train.micro_batch_size, config.cluster.nodes) == (2, 6)
    assert config.run.name == "my run"
    assert config.optim.lr == 1e-3
    assert config.origins["optim.lr"] == "preset tiny"
    assert config.origins["train.steps"] == f"{path}:3"
    assert config.origins["cluster.nodes"] == "--nodes"
    assert config.given("model")[0].startswith("model.layers (preset tiny)")


def test_a_preset_is_weaker_than_every_explicit_value_wherever_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("[model]\ndim = 64\nheads = 2\n")
    config = TrainConfig.load(path, preset="gpt-l", overrides=["model.preset=gpt-m"])
    assert (config.model.dim, config.model.experts, config.model.vocab) == (64, 12, 50257)
    with pytest.raises(ConfigError, match=r'--preset: preset = "gpt-x" must be'):
        TrainConfig.load(preset="gpt-x")


def test_none_clears_an_optional_key() -> None:
    config = TrainConfig.load(overrides=["cluster.max_nodes=9", 'cluster.max_nodes="none"'])
    assert config.cluster.max_nodes is None


def test_the_resolved_file_loads_back_to_the_same_configuration() -> None:
    config = TrainConfig.load(
        preset="gpt-s",
        overrides=[
            "cluster.node_labels={a='b', \"c.d\"='e'}",
            "faults.specs=['kill:1@5']",
            "optim.betas=[0.8, 0.9]",
            'run.name="a \\"quoted\\" ünïcode name"',
        ],
    )
    assert TrainConfig.from_mapping(tomllib.loads(config.to_toml())) == config
    assert TrainConfig.from_dict(config.to_dict()) == config
    assert config.digest() == TrainConfig.from_dict(config.to_dict()).digest()


@given(
    nodes=st.integers(1, 50),
    name=st.text(st.characters(codec="utf-8", exclude_characters="\0")),
    lr=st.floats(1e-9, 1e3),
    labels=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
)
def test_any_values_survive_the_trip_through_toml(
    nodes: int, name: str, lr: float, labels: dict[str, str]
) -> None:
    content = {
        "cluster": {"nodes": nodes, "node_labels": labels},
        "run": {"name": name},
        "optim": {"lr": lr},
    }
    config = TrainConfig.from_mapping(content)
    assert TrainConfig.from_mapping(tomllib.loads(config.to_toml())) == config


def test_the_digest_ignores_what_does_not_decide_the_mathematics() -> None:
    plain = TrainConfig.load().digest()
    assert TrainConfig.load(overrides=["cluster.nodes=8", "train.steps=5"]).digest() == plain
    assert TrainConfig.load(overrides=["run.seed=1"]).digest() != plain
    assert TrainConfig.load(overrides=["train.global_batch=8"]).digest() != plain


def test_sections_check_themselves_when_built_in_python() -> None:
    with pytest.raises(ConfigError, match="cluster.nodes = 0 must be >= 1"):
        ClusterConfig(nodes=0)
    with pytest.raises(ConfigError, match="placement.min_replicas"):
        PlacementConfig(min_replicas="two")  # type: ignore[arg-type]


def test_every_key_has_a_meaning_and_a_default_of_its_type() -> None:
    for dotted, (spec, hint) in layers.keys_of(TrainConfig).items():
        assert spec.metadata["doc"], dotted
        assert layers.complaint(spec, hint, layers.default_of(spec), dotted) is None


def test_the_environment_is_read_from_its_few_variables_only() -> None:
    config = TrainConfig.load(environment={"RAY_ADDRESS": "a:1", "LAZARUS_RUN_DIR": "/r"})
    assert (config.cluster.address, config.run.dir) == ("a:1", "/r")
    both = {"RAY_ADDRESS": "a:1", "LAZARUS_ADDRESS": "b:2"}
    assert TrainConfig.load(environment=both).cluster.address == "b:2"
    with pytest.raises(ConfigError, match="LAZARUS_SET a.b: must be section.key=value"):
        TrainConfig.load(environment={"LAZARUS_SET": "a.b"})


def test_the_run_folder_is_absolute_and_outside_a_jobs_package() -> None:
    now = datetime(2026, 11, 21, 3, 4, 5)
    config = TrainConfig.load(overrides=["run.name=a"])
    assert config.run_dir(now=now) == Path("runs/20261121-030405-a").absolute()
    job = config.run_dir(now=now, in_ray_job=True)
    assert job == Path("~/lazarus/20261121-030405-a").expanduser()
    told = TrainConfig.load(overrides=["run.dir=/r/{name}"])
    assert told.run_dir(now=now, in_ray_job=True) == Path("/r/lazarus")

"""What is read of a Hugging Face model's folder before anything starts, and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import small_tokenizers

from lazarus import ElasticTrainer, TrainConfig
from lazarus.config.hf_folder import HfFolder, hf_warnings, read_hf_folder, sample_len, vocab_of
from lazarus.errors import ConfigError

MOE = {"model_type": "olmoe", "vocab_size": 320, "max_position_embeddings": 64, "num_experts": 4}


def folder(place: Path, content: Any = MOE) -> str:
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    (place / "model.safetensors").write_bytes(b"")
    return str(place)


def config_of(*overrides: str) -> TrainConfig:
    return TrainConfig.load(overrides=overrides)


def test_a_folder_says_what_its_model_is(tmp_path: Path) -> None:
    found = HfFolder(model_type="olmoe", vocab=320, positions=64, experts=4)
    assert read_hf_folder(folder(tmp_path / "a")) == found
    nested = {"model_type": "x", "vision_config": {"depth": 2}, "text_config": MOE}
    assert read_hf_folder(folder(tmp_path / "b", nested)).experts == 4


@pytest.mark.parametrize("name", ["n_routed_experts", "num_local_experts", "moe_num_experts"])
def test_experts_go_by_several_names(name: str, tmp_path: Path) -> None:
    content = {"model_type": "x", name: 8, "num_experts_per_tok": 2}
    assert read_hf_folder(folder(tmp_path / "a", content)).experts == 8


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"model_type": "llama", "vocab_size": 5}, "is a llama model without experts"),
        ("{", "has no usable config.json"),
        ([1], "names no model_type"),
        ({"num_experts": 3}, "names no model_type"),
    ],
)
def test_a_folder_of_no_use_is_refused(content: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=reason) as refusal:
        ElasticTrainer(config_of(f"model.hf={folder(tmp_path / 'a', content)}"))
    (problem,) = refusal.value.problems
    assert problem.key == "model.hf"


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'model\.hf = ".*absent" is no folder'):
        ElasticTrainer(config_of(f"model.hf={tmp_path}/absent"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no usable config\.json: No such file"):
        ElasticTrainer(config_of(f"model.hf={tmp_path}/empty"))


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    name = folder(tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="has no model.safetensors and no model.safetensors.ind"):
        ElasticTrainer(config_of(f"model.hf={name}"))


def test_text_that_the_model_would_read_as_bytes_is_warned_of(tmp_path: Path) -> None:
    name = f"model.hf={folder(tmp_path / 'a')}"
    (warning,) = hf_warnings(config_of(name))
    assert 'data.tokenizer = "hf"' in warning
    for fine in ("data.tokenizer=hf", "data.source=a:b", "data.path=a.bin", 'model.hf="none"'):
        assert hf_warnings(config_of(name, fine)) == []


def test_a_sample_is_as_long_as_the_model_allows(tmp_path: Path) -> None:
    name = f"model.hf={folder(tmp_path / 'a')}"
    assert sample_len(config_of(name)) == 64 and vocab_of(config_of(name)) == 320
    assert sample_len(config_of(name, "data.seq_len=16")) == 16
    long = f"model.hf={folder(tmp_path / 'b', {**MOE, 'max_position_embeddings': 1 << 17})}"
    assert sample_len(config_of(long)) == 2048
    assert sample_len(config_of()) == 128
    with pytest.raises(ConfigError, match="data.seq_len=65 is more than the 64 positions"):
        ElasticTrainer(config_of(name, "data.seq_len=65"))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["data.tokenizer=hf"], 'data.tokenizer = "hf" is the tokenizer of model.hf, which is not'),
        (["data.tokenizer=absent"], 'data.tokenizer = "absent" does not exist'),
        (["data.tokenizer=broken.json"], 'data.tokenizer = "broken.json": .* cannot be read'),
        (["data.tokenizer=good.json"], "has 300 token ids, more than the 256 of model.vocab"),
        (["data.tokenizer=hf", "model.hf=model"], "model has no tokenizer"),
        (["data.tokenizer=good.json", "model.hf=small"], "more than the 20 of model.hf"),
        (["data.tokenizer=good.json", "data.path=a.npy"], "data.path holds tokens already"),
        (["data.path=a.parquet"], "is no plain text; data.tokenizer says how it is read"),
        (["model.hf=model", "model.builder=a:b"], "model.builder and model.hf are both set"),
    ],
)
def test_tokenizers_of_no_use_are_refused(
    settings: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "model")
    folder(tmp_path / "small", {**MOE, "vocab_size": 20})
    small_tokenizers.tokenizer_file(tmp_path / "good.json")
    (tmp_path / "broken.json").write_text("{}")
    for name in ("a.npy", "a.parquet"):
        (tmp_path / name).write_text("")
    with pytest.raises(ConfigError, match=reason):
        ElasticTrainer(config_of(*settings))

"""``lazarus checkpoint export --layout hf``: a run's model as the checkpoint that it came from."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_saved import FAMILIES, contents, model_of, save_run, save_source
from torch import Tensor

from lazarus.cli import main

QUICK = ("Qwen3Moe", "Mixtral")


def export(url: Path, *arguments: str) -> int:
    return main(["checkpoint", "export", str(url), "--layout", "hf", *arguments])


def kinds(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {key: (tensor.dtype, tensor.shape) for key, tensor in tensors.items()}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``source``, ``run`` and ``wanted``, which transformers wrote."""
    return made("Qwen3Moe", tmp_path_factory.mktemp("qwen"))


def made(family: str, folder: Path) -> Path:
    trained = model_of(family, seed=1)
    save_source(model_of(family), folder / "source")
    save_source(trained, folder / "wanted")
    save_run(trained, str(folder / "run"))
    return folder


@pytest.mark.parametrize(
    "family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
def test_an_export_is_what_transformers_would_have_saved(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    made(family, tmp_path)
    source, out = tmp_path / "source", tmp_path / "out"
    assert export(tmp_path / "run", "--like", str(source), "--out", str(out)) == 0
    exported = contents(out)
    assert kinds(exported) == kinds(contents(source))
    for key, tensor in contents(tmp_path / "wanted").items():
        assert torch.equal(exported[key], tensor), key
    assert {p.name for p in out.iterdir()} == {p.name for p in source.iterdir()}
    assert (out / "config.json").read_text() == (source / "config.json").read_text()
    assert (out / "tokenizer_config.json").read_text() == '{"model_max_length": 32}\n'
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info


def test_shards_hold_no_more_than_asked_and_the_index_names_them(
    qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, like = tmp_path / "out", str(qwen / "source")
    asked = ["--like", like, "--out", str(out), "--max-shard", "4KB", "--json"]
    assert export(qwen / "run", *asked) == 0
    answer = json.loads(capsys.readouterr().out)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) == answer["files"] >= 4
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(sum(t.nbytes for t in contents_of(f).values()) <= 4000 for f in files)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    exported = contents(out)
    assert index["metadata"]["total_size"] == answer["bytes"]
    assert answer["bytes"] == sum(t.nbytes for t in exported.values())
    wanted = contents(qwen / "wanted")
    assert all(torch.equal(exported[key], wanted[key]) for key in wanted)
    assert exported.keys() == wanted.keys()


def contents_of(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)  # type: ignore[no-any-return]


def test_a_dtype_holds_for_all_tensors_and_for_the_configuration(
    qwen: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    like = str(qwen / "source")
    assert export(qwen / "run", "--like", like, "--out", str(out), "--dtype", "fp32") == 0
    exported = contents(out)
    assert {tensor.dtype for tensor in exported.values()} == {torch.float32}
    trained = model_of("Qwen3Moe", seed=1).state_dict()
    name = "model.layers.1.mlp.experts.gate_up_proj"
    up = exported["model.layers.1.mlp.experts.3.up_proj.weight"]
    assert torch.equal(up, trained[name][3].chunk(2)[1])
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"


def test_each_tensor_has_the_dtype_that_it_had(tmp_path: Path) -> None:
    made("Mixtral", tmp_path)
    mixed = contents(tmp_path / "source")
    router = next(key for key in mixed if key.endswith("1.block_sparse_moe.gate.weight"))
    mixed[router] = mixed[router].float()
    rewrite(tmp_path / "source", mixed)
    like, out = str(tmp_path / "source"), str(tmp_path / "out")
    assert export(tmp_path / "run", "--like", like, "--out", out) == 0
    assert kinds(contents(tmp_path / "out")) == kinds(mixed)


def rewrite(folder: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_names_of_the_module_and_tensors_beside_the_model_are_kept(tmp_path: Path) -> None:
    """A folder saved without conversion, with a tensor that the model class ignores."""
    made("Mixtral", tmp_path)
    model = model_of("Mixtral")
    plain = {name: t.to(torch.bfloat16) for name, t in model.state_dict().items()}
    plain["model.rotary_emb.inv_freq"] = torch.arange(4.0)
    rewrite(tmp_path / "source", plain)
    like, out = str(tmp_path / "source"), str(tmp_path / "out")
    assert export(tmp_path / "run", "--like", like, "--out", out) == 0
    exported = contents(tmp_path / "out")
    assert kinds(exported) == kinds(plain)
    trained = model_of("Mixtral", seed=1).state_dict()
    assert all(torch.equal(exported[n], t.to(torch.bfloat16)) for n, t in trained.items())
    assert torch.equal(exported["model.rotary_emb.inv_freq"], torch.arange(4.0))


def test_a_model_inside_another_module_is_found(qwen: Path, tmp_path: Path) -> None:
    save_run(model_of("Qwen3Moe", seed=1), str(tmp_path / "run"), prefix="policy.")
    like, out = str(qwen / "source"), str(tmp_path / "out")
    assert export(tmp_path / "run", "--like", like, "--out", out) == 0
    exported, wanted = contents(tmp_path / "out"), contents(qwen / "wanted")
    assert all(torch.equal(exported[key], wanted[key]) for key in wanted)


def test_a_quantised_source_is_exported_in_the_dtype_of_its_configuration(
    qwen: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(qwen / "source", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [8, 8]}
    (source / "config.json").write_text(json.dumps(config))
    stored = contents(source)
    key = "model.layers.0.mlp.experts.0.up_proj.weight"
    narrow = stored | {key: stored[key].to(torch.float8_e4m3fn)}
    rewrite(source, narrow | {f"{key}_scale_inv": torch.ones(2, 2)})
    out = tmp_path / "out"
    assert export(qwen / "run", "--like", str(source), "--out", str(out)) == 0
    assert kinds(contents(out)) == kinds(stored)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


def test_a_target_that_exists_is_left_alone_unless_forced(
    qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    asked = ["--like", str(qwen / "source"), "--out", str(out)]
    assert export(qwen / "run", *asked, "--max-shard", "4KB") == 0
    assert export(qwen / "run", *asked) == 2
    assert f"error: {out} exists" in capsys.readouterr().err
    assert export(qwen / "run", *asked, "--force") == 0
    assert [p.name for p in out.glob("model*")] == ["model.safetensors"]


def test_mistakes_are_told_in_one_line_and_write_nothing(
    qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    like = str(qwen / "source")
    other = save_source(model_of("Qwen3Moe", hidden_size=24), tmp_path / "other")
    larger = save_source(model_of("Qwen3Moe", num_hidden_layers=3), tmp_path / "larger")
    smaller = save_source(model_of("Qwen3Moe", num_hidden_layers=1), tmp_path / "smaller")
    broken = shutil.copytree(qwen / "source", tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no tensors")
    (tmp_path / "empty").mkdir()
    out = str(tmp_path / "out")
    capsys.readouterr()  # transformers' progress
    mistakes = {
        "does not say which folder": ["--out", out],
        "writes a folder": ["--like", like],
        "has no config.json": ["--like", str(tmp_path / "empty"), "--out", out],
        "[48, 24] there, and [48, 16]": ["--like", str(other), "--out", out],
        "lacks model.layers.2.": ["--like", str(larger), "--out", out],
        "does not have model.layers.1.": ["--like", str(smaller), "--out", out],
        "broken: ": ["--like", str(broken), "--out", out],
        "dtype 'int4' is none of": ["--like", like, "--out", out, "--dtype", "int4"],
        "'5 apples' is no size": ["--like", like, "--out", out, "--max-shard", "5 apples"],
    }
    for words, arguments in mistakes.items():
        assert export(qwen / "run", *arguments) == 2, words
        error = capsys.readouterr().err
        assert words in error
        assert error.startswith("error: ")
        assert error.count("\n") == 1
    assert not Path(out).exists()
    plain = ["checkpoint", "export", str(qwen / "run"), "--out", out, "--like", like]
    assert main(plain) == 2
    assert "--like goes with --layout hf or dcp" in capsys.readouterr().err


MEASURED = """
import sys
import transformers.models.mixtral.modeling_mixtral, torch.distributed.checkpoint
import lazarus.hf.saving, lazarus.checkpoint.files.dcp, lazarus.checkpoint.files.export
from lazarus.cli import main


def kib(key):
    return int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1])


before = kib("VmRSS:")
assert main(["checkpoint", "export", *sys.argv[1:]]) == 0
print("KiB", kib("VmHWM:") - before)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("layout", ["hf", "dcp"])
def test_an_export_needs_the_memory_of_one_layer(layout: str, tmp_path: Path) -> None:
    """Twelve layers of 28 MiB in bf16 are exported; the experts' records are larger."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**(FAMILIES["Mixtral"] | LARGE))
    model = MixtralForCausalLM(config)
    save_source(model, tmp_path / "source")
    save_run(model, str(tmp_path / "run"))
    del model
    asked = ["--layout", layout, "--like", str(tmp_path / "source"), "--out", str(tmp_path / "out")]
    if layout == "hf":
        asked += ["--max-shard", "40MB"]
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "run"), *asked]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split("KiB")[1]) * 1024
    layer = 8 * 3 * 384 * 1536 * (2 if layout == "hf" else 4)
    constant = 96 << 20  # the model without data, records and files in memory, the allocator's rest
    print(f"{peak / 2**20:.0f} MiB")
    assert peak < 2 * layer + constant, f"{peak / 2**20:.0f} MiB"
    whole = sum(p.stat().st_size for p in (tmp_path / "source").glob("*.safetensors"))
    assert whole > 1.5 * peak  # else the measurement would say nothing


LARGE = {"hidden_size": 384, "intermediate_size": 1536, "num_local_experts": 8} | {
    "num_hidden_layers": 12
}

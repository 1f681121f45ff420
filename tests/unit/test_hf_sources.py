"""Reading a checkpoint's tensors one by one: ranges of files, quantised formats, conversions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hf_families import saved, small_model
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from lazarus.hf import dequantise, load, stored
from lazarus.hf.dequantise import dequantised_fp8, dequantised_mxfp4, dequantised_tensors
from lazarus.hf.experts import expert_fields, experts_modules
from lazarus.hf.source import CheckpointSource
from lazarus.hf.stored import StoredTensor, stored_tensors
from lazarus.model.experts import deferred_experts
from lazarus.model.protocol import moe_layers


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors that are read from files."""
    found: list[str] = []
    whole = StoredTensor.read

    def read(self: StoredTensor, row: int | None = None) -> Tensor:
        found.append(self.name if row is None else f"{self.name}[{row}]")
        return whole(self, row)

    monkeypatch.setattr(StoredTensor, "read", read)
    return found


# ---- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64])
def test_tensors_and_rows_are_read_as_they_were_written(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.randn(4, 3, 5).mul_(9).to(dtype)
    save_file({"a": torch.ones(7), "b": values, "c": torch.zeros(0, 2)}, tmp_path / stored.SINGLE)
    tensors = stored_tensors(tmp_path)
    assert set(tensors) == {"a", "b", "c"}
    for got, wanted in ((tensors["b"].read(), values), (tensors["b"].read(2), values[2:3])):
        assert got.dtype == dtype and got.shape == wanted.shape
        assert torch.equal(got.view(torch.uint8), wanted.contiguous().view(torch.uint8))
    assert tensors["c"].read().shape == (0, 2)


def test_a_folder_that_is_not_complete_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"no model.safetensors; found \['pytorch_model.bin'\]"):
        stored_tensors(tmp_path)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / stored.INDEX).write_text(json.dumps(index))
    save_file({"a": torch.ones(9)}, tmp_path / "model-1.safetensors")
    with pytest.raises(ValueError, match=r"has no model-2.safetensors"):
        stored_tensors(tmp_path)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / stored.SINGLE
    save_file({"a": torch.ones(9)}, file)
    whole = file.read_bytes()
    file.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match="ends within a"):
        stored_tensors(tmp_path)["a"].read()
    file.write_bytes(b"\xff" * 8 + whole)
    with pytest.raises(ValueError, match="not a safetensors file"):
        stored_tensors(tmp_path)


# ---- quantised files ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(256, 128), (2, 128, 256)])
def test_fp8_blocks_are_dequantised_as_transformers_does(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape).to(torch.float8_e4m3fn)
    scales = torch.rand(*shape[:-2], shape[-2] // 128, shape[-1] // 128) + 0.1
    wanted = Fp8Dequantize(None)._dequantize_one(values, scales, output_dtype=torch.float32)
    assert torch.equal(dequantised_fp8(values, scales, block=(128, 128)), wanted.view(shape))


def test_the_last_fp8_block_of_an_axis_may_be_smaller() -> None:
    values = torch.randn(5, 7).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 3) + 0.1
    got = dequantised_fp8(values, scales, block=(4, 3))
    for row in range(5):
        for column in range(7):
            wanted = values[row, column].float() * scales[row // 4, column // 3]
            assert got[row, column] == wanted
    with pytest.raises(ValueError, match="2 scales do not fit an axis of 5"):
        dequantised_fp8(values, scales)


def test_mxfp4_is_dequantised_as_transformers_does() -> None:
    blocks = torch.randint(256, (3, 8, 2, 16), dtype=torch.uint8)
    scales = torch.randint(120, 134, (3, 8, 2), dtype=torch.uint8)
    wanted = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert torch.equal(dequantised_mxfp4(blocks, scales), wanted)


def quantised_fp8(tensor: Tensor, *, block: int) -> tuple[Tensor, Tensor]:
    """fp8 values and scales of blocks, as DeepSeek's files have them."""
    rows, columns = tensor.shape
    parts = tensor.view(rows // block, block, columns // block, block)
    scales = parts.abs().amax((1, 3)) / 448.0
    values = (parts / scales[:, None, :, None]).to(torch.float8_e4m3fn).view(rows, columns)
    return values, scales


def test_a_model_in_fp8_blocks_is_loaded_as_what_it_stands_for(tmp_path: Path) -> None:
    folder = saved(small_model("deepseek_v3"), tmp_path)
    tensors = {name: t.read() for name, t in stored_tensors(folder).items()}
    for name in [n for n in tensors if n.endswith("proj.weight") and n.count("layers.0")]:
        values, scales = quantised_fp8(tensors[name], block=4)
        wanted = dequantised_fp8(values, scales)
        tensors |= {name: values, f"{name}_scale_inv": scales, f"wanted {name}": wanted}
    wanted = {n: t for n, t in tensors.items() if not n.startswith("wanted")}
    save_file(wanted, folder / stored.SINGLE)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [4, 4]}
    (folder / "config.json").write_text(json.dumps(config))
    model = load(folder)
    attention = model.get_parameter("model.layers.0.self_attn.o_proj.weight")
    assert torch.equal(attention, tensors["wanted model.layers.0.self_attn.o_proj.weight"])
    down = model.model.layers[0].mlp.experts.lazarus.experts.values(3)["down_proj"]
    assert torch.equal(down, tensors["wanted model.layers.0.mlp.experts.3.down_proj.weight"])
    assert not hasattr(model.config, "quantization_config")


def test_a_model_in_mxfp4_is_loaded_as_what_it_stands_for(tmp_path: Path) -> None:
    folder = saved(small_model("gpt_oss", intermediate_size=32), tmp_path)
    tensors = {name: t.read() for name, t in stored_tensors(folder).items()}
    wanted = {}
    for name in [n for n in tensors if n.endswith("_proj") and ".experts." in n]:
        experts, columns, rows = tensors.pop(name).shape
        blocks = torch.randint(256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 126, (experts, rows, columns // 32), dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        wanted[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    save_file(tensors, folder / stored.SINGLE)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    model = load(folder)
    assert wanted
    for name, tensor in wanted.items():
        path, _, field = name.rpartition(".")
        bank = model.get_submodule(path).lazarus.experts
        for expert in range(bank.num_experts):
            assert torch.equal(bank.values(expert)[field], tensor[expert])


def test_files_quantised_in_another_way_are_refused(tmp_path: Path) -> None:
    folder = saved(small_model("qwen3_moe"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantised as 'gptq'; lazarus.hf reads fp8 and mxfp4"):
        load(folder)
    fp8 = torch.zeros(4, 4, dtype=torch.float8_e4m3fn)
    save_file({"a.weight": fp8}, tmp_path / stored.SINGLE)
    with pytest.raises(ValueError, match="a.weight is stored in fp8 without scales"):
        dequantised_tensors(stored_tensors(tmp_path), block=None)
    assert dequantise.FORMATS == ("fp8", "mxfp4")


# ---- one expert ---------------------------------------------------------------------------------


def test_an_expert_is_read_alone_and_dense_tensors_once(tmp_path: Path, reads: list[str]) -> None:
    folder = saved(small_model("qwen3_moe"), tmp_path)
    with deferred_experts():
        model = load(folder)
    assert reads
    assert not [name for name in reads if ".experts." in name]
    assert len(set(reads)) == len(reads) == len(list(model.parameters())) - 2  # 2 banks
    reads.clear()
    bank = moe_layers(model)["model.layers.1.mlp.experts.lazarus"].experts
    bank.allocate(num_slots=2, device="cpu")
    bank.assign(1, 3)
    bank.initialise(1)
    expert = "model.layers.1.mlp.experts.3"
    assert sorted(reads) == [f"{expert}.{x}_proj.weight" for x in ("down", "gate", "up")]


def test_one_expert_of_a_fused_tensor_is_read_alone(tmp_path: Path, reads: list[str]) -> None:
    folder = saved(small_model("gpt_oss"), tmp_path)
    with deferred_experts():
        model = load(folder)
    reads.clear()
    bank = moe_layers(model)["model.layers.0.mlp.experts.lazarus"].experts
    bank.initial(2)
    assert len(reads) == 4
    assert all(name.endswith("[2]") for name in reads)


def test_a_checkpoint_without_an_expert_is_refused_before_training(tmp_path: Path) -> None:
    model = small_model("qwen3_moe")
    folder = saved(model, tmp_path)
    tensors: dict[str, StoredTensor] = stored_tensors(folder)
    with torch.device("meta"):
        twin = type(model)(model.config)
    fields = {path: expert_fields(m) for path, m in experts_modules(twin).items()}
    lost = {n: t for n, t in tensors.items() if ".experts.2.up_proj" not in n}
    with pytest.raises(ValueError, match=r"made of 4 tensors .*up_proj.*, the checkpoint has 3"):
        CheckpointSource(twin, lost, fields)
    none = {n: t for n, t in tensors.items() if ".experts." not in n}
    with pytest.raises(ValueError, match=r"the checkpoint has no experts for .*\(4 tensors"):
        CheckpointSource(twin, none, fields)


def test_a_checkpoint_that_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    folder = saved(small_model("qwen3_moe"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 8}))
    with pytest.raises(ValueError, match=r"expert 0 of model.layers.0.mlp.experts: gate_up_proj"):
        load(folder)
    tensors = {n: t.read() for n, t in stored_tensors(folder).items() if n != "model.norm.weight"}
    save_file(tensors, folder / stored.SINGLE)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"no model.norm.weight \(1 tensors in all\)"):
        load(folder)

"""Loading a rank's share of a large model takes the share's memory, not the model's.

The files have the true shapes and are holes, so they take no room on the disk.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
GB = 1 << 30
SHARD_BYTES = 4 * GB

QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}
MIXTRAL_8X7B = {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}

# Run by a process of its own: its peak is not that of the tests.
LOADING = """
import json, sys, torch
from pathlib import Path
from lazarus.hf import load
from lazarus.model.experts import deferred_experts
from lazarus.model.protocol import moe_layers
import transformers.models.{model_type}.modeling_{model_type}

def peak():
    return int(next(l for l in Path("/proc/self/status").open() if "VmHWM" in l).split()[1]) * 1024

before = peak()
with deferred_experts():
    model = load(sys.argv[1], dtype=torch.bfloat16)
built = peak()
share = sum(p.numel() * p.element_size() for p in model.parameters())
experts = 0
for layer in list(moe_layers(model).values())[:{layers}]:
    bank = layer.experts
    bank.allocate(num_slots=1, device="cpu")
    bank.weight.grad = None
    bank.assign(0, 1)
    bank.initialise(0)
    one = bank.weight.nbytes
    experts += one
found = dict(before=before, built=built, share=share, experts=experts, one=one, peak=peak())
print(json.dumps(found))
"""


def checkpoint_of_holes(folder: Path, settings: dict[str, Any]) -> Path:
    """A folder whose tensors have the names and shapes of the model's checkpoint, in bf16."""
    kind = settings["model_type"]
    config = AutoConfig.for_model(kind, **{k: v for k, v in settings.items() if k != "model_type"})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tensors = revert_weight_conversion(model, model.state_dict())
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps(config.to_dict() | {"architectures": [type(model).__name__]})
    )
    weight_map = {}
    for number, part in enumerate(shards(tensors)):
        name = f"model-{number:05d}.safetensors"
        write_holes(folder / name, part)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def shards(tensors: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    part: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if sum(t.nbytes for t in part.values()) + tensor.nbytes > SHARD_BYTES and part:
            yield part
            part = {}
        part[name] = tensor
    yield part


def write_holes(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    entries, end = {}, 0
    for name, tensor in tensors.items():
        offsets = [end, end + tensor.nbytes]
        entries[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": offsets}
        end = offsets[1]
    header = json.dumps(entries).encode()
    with file.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + end)


@pytest.mark.parametrize(
    ("settings", "layers", "size"),
    [(QWEN3_30B_A3B, 48, 57 * GB), (MIXTRAL_8X7B, 2, 87 * GB)],
    ids=["qwen3-30b-a3b", "mixtral-8x7b"],
)
def test_a_rank_loads_no_more_than_its_share(
    settings: dict[str, Any], layers: int, size: int, tmp_path: Path
) -> None:
    folder = checkpoint_of_holes(tmp_path / "model", settings)
    assert sum(f.stat().st_size for f in folder.glob("*.safetensors")) > 0.9 * size
    code = LOADING.format(model_type=settings["model_type"], layers=layers)
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    beside = GB // 4  # headers, names, allocator, and tensors that are being converted
    assert found["built"] <= found["before"] + found["share"] + beside, found
    assert found["experts"] > 0.8 * GB
    total = found["share"] + found["experts"] + 2 * found["one"]  # a row is made, then put
    assert found["peak"] <= found["before"] + total + beside, found

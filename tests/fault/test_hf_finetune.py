"""A fine-tune as users do it: a folder, conversations, LoRA, lost nodes, a join, and out again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
from fault_runs import Watched, at_step, watch
from hf_families import saved, small_model
from safetensors.torch import load_file
from small_olmoe import conversations
from small_tokenizers import tokenizer_folder

from lazarus import cli
from lazarus.hf import causal_loss, load, lora

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
cloudpickle.register_pickle_by_value(sys.modules[__name__])

STEPS = 30
TARGETS = ("q_proj", "v_proj", "gate_up_proj", "down_proj")
ASKED = "<|user|>what is 7?<|end|>\n<|assistant|>"


def adapted(base: str) -> Any:
    torch.manual_seed(1)
    return lora(load(base), targets=TARGETS, r=4, alpha=8, frozen_dtype=torch.bfloat16)


def tuned(
    folder: Path, base: str, chats: Path, *faults: str, nodes: int, **options: Any
) -> Watched:
    """Train on the conversations, and export the adapters to ``folder``/out."""
    run = watch(
        folder / "run",
        *faults,
        nodes=nodes,
        steps=STEPS,
        settings=(
            f"data.path={chats}",
            f"data.tokenizer={base}",
            "data.seq_len=32",
            "data.packing=false",
            "train.elastic_determinism=true",
            "train.global_batch=8",
            "optim.lr=0.01",
            "placement.slots_per_node=8",
            "checkpoint.full_at_end=true",
            "metrics.report=false",
        ),
        model=lambda ctx: adapted(base),
        loss=causal_loss,
        **options,
    )
    words = ["checkpoint", "export", str(folder / "run"), "--layout", "hf"]
    assert cli.main([*words, "--out", str(folder / "out")]) == 0
    return run


def said(base: str, adapters: Path) -> list[int]:
    """What transformers and peft generate from the exported adapters."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, adapters).eval()
    asked = AutoTokenizer.from_pretrained(base)(ASKED, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**asked, max_new_tokens=8, do_sample=False)
    found: list[int] = out[0].tolist()
    return found


def test_a_fine_tune_that_loses_two_nodes_says_what_one_process_says(tmp_path: Path) -> None:
    own = small_model("qwen3_moe", vocab_size=320).to(torch.bfloat16)
    base = str(tokenizer_folder(saved(own, tmp_path / "base")))
    chats = conversations(tmp_path / "chats.jsonl")
    run = tuned(
        tmp_path / "four", base, chats, "kill:1@4/backward", "kill:2@8/commit", nodes=4,
        acts=[at_step(11, Watched.start_node)],
    )  # fmt: skip
    assert len(run.of("node_lost")) == 2 and run.of("node_joined")
    assert {e["num_nodes"] for e in run.of("step_committed")} >= {2, 4}
    losses = [e["loss"] for e in run.of("step_committed")]
    assert losses[-1] < 0.7 * losses[0]

    alone = tuned(tmp_path / "one", base, chats, nodes=1)
    assert [e["loss"] for e in alone.of("step_committed")] == losses
    name = "adapter_model.safetensors"
    ours, theirs = (load_file(tmp_path / which / "out" / name) for which in ("four", "one"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert said(base, tmp_path / "four" / "out") == said(base, tmp_path / "one" / "out")

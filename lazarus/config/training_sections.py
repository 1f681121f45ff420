"""Sections that say what is trained: each key with its type, default, range and meaning."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from lazarus.config.layers import require, setting
from lazarus.config.presets import MODEL_SHAPES

_TINY = MODEL_SHAPES["tiny"]
_WORDS = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*"


def named_function(name: str | None, dotted: str) -> tuple[bool, str, str]:
    """The check of a key that names a function, for ``require``."""
    fine = name is None or re.fullmatch(f"{_WORDS}:{_WORDS}", name) is not None
    text = f'{dotted} = "{name}" must be "package.module:function"'
    return fine, dotted.partition(".")[2], text


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The built-in GPT-MoE by its shape, or another model; not read when one is given in Python."""

    SECTION: ClassVar[str] = "model"

    preset: Literal["tiny", "gpt-s", "gpt-m", "gpt-l"] | None = setting(None, "a named shape")
    hf: str | None = setting(
        None, "folder of a Hugging Face model with experts, which is trained; needs the extra `hf`"
    )
    builder: str | None = setting(
        None, '"package.module:function" that builds another model, `function(ctx)`'
    )
    layers: int = setting(_TINY["layers"], "transformer blocks", ge=1)
    dim: int = setting(_TINY["dim"], "width of the residual stream", ge=1)
    heads: int = setting(_TINY["heads"], "attention heads; divides dim", ge=1)
    vocab: int = setting(_TINY["vocab"], "token ids; 256 for bytes of text", ge=2)
    seq_len: int = setting(_TINY["seq_len"], "tokens of a sample", ge=1)
    experts: int = setting(_TINY["experts"], "experts of each MoE layer", ge=1)
    top_k: int = setting(_TINY["top_k"], "experts that a token is sent to", ge=1)
    ffn_mult: int = setting(_TINY["ffn_mult"], "hidden width of an expert / dim", ge=1)
    moe_every: int = setting(_TINY["moe_every"], "every n-th block has experts", ge=1)

    def __post_init__(self) -> None:
        require(
            self,
            (
                self.dim % self.heads == 0,
                "heads",
                f"model.heads={self.heads} does not divide model.dim={self.dim}",
            ),
            (
                self.top_k <= self.experts,
                "top_k",
                f"model.top_k={self.top_k} is more than model.experts={self.experts}",
            ),
            (
                self.moe_every <= self.layers,
                "moe_every",
                f"model.moe_every={self.moe_every} leaves no MoE layer among "
                f"model.layers={self.layers}",
            ),
            named_function(self.builder, "model.builder"),
            (
                self.builder is None or self.hf is None,
                "builder",
                "model.builder and model.hf are both set; one of them builds the model",
            ),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What is read; who reads which sample is decided by the run alone."""

    SECTION: ClassVar[str] = "data"

    path: str | None = setting(
        None,
        "text file, folder, `.npy` or `.bin` tokens; with a tokenizer also `.jsonl`, `.parquet` or "
        "a folder saved by `datasets`; none: Python's sources",
    )
    source: str | None = setting(
        None, '"package.module:function" that opens another data source, `function(ctx)`'
    )
    tokenizer: str | None = setting(
        None,
        'a file or folder of a tokenizer; "hf": that in the folder `model.hf`; none: text is read '
        "as bytes",
    )
    text_key: str = setting(
        "text",
        "column of JSON lines, parquet and `datasets` that holds texts or conversations; if there "
        "is none, `messages`",
    )
    packing: bool = setting(
        True,
        "with a tokenizer: join documents, with end-of-text behind each, and cut them into windows "
        "of `seq_len`; false: a document is a sample, cut or padded to `seq_len`",
    )
    seq_len: int | None = setting(None, "none: `model.seq_len`", ge=1)
    num_shards: int = setting(64, "shards of a stream; fixed for the run's life", ge=1)
    shuffle_shards: bool = setting(False, "read a stream's shards in an order drawn from the seed")
    prefetch_steps: int = setting(2, "steps read ahead; prefetched is not consumed", ge=0)
    split: float = setting(
        0.99, "part of the samples that are trained on; the rest is held out", gt=0, le=1
    )

    def __post_init__(self) -> None:
        require(self, named_function(self.source, "data.source"))


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """The training loop."""

    SECTION: ClassVar[str] = "train"

    steps: int = setting(1000, "steps to commit", ge=1)
    global_batch: int = setting(32, "samples of every step, whatever the number of ranks", ge=1)
    micro_batch_size: int = setting(4, "the most samples of a rank in one round", ge=1)
    precision: Literal["fp32", "bf16"] = setting("fp32", "bf16 keeps fp32 masters and moments")
    recompute: bool = setting(False, "recompute activations in the backward pass")
    elastic_determinism: bool = setting(
        False,
        "the same bits after every step on any number of ranks, whatever was lost: a micro-batch "
        "is a fixed unit of samples, and sums run in the order of the units",
    )
    gradient_chains: int = setting(
        1,
        "elastic_determinism: partial sums of dense gradients, fixed for the run's life; more save "
        "traffic where the number of ranks divides them, and cost memory",
        ge=1,
    )
    on_nonfinite: Literal["skip", "stop"] = setting(
        "skip",
        "a step whose loss or gradient norm is not finite: leave its update out, until ten in a "
        "row end the run, or end the run at once",
    )
    scratch_buffers: tuple[str, ...] = setting(
        (),
        "names or patterns (`blocks.*.seen`) of persistent buffers that are each rank's own: never "
        "averaged, compared, sent or saved",
    )
    loss: str | None = setting(
        None, '"package.module:function" that computes another loss, `function(model, batch)`'
    )

    def __post_init__(self) -> None:
        require(self, named_function(self.loss, "train.loss"))


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW and its schedule, unless the optimizer is given in Python."""

    SECTION: ClassVar[str] = "optim"

    lr: float = setting(3e-4, "peak learning rate", gt=0)
    betas: tuple[float, float] = setting((0.9, 0.95), "AdamW's decay rates")
    eps: float = setting(1e-8, "AdamW's epsilon", gt=0)
    weight_decay: float = setting(0.1, "of matrices; vectors are not decayed", ge=0)
    clip_norm: float = setting(1.0, "global gradient norm; 0 turns clipping off", ge=0)
    schedule: Literal["cosine", "wsd", "constant"] = setting("cosine", "learning rate over steps")
    warmup_steps: int = setting(100, "linear warm-up", ge=0)
    min_lr_ratio: float = setting(0.1, "last learning rate / lr", ge=0, le=1)
    builder: str | None = setting(
        None, '"package.module:function" that makes another optimizer, `function(groups)`'
    )

    def __post_init__(self) -> None:
        require(
            self,
            (
                all(0 <= beta < 1 for beta in self.betas),
                "betas",
                f"optim.betas={list(self.betas)} must lie in [0, 1)",
            ),
            named_function(self.builder, "optim.builder"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """Held-out loss."""

    SECTION: ClassVar[str] = "eval"

    every: int = setting(0, "steps between evaluations; 0: none", ge=0)
    batches: int = setting(16, "global batches of an evaluation", ge=1)

    def __post_init__(self) -> None:
        require(self)

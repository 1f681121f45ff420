"""A Hugging Face model on 3 nodes, one of which is killed: python examples/hugging_face.py [FOLDER]

Without a folder, a small Qwen3-MoE that knows bytes is made first.
"""

import sys

from lazarus import ElasticTrainer, TrainConfig


def small_model(folder: str) -> str:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    shape = {"hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    experts = {"num_experts": 8, "num_experts_per_tok": 2}
    config = Qwen3MoeConfig(vocab_size=256, **shape, **heads, **experts)
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    given = len(sys.argv) > 1
    folder = sys.argv[1] if given else small_model("small-qwen3")
    settings = [f"model.hf={folder}", "cluster.nodes=3", "train.steps=12", "optim.lr=1e-3"]
    settings += ["data.seq_len=64", "optim.warmup_steps=2"]
    if given:
        settings += ["data.tokenizer=hf"]  # a real model reads text by its own tokenizer
    trainer = ElasticTrainer(TrainConfig.load(overrides=settings), faults=["kill:1@6"])
    result = trainer.fit()
    result.save_pretrained("trained", like=folder)
    print(f"{result.steps} steps, loss {result.final_loss:.3f}, model in trained")

"""An own model with experts on 3 nodes, one of which is killed: python examples/own_model.py"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lazarus import ElasticTrainer, LossSum, MoELayer, TrainConfig


class Reader(nn.Module):
    """Bytes in, logits of the next byte out: a recurrent layer, then experts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 64)
        self.memory = nn.GRU(64, 64, batch_first=True)
        self.experts = MoELayer(dim=64, hidden=128, num_experts=8, top_k=2)
        self.head = nn.Linear(64, 256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.memory(self.embed(tokens))[0]
        return self.head(x + self.experts(x))


def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> LossSum:
    logits, wanted = model(batch["tokens"][:, :-1]), batch["tokens"][:, 1:].flatten()
    return LossSum(cross_entropy(logits.flatten(0, 1), wanted, reduction="sum"), wanted.numel())


if __name__ == "__main__":
    settings = ["cluster.nodes=3", "train.steps=30", "optim.lr=2e-3", "optim.warmup_steps=3"]
    config = TrainConfig.load(overrides=settings)
    trainer = ElasticTrainer(config, model=lambda ctx: Reader(), loss=loss, faults=["kill:1@15"])
    result = trainer.fit()
    print(f"{result.steps} steps, loss {result.final_loss:.3f}, record {result.run_dir}")

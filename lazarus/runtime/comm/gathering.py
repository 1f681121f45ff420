"""All-gather of texts of different lengths, over an exchange that carries tensors."""

from __future__ import annotations

import torch

from dispatcher.exchange import Exchange


def gather_texts(text: str, exchange: Exchange, *, device: torch.device) -> list[str]:
    """Gather a text from every rank, by two all-gathers: lengths, then padded bytes.

    Args:
        text: This rank's text.
        exchange: Collectives over the ranks.
        device: Device of the exchange's tensors.

    Returns:
        The texts of all ranks, in rank order.
    """
    own = text.encode()
    lengths_R = torch.zeros(exchange.size, dtype=torch.int64, device=device)
    length = torch.tensor([len(own)], dtype=torch.int64, device=device)
    exchange.all_gather(lengths_R, length, label="digest")
    sizes = lengths_R.tolist()
    widest = max(1, *sizes)
    padded = torch.zeros(widest, dtype=torch.uint8)
    padded[: len(own)] = torch.frombuffer(bytearray(own or b"\0"), dtype=torch.uint8)[: len(own)]
    everybody = torch.empty(exchange.size * widest, dtype=torch.uint8, device=device)
    exchange.all_gather(everybody, padded.to(device), label="digest")
    rows = everybody.cpu().view(exchange.size, widest).numpy()
    return [rows[rank, :size].tobytes().decode() for rank, size in enumerate(sizes)]

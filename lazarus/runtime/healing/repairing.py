"""Repair of copies that a comparison during training has found outvoted."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Protocol

import torch

from dispatcher.exchange import Exchange
from lazarus.control.messages import Move, Prepare
from lazarus.runtime.comm.gathering import gather_texts
from lazarus.runtime.healing.transfer import TransferRun
from lazarus.runtime.state.compare import Difference
from lazarus.runtime.state.flat_bytes import DenseImage
from lazarus.runtime.state.replica import Replica


class InCommon(Protocol):
    """The part of ``worker.common_state.CommonState`` that comparison and repair use."""

    def checksum(self) -> int: ...

    def scalars(self) -> str: ...

    def take_numbers(self, scalars: str, history: bytes) -> None: ...

    def stand_still(self) -> None: ...


def repair(
    found: Sequence[Difference],
    replica: Replica,
    exchange: Exchange,
    *,
    common: InCommon,
    generation: int,
    step: int,
) -> None:
    """Give outvoted ranks the majority's bits. All ranks must call this.

    Everything is received and verified before anything is written, so that a loss during the
    transfer leaves every rank unchanged.

    Args:
        found: Differences with a majority, the same list on all ranks.
        replica: This rank's state.
        exchange: The group of all ranks.
        common: State that all ranks have in common.
        generation: The current generation.
        step: The step after which copies were compared.
    """
    dense = next((d for d in found if d.layer < 0), None)
    order = _order(found, dense, generation=generation, step=step)
    staging = {}
    if dense is not None and exchange.rank in dense.odd:
        staging = {name: torch.empty_like(t) for name, t in replica.dense_tensors()}
    feed = TransferRun(
        order,
        exchange,
        read_record=replica.read_record,
        dense=DenseImage(list(staging.values())) if staging else replica.dense_image(),
        record_bytes=replica.record_bytes,
        device=replica.device,
    )
    feed.run()
    texts: list[str] = []
    if dense is not None:
        texts = gather_texts(_text(replica, common), exchange, device=replica.device)
    if not (staging or feed.staged):
        return
    common.stand_still()
    for (layer, expert), record in feed.staged.items():
        replica.write_record(layer, replica.slot_of(layer, expert), record)
    if dense is not None and staging:
        said = json.loads(texts[_sound(dense)[0]])
        replica.load_dense(staging)
        common.take_numbers(said["scalars"], base64.b64decode(said["history"]))


def _sound(difference: Difference) -> list[int]:
    """Ranks that hold the majority's copy."""
    return [rank for rank in difference.holders if rank not in difference.odd]


def _order(
    found: Sequence[Difference], dense: Difference | None, *, generation: int, step: int
) -> Prepare:
    """The transfers, in the form of a PREPARE order."""
    moves = []
    for difference in found:
        if difference.layer < 0:
            continue
        sources = _sound(difference)
        for at, target in enumerate(difference.odd):
            source = sources[at % len(sources)]
            moves.append(
                Move(layer=difference.layer, expert=difference.expert, source=source, target=target)
            )
    return Prepare(
        generation=generation,
        step=step,
        seats=(),
        feeders=(),
        plan="",
        moves=tuple(moves),
        dense_sources=() if dense is None else tuple(_sound(dense)),
        dense_targets=() if dense is None else dense.odd,
    )


def _text(replica: Replica, common: InCommon) -> str:
    history = replica.history.astype("<f8").tobytes()
    return json.dumps({"scalars": common.scalars(), "history": base64.b64encode(history).decode()})

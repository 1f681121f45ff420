"""A device for every rank and a storage for all, where two cores and a local disk stand for them.

The device: forward and backward of a rank's samples take their time, a part of it where the samples
are and a part where the experts are that serve their tokens; the real work runs inside that time
and the rank waits out the rest. So a lost node takes its compute with it, and a rank whose experts
everybody wants keeps the others waiting.
The storage: a full checkpoint takes at least ``write_s``, to write and to read.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_GIVE_UP_S = 2.0  # a checkpoint that a loss has cut short will never be there


@dataclass
class Device:
    """One rank's.

    Args:
        sample_s: A sample takes so long if its tokens' experts are here, no more and no fewer.
        expert_part: So much of it is the experts' and goes with the rows that they serve.
        rows: Rows that a sample's tokens make, over all layers.
    """

    sample_s: float
    expert_part: float
    rows: int
    _began: float = 0.0
    _samples: int = 0
    _served: int = 0

    def begin(self, samples: int) -> None:
        """Forward of so many samples begins."""
        self._began, self._samples, self._served = time.monotonic(), samples, 0

    def serve(self, rows: int) -> None:
        """Experts that are here serve so many rows in one layer."""
        self._served += rows

    def finish(self) -> None:
        """The backward is done here: wait for the device."""
        dense = (1 - self.expert_part) * self._samples
        until(self._began + self.sample_s * (dense + self.expert_part * self._served / self.rows))


def count_rows(device: Device) -> None:
    """Let the device know of all rows that our MoE layers serve in this process."""
    from lazarus.model import routed as layers

    path = layers.expert_path

    def counted(x_TD: Any, gate_TK: Any, weight: Any, routed: Any, *args: Any, **more: Any) -> Any:
        device.serve(routed.num_received)
        return path(x_TD, gate_TK, weight, routed, *args, **more)

    layers.expert_path = counted


def until(moment: float) -> None:
    """Wait until the monotonic clock says so; at once if it has passed."""
    left = moment - time.monotonic()
    if left > 0:
        time.sleep(left)


@dataclass
class Modelled:
    """Our trainer's loss and worker hook: devices, and saves that training waits for.

    Args:
        device: What every rank has.
        every: Steps between saves that training waits for; 0: it waits for none.
        url: Folder of the checkpoints.
        log: Rank 0 notes there what saves and reads cost.
        reads: Whether a life begins with reading a full checkpoint.
    """

    device: Device
    write_s: float
    every: int
    url: Path
    log: Path
    reads: bool
    _last: int = 0

    def loss(self, model: Any, batch: Any) -> Any:
        """Next-token cross-entropy on the modelled device."""
        from lazarus.model import gpt

        self.device.begin(len(batch["tokens"]))
        return gpt.loss(model, batch)

    def on_setup(self, ctx: Any, model: Any) -> None:
        """The token embedding's gradient is the last of a backward."""
        del ctx
        if self.device.sample_s:
            count_rows(self.device)
            weight = model.token_embedding.weight
            weight.register_post_accumulate_grad_hook(lambda _: self.device.finish())
        if self.reads:
            until(time.monotonic() + self.write_s)

    def on_commit(self, ctx: Any, step: int) -> None:
        """A save, if one is due; after a rollback the read that it took."""
        if not self.every:
            return
        if step <= self._last:
            until(time.monotonic() + self.write_s)
            self._note(ctx, read_s=self.write_s)
        self._last = step
        if step % self.every == 0:
            began = time.monotonic()
            self._save(step, began=began)
            self._note(ctx, save_s=time.monotonic() - began)

    def _save(self, step: int, *, began: float) -> None:
        """As long as the modelled storage takes; without one, until the checkpoint is durable."""
        from lazarus.checkpoint.format.manifest import manifest_path

        until(began + self.write_s)
        manifest = self.url / manifest_path(step)
        while not self.write_s and not manifest.exists() and time.monotonic() < began + _GIVE_UP_S:
            time.sleep(0.005)

    def _note(self, ctx: Any, **fields: float) -> None:
        if ctx.rank == 0:
            with self.log.open("a", encoding="utf-8") as out:
                out.write(json.dumps({"t": time.time(), **fields}) + "\n")

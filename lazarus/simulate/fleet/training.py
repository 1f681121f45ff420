"""The training of a simulated fleet: steps over time, cost of changes, snapshots, rollbacks."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from lazarus.checkpoint.restoring.plt import PltLedger
from lazarus.checkpoint.restoring.restore_choice import Source
from lazarus.checkpoint.selection.schedule import ScheduleConfig
from lazarus.control.messages import Held, Prepare
from lazarus.control.vector import HISTORY_DECAY
from lazarus.record.loads import Floats
from lazarus.simulate.fleet.bodies import holdings
from lazarus.simulate.fleet.copies import CopyBook
from lazarus.simulate.inputs.costs import replicated_step
from lazarus.simulate.past import Past, Stretch
from lazarus.simulate.rows import Setting, Tally
from placement import Plan

_DRIFT_STEPS = 200  # steps after which load and step time are updated


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Duration of a change of nodes, in seconds, and what the change moves."""

    groups_s: float
    transfer_s: float
    experts: int
    num_bytes: float
    restored: int

    @property
    def total_s(self) -> float:
        return self.groups_s + self.transfer_s


class Training:
    """Training steps of a fixed batch, at the step time of the present plan."""

    def __init__(self, setting: Setting, tally: Tally) -> None:
        self._setting, self._tally = setting, tally
        self._costs, self._shape = setting.costs, setting.shape
        self._layers = setting.placed_layers or setting.shape.moe_layers
        self._scale = setting.shape.moe_layers / self._layers
        self._since: float | None = None
        self._plan: Plan | None = None
        self.step = 0
        self.step_s = 0.0
        self.first_step_s = 0.0
        self.held: dict[str, tuple[Held, ...]] = {}
        self.copies = CopyBook(schedule_of(setting, self._layers))
        self.generation = 0
        self._past = Past()
        self._first_history = np.zeros((3, self._layers, setting.shape.experts))
        self._first_history[0] = self.load()
        self.history = self._first_history

    @property
    def running(self) -> bool:
        """Whether steps are being computed now."""
        return self._since is not None

    def load(self) -> Floats:
        """Return each expert's share of its layer's routed copies now, [placed layers, E]."""
        return self._load_at(self.step)

    def _load_at(self, step: int) -> Floats:
        shares: Floats = self._setting.load.at(self._setting.loads_step + step)
        return shares[: self._layers]

    def _rate_at(self, step: int) -> Floats:
        """Token copies that the step routes to each expert, [placed layers, E]."""
        return self._load_at(step) * self._setting.tokens_per_step * self._shape.top_k

    def history_at(self, step: int) -> Floats:
        """Return the load history as of an earlier step that was not undone, [3, L, E]."""
        history = self._first_history
        for stretch in self._past.stretches:
            if stretch.first < step:
                count = min(stretch.last, step) - stretch.first
                history = _advanced(history, self._rate_at(stretch.first), count)
        return history

    # ---- steps -----------------------------------------------------------------------------------

    def progress(self, now_s: float) -> None:
        """Commit every step that is complete at ``now_s``."""
        if self._since is None or self.step_s <= 0:
            return
        count = int((now_s - self._since) / self.step_s + 1e-9)
        if self._setting.steps:
            count = min(count, self._setting.steps - self.step)
        if count <= 0:
            return
        assert self._plan is not None
        rate = self._rate_at(self.step)
        self.history = _advanced(self.history, rate, count)
        stretch = Stretch(
            first=self.step, last=self.step + count, step_s=self.step_s,
            tokens=self._setting.tokens_per_step,
        )  # fmt: skip
        self._past.went_on(stretch)
        self.copies.committed(
            self.step + 1,
            self.step + count,
            self._plan,
            generation=self.generation,
            routed_LE=self.history[1],
            rate_LE=rate,
        )
        self.step += count
        self._since += count * self.step_s
        self._tally.steps += count
        self._tally.tokens += count * self._setting.tokens_per_step
        self._tally.productive_s += count * self.step_s

    def stop(self, now_s: float) -> None:
        """Stop training; the step in progress is lost and will be repeated."""
        self.progress(now_s)
        self._since = None

    def step_done_at(self, now_s: float) -> float:
        """Return the time at which the step in progress will be complete."""
        if self._since is None:
            return now_s
        begun = int((now_s - self._since) / self.step_s + 1e-9)
        return self._since + (begun + 1) * self.step_s

    def done_at(self) -> float | None:
        """Return when the last wanted step will be complete; None if unlimited or stopped."""
        if not self._setting.steps or self._since is None:
            return None
        return self._since + (self._setting.steps - self.step) * self.step_s

    def renew_step(self) -> None:
        """Update the step time to the present plan and load."""
        assert self._plan is not None
        parts = replicated_step(
            self._costs,
            self._shape,
            self._plan,
            self.load(),
            tokens=self._setting.tokens_per_step,
        )
        every = self.copies.config.snapshot_every
        self.step_s = parts.total * (1 + self._costs.snapshot_overhead / every)
        self.first_step_s = self.first_step_s or self.step_s

    def next_drift(self, now_s: float) -> float | None:
        """Return when to update the load next; None if the load is constant or training stopped."""
        if len(self._setting.load.steps) < 2 or self._since is None:
            return None
        return max(now_s, self._since) + _DRIFT_STEPS * self.step_s

    # ---- changes ---------------------------------------------------------------------------------

    def resume(
        self,
        now_s: float,
        *,
        plan: Plan,
        seats: tuple[str, ...],
        step: int,
        generation: int,
        run: bool,
    ) -> None:
        """Start a generation at a committed step; with ``run`` False training stays stopped."""
        self._plan, self.step, self.generation = plan, step, generation
        self.held = holdings(plan, seats)
        self.renew_step()
        self._since = now_s + self._costs.warming_s(len(seats)) if run else None

    def prepare(self, order: Prepare) -> Work:
        """Return the cost of a change: new groups, transfer of the busiest node, restores."""
        record, dense = self._shape.expert_bytes * self._scale, self._shape.dense_bytes
        sent = Counter(move.source for move in order.moves)
        got = Counter(move.target for move in order.moves)
        joining = len(order.dense_targets)
        senders = max(1, len(order.dense_sources))
        busiest = max(
            max(sent.values(), default=0) * record + dense * joining / senders,
            max(got.values(), default=0) * record + (dense if joining else 0.0),
        )
        moved = len(order.moves) * record + joining * dense
        restores = [r.detail.split(",")[0] for r in order.restores if r.detail]
        stored = restores.count(Source.STORAGE.label) * record
        remembered = sum(name.endswith("_snapshot") for name in restores) * record
        restore_s = self._costs.checkpoint_s(stored)
        restore_s += remembered / self._costs.net_bytes_per_s
        if order.reload and order.reload != "init":  # a rollback: all of the checkpoint
            restore_s += self._costs.checkpoint_s(self._shape.total_bytes)
        fixed = self._costs.transfer_fixed_s if moved or restores or order.reload else 0.0
        return Work(
            groups_s=self._costs.grouping_s(len(order.seats)),
            transfer_s=fixed + busiest / self._costs.net_bytes_per_s + restore_s,
            experts=round(len(order.moves) * self._scale),
            num_bytes=moved,
            restored=round(len(restores) * self._scale),
        )

    def prepared(self, work: Work) -> None:
        """Count what a completed change moved."""
        self._tally.experts_moved += work.experts
        self._tally.bytes_moved += work.num_bytes
        self._tally.experts_restored += work.restored

    def billed(self, lost_copies: float) -> None:
        """Count the token copies that a restored expert lost, scaled to all layers of the model."""
        self._tally.lost_copies += lost_copies * self._scale

    def go_back(self, step: int, ledger: PltLedger) -> PltLedger:
        """Roll back to the checkpoint of ``step``.

        Args:
            step: Step of the checkpoint.
            ledger: Lost tokens (PLT) so far.

        Returns:
            The ledger, plus the losses of experts that were saved before the checkpoint's step.
        """
        self.history = self.history_at(step)
        self._tally.undo(self._past.back_to(step))
        self.step, self._since, self.held = step, None, {}
        self.copies.go_back(step, routed_LE=self.history[1])
        routed = self.history[1].astype(np.int64).tolist()
        ledger = ledger.rolled_back(routed)
        for layer, saved in enumerate(self.copies.counts_on_storage()):
            for expert, count in enumerate(saved):
                if count < (now := routed[layer][expert]):
                    ledger, _ = ledger.restored(
                        layer=layer, expert=expert, version_routed=count, routed=now
                    )
        self._tally.lost_copies = sum(ledger.lost_by_expert().values()) * self._scale
        return ledger

    def start_again(self, ledger: PltLedger) -> PltLedger:
        """Roll back to the newest checkpoint on storage, after the loss of all nodes."""
        ledger = self.go_back(self.copies.full_step, ledger)
        self.copies.start_from_storage()
        return ledger


def _advanced(history: Floats, rate_LE: Floats, count: int) -> Floats:
    """The load history after ``count`` more steps at a constant rate."""
    fade = HISTORY_DECAY**count
    recent = history[0] * fade + rate_LE * (1 - fade)
    return np.stack([recent, history[1] + count * rate_LE, rate_LE])


def schedule_of(setting: Setting, layers: int) -> ScheduleConfig:
    """Return the snapshot and checkpoint schedule of a setting."""
    experts = setting.shape.experts
    k_persist = setting.k_persist or max(1, experts // 8)
    every = max(1, setting.checkpoint_every // 10)
    return ScheduleConfig(
        num_layers=layers,
        num_experts=experts,
        k_snapshot=min(experts, 2 * k_persist),
        k_persist=k_persist,
        snapshot_every=every,
        persist_every=every * max(1, setting.checkpoint_every // every),
    )

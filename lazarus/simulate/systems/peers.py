"""Models of other systems ("peers") on the same virtual clock and costs, for comparison.

A peer holds each expert once per group of ``group`` nodes and uses as many complete groups as the
live nodes allow.

* ``ds``: fixed expert parallelism; every loss restarts all processes from the last full checkpoint
  on storage.
* ``ds-ft``: if the remaining groups still hold every expert, new groups are formed without a loss
  of steps; otherwise a restart as in ``ds``.
* ``peer-memory``: every step is copied to another node's host memory. After a loss a spare node
  takes over and at most two steps are repeated; without a spare the system shrinks by a group.

A loss during a restart or reconfiguration begins the restart or reconfiguration again at once. A
loss during a checkpoint is noticed after the checkpoint, because no collective can time out before.

Source: the Lazarus paper's baselines; Gemini and MoEvement for ``peer-memory``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lazarus.simulate.inputs.costs import grouped_step
from lazarus.simulate.inputs.faults import fleet_of
from lazarus.simulate.inputs.traces import FleetEvent
from lazarus.simulate.past import Past, Stretch
from lazarus.simulate.rows import Row, Setting, Tally

KINDS = ("ds", "ds-ft", "peer-memory")
REDONE_STEPS = 2  # peer-memory: the step in progress and the step being copied
MEMORY_OVERHEAD = 0.02  # fraction of a step, for copying the state to another node


@dataclass(frozen=True, kw_only=True)
class PeerPolicy:
    """A model of another system: one of ``KINDS``, and the number of spare nodes."""

    name: str
    kind: str
    spares: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pause:
    """A time without training. For a checkpoint, ``saved`` is the step of the previous one."""

    why: str
    start_s: float
    end_s: float
    saved: int | None = None


class PeerRun:
    """One simulated run of another system under one seed."""

    def __init__(self, setting: Setting, *, policy: PeerPolicy, seed: int) -> None:
        self._setting, self._policy, self._seed = setting, policy, seed
        self._costs, self._shape = setting.costs, setting.shape
        self._now = 0.0
        self._group = setting.group
        self._live: list[str] = []
        self._active: tuple[str, ...] = ()
        self._step = 0
        self._saved = 0
        self._step_s = 0.0
        self._tokens = 0.0
        self._part_s = 0.0  # time spent on the step in progress
        self._past = Past()
        self._pauses: list[_Pause] = []  # since the last step
        self._recovery = (0.0, 0.0)  # start and end of the last recovery
        self._resumed = 0  # step from which training went on after the last recovery
        self._full = policy.kind == "peer-memory"
        every = {"ds": setting.full_checkpoint_every, "ds-ft": setting.ft_checkpoint_every}
        self._every = every.get(policy.kind, setting.ft_checkpoint_every)
        self.tally = Tally()
        self._first_step_s = 0.0

    def run(self) -> Row:
        """Simulate until the horizon or the last wanted step, and return the result."""
        setting = self._setting
        start = fleet_of(setting.faults, setting.num_nodes)
        events = setting.faults.events(
            num_nodes=len(start), horizon_s=setting.horizon_s, seed=self._seed
        )
        self._live = list(start)
        self._form()
        self._first_step_s = self._step_s
        waiting: list[tuple[float, tuple[str, ...]]] = []
        pending = [replace(e) for e in events]
        while pending or waiting:
            at_s, is_join = self._next_moment(pending, waiting)
            if at_s >= setting.horizon_s or self._complete():
                break
            self._train_until(at_s)
            if is_join:
                self._joined([n for _, nodes in waiting for n in nodes])
                waiting = []
            else:
                event = pending.pop(0)
                if event.kind == "add":
                    waiting.append((event.at_s, event.nodes))
                else:
                    waiting = [
                        (t, tuple(n for n in ns if n not in event.nodes)) for t, ns in waiting
                    ]
                    self._lost(event)
        self._train_until(setting.horizon_s)
        wall_s = min(self._now, setting.horizon_s) if self._complete() else setting.horizon_s
        return self.tally.row(
            setting, policy=self._policy.name, seed=self._seed, wall_s=wall_s,
            nodes=len(self._live), first_step_s=self._first_step_s, decided_by="model of a peer",
        )  # fmt: skip

    def _next_moment(
        self, pending: list[FleetEvent], waiting: list[tuple[float, tuple[str, ...]]]
    ) -> tuple[float, bool]:
        """Time of the next fleet event or end of the wait for joiners; True in the second case."""
        event_s = pending[0].at_s if pending else float("inf")
        wait = self._setting.peer_join_wait_s + self._costs.start_s
        join_s = waiting[0][0] + wait if waiting else float("inf")
        return (join_s, True) if join_s < event_s else (event_s, False)

    def _complete(self) -> bool:
        return bool(self._setting.steps) and self._step >= self._setting.steps

    # ---- training --------------------------------------------------------------------------------

    def _chosen(self) -> tuple[str, ...]:
        """The nodes of as many complete groups as possible, without spares."""
        usable = len(self._live)
        if self._policy.kind == "peer-memory":
            usable = min(usable, self._setting.num_nodes - self._policy.spares)
        count = usable // self._group * self._group
        kept = [n for n in self._active if n in self._live]
        fresh = [n for n in self._live if n not in kept]
        return tuple((kept + fresh)[:count])

    def _form(self) -> None:
        self._active = self._chosen()
        self._renew_step()

    def _renew_step(self) -> None:
        if not self._active:
            return
        setting = self._setting
        part = len(self._active) / setting.num_nodes if setting.peer_batch_per_node else 1.0
        self._tokens = setting.tokens_per_step * part
        load = setting.load.at(setting.loads_step + self._step)
        self._step_s = grouped_step(
            self._costs,
            self._shape,
            load,
            nodes=len(self._active),
            group=self._group,
            tokens=self._tokens,
        ).total
        if self._full:
            self._step_s *= 1 + MEMORY_OVERHEAD

    def _train_until(self, end_s: float) -> None:
        """Train until ``end_s``, with a checkpoint after every ``_every`` steps."""
        if self._now >= end_s:
            return  # still recovering
        if not self._active:
            self.tally.stall("waiting for nodes", end_s - self._now)
            self._now = end_s
            return
        save_s = 0.0 if self._full else self._costs.checkpoint_s(self._shape.total_bytes)
        while self._now < end_s and not self._complete():
            left = self._every - (self._step - self._saved)
            budget = end_s - self._now + self._part_s
            count = min(left, int(budget / self._step_s + 1e-9))
            if self._setting.steps:
                count = min(count, self._setting.steps - self._step)
            if count == 0:
                self._part_s, self._now = budget, end_s
                return
            self._pauses.clear()
            stretch = Stretch(
                first=self._step, last=self._step + count, step_s=self._step_s, tokens=self._tokens
            )
            self._past.went_on(stretch)
            self._step += count
            self.tally.steps += count
            self.tally.tokens += count * self._tokens
            self.tally.productive_s += count * self._step_s
            self._now += count * self._step_s - self._part_s
            self._part_s = 0.0
            if count == left:
                self._save(save_s)
            if len(self._setting.load.steps) > 1:
                self._renew_step()

    def _save(self, save_s: float) -> None:
        self._pause("checkpoint", save_s, saved=self._saved)
        self._saved = self._step

    # ---- changes ---------------------------------------------------------------------------------

    def _lost(self, event: FleetEvent) -> None:
        gone = [n for n in event.nodes if n in self._live]
        positions = {n: i % self._group for i, n in enumerate(self._active)}
        hit = [n for n in gone if n in positions]
        self._live = [n for n in self._live if n not in gone]
        self.tally.losses += len(gone)
        if not hit:
            return  # a spare node; training is not affected
        held = {positions[n] for n in self._active if n in self._live}
        whole = held == set(range(self._group))
        since_s, until_s = self._recovery
        again = event.at_s < until_s
        self._cut(event.at_s)
        self._part_s = 0.0
        before = since_s if again else max(self._now, event.at_s)
        if self._policy.kind == "ds-ft" and whole:
            self._pause("reconfigure", self._costs.peer_reconfigure_s)
            self._form()
        elif self._full and (whole or self._spare()):
            self._roll_back(max(self._saved, self._resumed, self._step - REDONE_STEPS))
            moved = self._shape.total_bytes / max(1, self._group) / self._costs.net_bytes_per_s
            self._pause("restart", self._costs.peer_detect_s + self._costs.peer_restart_s + moved)
            self._form()
        else:
            self._restart()
        if again:
            self.tally.recovery_s.pop()
        self.tally.recovery_s.append(self._now - before)
        self._recovery, self._resumed = (before, self._now), self._step

    def _cut(self, at_s: float) -> None:
        """Undo pauses planned beyond a loss at ``at_s``; a started checkpoint is completed."""
        while self._pauses and self._pauses[-1].end_s > at_s:
            pause = self._pauses[-1]
            if pause.saved is not None and pause.start_s < at_s:
                self._now = pause.end_s
                return
            if pause.saved is not None:
                self._saved = pause.saved
            self.tally.stall(pause.why, max(pause.start_s, at_s) - pause.end_s)
            self._now = max(pause.start_s, at_s)
            self._pauses.pop()

    def _spare(self) -> bool:
        return len(self._live) >= len(self._active)

    def _restart(self) -> None:
        """Restart all processes from the last full checkpoint."""
        self.tally.restarts += 1
        self._roll_back(self._saved)
        self._form()
        read_s = self._costs.checkpoint_s(self._read_bytes())
        self._pause("detect", self._costs.peer_detect_s)
        self._pause("restart", self._costs.peer_restart_s + read_s)

    def _read_bytes(self) -> float:
        """Bytes that a restart reads from the shared storage."""
        if not self._costs.peer_reads_all:
            return self._shape.total_bytes
        groups = len(self._active) // self._group
        experts = self._shape.total_bytes - self._shape.dense_bytes
        return groups * experts + len(self._active) * self._shape.dense_bytes

    def _roll_back(self, step: int) -> None:
        self.tally.undo(self._past.back_to(step))
        self._step = step

    def _pause(self, why: str, seconds: float, *, saved: int | None = None) -> None:
        self.tally.stall(why, seconds)
        end_s = self._now + seconds
        self._pauses.append(_Pause(why=why, start_s=self._now, end_s=end_s, saved=saved))
        self._now = end_s

    def _joined(self, nodes: list[str]) -> None:
        """Include joining nodes if they complete another group; otherwise they are spares."""
        self._live += [n for n in nodes if n not in self._live]
        self.tally.joins += len(nodes)
        before = len(self._active)
        if len(self._chosen()) <= before:
            return
        self._part_s = 0.0
        if self._policy.kind == "ds-ft" and before:
            self._pause("reconfigure", self._costs.peer_reconfigure_s)
        else:
            if before:
                self._save(self._costs.checkpoint_s(self._shape.total_bytes))
            self.tally.restarts += 1
            self._form()
            read_s = self._costs.checkpoint_s(self._read_bytes())
            self._pause("restart", self._costs.peer_restart_s + read_s)
        self._form()

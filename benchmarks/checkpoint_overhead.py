"""What does a checkpoint cost the step? None, partial, full asynchronous, full synchronous.

    python benchmarks/checkpoint_overhead.py [--quick] [--json FILE] [--every M] [--rounds R]

One trainer process (one thread) with the project's GPT-MoE and AdamW, one keeper process, files
on the local disk. A round runs one block of M steps per mode, one checkpoint each, in rotating
order; a mode's overhead is the median over rounds of its block's wall time against the block
without checkpoints of the same round, and beside it that of the fastest blocks (on a shared box the
one that was disturbed least). "stall" is the time the trainer itself was kept waiting (in
``begin``, ``wait_before_apply`` or the synchronous write); the rest of an overhead is contention
for cores, memory and disk while the keeper works. Between blocks everything is drained.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from lazarus.checkpoint.files.store import RecordKey, Tag, write_files
from lazarus.checkpoint.files.tensors import record_of
from lazarus.checkpoint.in_memory.snapshot import SnapshotItem, SnapshotRequest, Snapshotter
from lazarus.checkpoint.selection.schedule import (
    ScheduleConfig,
    ScheduleState,
    Selection,
    select_experts,
)
from lazarus.model.experts import ExpertBank
from lazarus.model.gpt import GPTConfig, build, loss
from lazarus.model.moe import commit_load, take_auxiliary
from lazarus.runtime.keeper.client import KeeperClient
from lazarus.runtime.keeper.process import KeeperConfig, start_keeper
from lazarus.runtime.keeper.trainer_link import RemoteKeeperLink
from lazarus.runtime.rpc.credentials import Credentials

BENCH = Credentials(secret="bench")
TAG = Tag(job="bench", term=1, generation=1)
MODES = ("none", "pec", "pec4", "full async", "full sync")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A model and a batch."""

    name: str
    dim: int
    layers: int
    experts: int
    batch: int
    seq_len: int = 128

    def config(self) -> GPTConfig:
        """The model's shape."""
        return GPTConfig(
            layers=self.layers,
            dim=self.dim,
            heads=4,
            vocab=256,
            seq_len=self.seq_len,
            experts=self.experts,
            top_k=1,
            moe_every=1,
        )


QUICK = (Setting(name="8 MB experts", dim=256, layers=2, experts=8, batch=4),)
ALL = (
    Setting(name="small", dim=256, layers=4, experts=16, batch=4),
    Setting(name="medium", dim=384, layers=4, experts=16, batch=4),
    Setting(name="large", dim=512, layers=4, experts=16, batch=4),
)


class Trainer:
    """Model, optimizer, keeper; steps with one of the modes."""

    def __init__(self, setting: Setting, url: str, *, every: int) -> None:
        torch.manual_seed(0)
        self.setting, self.url, self.every = setting, url, every
        self.model = build(setting.config())
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.banks = {n: m for n, m in self.model.named_modules() if isinstance(m, ExpertBank)}
        self.step = 0
        self.tokens = torch.randint(256, (setting.batch, setting.seq_len + 1))
        self.keeper = start_keeper(KeeperConfig(job="bench", credentials=BENCH, silent_s=30.0))
        self.link = RemoteKeeperLink(self.keeper.address, credentials=BENCH, timeout_s=5.0)
        self.snapshotter = Snapshotter(self.link)
        self.number = 0

    def close(self) -> None:
        """End the keeper."""
        self.snapshotter.close()
        self.link.close()
        self.keeper.stop()

    def dense(self) -> dict[str, Tensor]:
        """All dense state by global name."""
        inside = {id(bank.weight) for bank in self.banks.values()}
        found = {}
        for name, parameter in self.model.named_parameters():
            if id(parameter) not in inside:
                found[f"model.{name}"] = parameter.detach()
                for key, value in self.optimizer.state[parameter].items():
                    found[f"optimizer.{key}.{name}"] = value
        return found

    def expert(self, path: str, expert: int) -> dict[str, Tensor]:
        """One expert's state by global name."""
        weight = self.banks[path].weight
        rows = {"model": weight.detach()[expert]} | {
            f"optimizer.{key}": value[expert]
            for key, value in self.optimizer.state[weight].items()
            if value.shape == weight.shape
        }
        return {
            f"{prefix}.{path}.{expert}.{field}": view
            for prefix, row in rows.items()
            for field, view in self.banks[path].field_views(row).items()
        }

    def items(self, selection: Selection) -> Iterator[SnapshotItem]:
        """What a selection saves."""
        for layer, path in enumerate(self.banks):
            for expert in selection.snapshot[layer]:
                key = RecordKey(layer=layer, expert=expert, step=self.step, generation=1)
                persist = expert in selection.persist[layer]
                yield SnapshotItem(key=key, tensors=self.expert(path, expert), persist=persist)
        key = RecordKey(layer=-1, expert=0, step=self.step, generation=1)
        yield SnapshotItem(key=key, tensors=self.dense(), persist=True)

    def selection(self, mode: str) -> Selection:
        """The experts that a mode saves next."""
        count = self.setting.experts
        k_snapshot = {"pec": 1, "pec4": min(4, count)}.get(mode, count)
        k_persist = 1 if mode.startswith("pec") else count
        config = ScheduleConfig(
            num_layers=len(self.banks),
            num_experts=count,
            k_snapshot=k_snapshot,
            k_persist=k_persist,
            snapshot_every=1,
            persist_every=1,
        )
        state = ScheduleState(
            k_snapshot=k_snapshot,
            k_persist=k_persist,
            snapshot_cursor=self.number * k_snapshot % count,
            persist_cursor=self.number * k_persist % count,
            persisted_once=True,
        )
        self.number += 1
        chosen = select_experts(state, config, step=1, unsaved=[[0] * count] * len(self.banks))
        assert chosen is not None
        return chosen[0]

    def train_step(self) -> float:
        """One step; returns the seconds that a snapshot kept it waiting."""
        self.step += 1
        total = loss(self.model, {"tokens": self.tokens})
        auxiliary = take_auxiliary(self.model)
        assert auxiliary is not None
        ((total.total + auxiliary) / total.count).backward()
        stall_s = self.snapshotter.wait_before_apply()
        self.optimizer.step()
        commit_load(self.model)
        self.optimizer.zero_grad(set_to_none=False)
        return stall_s

    def checkpoint(self, mode: str) -> None:
        """Save what the mode saves, its way."""
        items = tuple(self.items(self.selection(mode)))
        if mode == "full sync":
            records = [record_of(item.key, item.tensors, tag=TAG) for item in items]
            write_files(self.url, records, tag=TAG)
            return
        request = SnapshotRequest(
            tag=TAG, step=self.step, items=items, url=self.url, published_step=self.step
        )
        assert self.snapshotter.begin(request), "the block before was drained"

    def block(self, mode: str) -> dict[str, float]:
        """M steps with one checkpoint after the first; then drain."""
        start, stall_s, longest_s = time.monotonic(), 0.0, 0.0
        for i in range(self.every):
            step_start = time.monotonic()
            stall_s += self.train_step()
            if i == 0 and mode != "none":
                saving = time.monotonic()
                self.checkpoint(mode)
                stall_s += time.monotonic() - saving
            longest_s = max(longest_s, time.monotonic() - step_start)
        wall_s = time.monotonic() - start
        persist_s = 0.0
        while mode not in ("none", "full sync"):
            report = self.snapshotter.next_report(120.0)
            assert report is not None and report["ok"], report
            if report["kind"] == "persist":
                persist_s = float(report["wall_s"])
                break
        return {"wall_s": wall_s, "stall_s": stall_s, "persist_s": persist_s}


def measure(setting: Setting, *, every: int, rounds: int) -> dict[str, Any]:
    """All modes on one setting."""
    with tempfile.TemporaryDirectory() as url:
        trainer = Trainer(setting, url, every=every)
        for mode in MODES:  # warm up: pages, allocators, files
            trainer.block(mode)
        blocks: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
        for number in range(rounds):
            for i in range(len(MODES)):
                mode = MODES[(number + i) % len(MODES)]
                blocks[mode].append(trainer.block(mode))
        client = KeeperClient(trainer.keeper.address, credentials=BENCH, tag=TAG, timeout_s=30.0)
        stock = client.inventory()
        record_bytes = sum(
            t.numel() * 4 for t in trainer.expert(next(iter(trainer.banks)), 0).values()
        )
        dense_bytes = sum(t.numel() * t.element_size() for t in trainer.dense().values())
        client.close()
        trainer.close()
    step_s = statistics.median(b["wall_s"] for b in blocks["none"]) / every
    rows = {mode: _row(blocks, mode, every) for mode in MODES}
    experts_bytes = record_bytes * setting.experts * len(trainer.banks)
    return {
        "setting": setting.name,
        "state_bytes": dense_bytes + experts_bytes,
        "record_bytes": record_bytes,
        "dense_bytes": dense_bytes,
        "step_s": step_s,
        "modes": rows,
        "keeper_reserved_bytes": stock.reserved_bytes,
        "keeper_peak_bytes": stock.peak_bytes,
    }


def _row(blocks: dict[str, list[dict[str, float]]], mode: str, every: int) -> dict[str, float]:
    ratios = sorted(
        b["wall_s"] / none["wall_s"] - 1
        for b, none in zip(blocks[mode], blocks["none"], strict=True)
    )
    stalls = [b["stall_s"] / b["wall_s"] for b in blocks[mode]]
    return {
        "overhead": statistics.median(ratios),
        "overhead_fastest": min(b["wall_s"] for b in blocks[mode])
        / min(b["wall_s"] for b in blocks["none"])
        - 1,
        "overhead_low": ratios[len(ratios) // 4],
        "overhead_high": ratios[(3 * len(ratios)) // 4],
        "stall": statistics.median(stalls),
        "stall_max": max(stalls),
        "stall_ms": 1000 * statistics.median(b["stall_s"] for b in blocks[mode]),
        "persist_s": statistics.median(b["persist_s"] for b in blocks[mode]),
    }


def show(report: dict[str, Any], every: int) -> None:
    """Print one setting."""
    print(
        f"\n{report['setting']}: state {report['state_bytes'] / 1e6:.0f} MB "
        f"(dense {report['dense_bytes'] / 1e6:.1f}, expert {report['record_bytes'] / 1e6:.1f}), "
        f"step {1000 * report['step_s']:.0f} ms, a checkpoint every {every} steps; keeper memory "
        f"{report['keeper_reserved_bytes'] / 1e6:.0f} MB, in use at peak "
        f"{report['keeper_peak_bytes'] / 1e6:.0f} MB"
    )
    print("mode         stall %  (max)   stall ms   overhead % [quartiles]  fastest  persist s")
    sync = report["modes"]["full sync"]["stall_ms"]
    for mode, row in report["modes"].items():
        saved = f"  O_save -{100 * (1 - row['stall_ms'] / sync):.2f} %" if "pec" in mode else ""
        print(
            f"{mode:11s} {100 * row['stall']:8.2f} {100 * row['stall_max']:7.2f} "
            f"{row['stall_ms']:9.1f}  {100 * row['overhead']:8.1f} "
            f"[{100 * row['overhead_low']:.1f}, {100 * row['overhead_high']:.1f}]"
            f" {100 * row['overhead_fastest']:8.1f} {row['persist_s']:8.2f}{saved}"
        )


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one small model, few rounds")
    parser.add_argument("--json", metavar="FILE", help="write the report there")
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--rounds", type=int, default=0, help="rounds over all modes")
    parser.add_argument("--size", default="", help="only this model: small, medium or large")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rounds = args.rounds or (3 if args.quick else 7)
    load = f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    print(f"{load}, 1 thread, {rounds} rounds")
    reports = []
    settings = QUICK if args.quick else ALL
    for setting in (s for s in settings if args.size in ("", s.name)):
        reports.append(measure(setting, every=args.every, rounds=rounds))
        show(reports[-1], args.every)
        sys.stdout.flush()
    if args.json:
        Path(args.json).write_text(json.dumps({"every": args.every, "settings": reports}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

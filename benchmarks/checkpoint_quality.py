"""Does a model survive lost experts? Held-out loss and PLT under faults, partial against rollback.

    python benchmarks/checkpoint_quality.py [--quick] [--json FILE] [--steps N] [--runs NAME,...]
                                            [--seeds N] [--keep DIR]

One process trains the project's GPT-MoE on real text (../shared/data/text when it is there, else
the standard library's sources) with a fixed seed. At each fault a quarter of the experts of every
layer lose all live replicas and all memory copies: the hardest case, storage only. "partial" takes
each back from its newest stored version, chosen and billed by the production code (selection,
recovery, PLT); "rollback" takes all state back to the last full checkpoint, so its steps are done
again. Full checkpoints come as often as their bytes allow at the K=1 byte rate. The spread of
"no fault" over seeds says what a difference means, and each run with faults is compared with the
undisturbed run of its own seed. ``--runs`` picks a part; with ``--keep`` finished runs are read
back instead of run again, so that a break costs one run only.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch import Tensor

from lazarus.checkpoint.restoring.plt import PltLedger, portion_lost
from lazarus.checkpoint.restoring.restore_choice import Copy, Loss, Restore, Source, decide_recovery
from lazarus.checkpoint.selection.saving import SaveState
from lazarus.checkpoint.selection.schedule import ScheduleConfig, doubled_k
from lazarus.data.corpus import datasets, load_corpus
from lazarus.data.sampler import step_sample_ids
from lazarus.model.gpt import GPTConfig, build, loss
from lazarus.model.moe import commit_load, moe_layers, take_auxiliary

TEXT = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "text"
EXPERTS, LAYERS, BATCH, SEQ_LEN = 8, 2, 8, 64
LINEAGE = ((1, 0),)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run: a seed, its faults, and how lost experts come back."""

    name: str
    seed: int = 0
    faults: int = 0
    k: int = 1
    every: int = 40
    policy: str = "partial"
    dynamic: bool = False


class Training:
    """A model in training, and the storage of its experts in memory."""

    def __init__(self, run: Run, steps: int) -> None:
        torch.manual_seed(run.seed)
        self.run, self.steps = run, steps
        shape = GPTConfig(
            layers=LAYERS, dim=64, heads=4, vocab=256, seq_len=SEQ_LEN, experts=EXPERTS, top_k=2
        )
        self.model = build(shape)
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.layers = list(moe_layers(self.model).values())
        corpus = load_corpus(str(TEXT) if TEXT.is_dir() else None)
        self.data, self.held_out = datasets(corpus, seq_len=SEQ_LEN, split=0.9)
        k = EXPERTS if run.policy == "rollback" else run.k
        self.config = ScheduleConfig(
            num_layers=LAYERS,
            num_experts=EXPERTS,
            k_snapshot=k,
            k_persist=k,
            snapshot_every=run.every,
            persist_every=run.every,
        )
        self.save = SaveState.initial(self.config)
        self.stored: dict[tuple[int, int], tuple[int, int, list[Tensor]]] = {}
        self.full: tuple[int, Any] | None = None
        self.ledger, self.plt_at_last_k = PltLedger(), 0.0
        self.repeated = 0

    def rows(self, layer: int, expert: int) -> list[Tensor]:
        """An expert's weights and moments, in place."""
        weight = self.layers[layer].experts.weight
        state = self.optimizer.state[weight]
        return [weight.detach()[expert], state["exp_avg"][expert], state["exp_avg_sq"][expert]]

    def batch(self, ids: Any, source: Any) -> dict[str, Tensor]:
        """Samples by number."""
        return {"tokens": torch.stack([source[int(i)]["tokens"] for i in ids])}

    def train_step(self, step: int) -> None:
        """One optimizer step; counts go to the save state."""
        rate = min(1.0, step / 50) * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = 2e-3 * rate + 1e-5
        ids = step_sample_ids(self.run.seed, step, BATCH, len(self.data))
        total = loss(self.model, self.batch(ids, self.data))
        auxiliary = take_auxiliary(self.model)
        assert auxiliary is not None
        ((total.total + auxiliary) / total.count).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        counts = np.stack([layer.context.counts_E.numpy() for layer in self.layers])
        self.save = self.save.committed(counts)
        commit_load(self.model)
        self.optimizer.zero_grad(set_to_none=False)

    def checkpoint(self, step: int) -> None:
        """Store what the schedule selects."""
        selection, self.save = self.save.next_save(self.config, step=step)
        if selection is None:
            return
        if self.run.policy == "rollback":
            fractions = [layer.context.expected_E.clone() for layer in self.layers]
            state = (self.model.state_dict(), self.optimizer.state_dict(), self.save, fractions)
            self.full = (step, copy.deepcopy(state))
            return
        for layer, chosen in enumerate(selection.persist):
            for expert in chosen:
                rows = [row.clone() for row in self.rows(layer, expert)]
                routed = int(self.save.routed_LE[layer, expert])
                self.stored[layer, expert] = (step, routed, rows)

    def fault(self, step: int, number: int) -> int:
        """Lose a quarter of the experts; returns the step that training goes on after."""
        if self.run.policy == "rollback":
            assert self.full is not None
            back, state = self.full
            model, optimizer, self.save, fractions = copy.deepcopy(state)
            self.model.load_state_dict(model)
            self.optimizer.load_state_dict(optimizer)
            for layer, fraction in zip(self.layers, fractions, strict=True):
                layer.context.expected_E = fraction
            self.repeated += step - back
            return back
        rng = np.random.default_rng(1000 * self.run.seed + number)
        losses = []
        for layer in range(LAYERS):
            for expert in sorted(rng.choice(EXPERTS, EXPERTS // 4, replace=False).tolist()):
                saved, routed, _ = self.stored[layer, expert]
                stored = Copy(
                    layer=layer,
                    expert=expert,
                    generation=1,
                    step=saved,
                    source=Source.STORAGE,
                    routed=routed,
                )
                now = int(self.save.routed_LE[layer, expert])
                losses.append(
                    Loss(layer=layer, expert=expert, targets=(0,), routed=now, copies=(stored,))
                )
        decision = decide_recovery(losses, policy="partial", lineage=LINEAGE, resume_step=step)
        assert isinstance(decision, Restore)
        for restored in decision.experts:
            key = restored.copy.layer, restored.copy.expert
            for row, old in zip(self.rows(*key), self.stored[key][2], strict=True):
                row.copy_(old)
            self.ledger, _ = self.ledger.restored(
                layer=key[0],
                expert=key[1],
                version_routed=restored.copy.routed,
                routed=int(self.save.routed_LE[key]),
            )
        if self.run.dynamic:
            self.maybe_double()
        return step

    def maybe_double(self) -> None:
        """Dynamic-K after a restore."""
        before = self.save.schedule
        caused = self.plt() - self.plt_at_last_k
        after = doubled_k(before, self.config, plt_of_present_k=caused)
        if after != before:
            self.plt_at_last_k = self.plt()
            object.__setattr__(self.save, "schedule", after)

    def plt(self) -> float:
        """Portion of lost tokens over the whole training, as the paper has it."""
        lost, routed = self.ledger.lost_by_expert(), self.save.routed_LE
        scale = self.save.routed_LE[0].sum() / (self.steps * BATCH * SEQ_LEN * 2)
        return portion_lost(lost, routed=routed.tolist()) * float(scale)

    def evaluate(self) -> float:
        """Mean held-out loss."""
        self.model.eval()
        total, count = 0.0, 0
        with torch.no_grad():
            for first in range(0, min(512, len(self.held_out)), 32):
                ids = range(first, min(first + 32, len(self.held_out)))
                part = loss(self.model, self.batch(ids, self.held_out))
                total, count = total + float(part.total), count + int(part.count)
        self.model.train()
        return total / count

    def finish(self) -> dict[str, Any]:
        """Train to the end; the figures of the run."""
        start = time.monotonic()
        at = {self.steps * (i + 1) // (self.run.faults + 1) + 7: i for i in range(self.run.faults)}
        step = 0
        while step < self.steps:
            step += 1
            self.train_step(step)
            self.checkpoint(step)
            if step in at:
                step = self.fault(step, at.pop(step))
        return {
            "name": self.run.name,
            "seed": self.run.seed,
            "faults": self.run.faults,
            "every": self.run.every,
            "k_end": self.save.schedule.k_persist,
            "held_out_loss": self.evaluate(),
            "plt": self.plt(),
            "steps_repeated": self.repeated,
            "wall_s": time.monotonic() - start,
        }


def runs(seeds: int) -> list[Run]:
    """Everything that is compared, seed by seed; two more undisturbed seeds for the spread."""
    found = [Run(name="no fault", seed=seed) for seed in range(seeds + 2)]
    for seed in range(seeds):
        found += [Run(name=f"PEC K={k}", seed=seed, faults=4, k=k) for k in (1, 2, 4)]
        found += [Run(name="PEC K=1 dynamic", seed=seed, faults=4, dynamic=True)]
        found += [Run(name="rollback", seed=seed, faults=4, policy="rollback", every=160)]
        found += [
            Run(name=f"PEC K=1 every {n}", seed=seed, faults=4, every=n) for n in (10, 80, 160)
        ]
    return found


def row_of(run: Run, steps: int, keep: Path | None) -> dict[str, Any]:
    """Train, or read back what an earlier call trained."""
    slug = f"{run.name} {run.seed} of {steps}".replace(" ", "-").replace("=", "")
    path = None if keep is None else keep / f"{slug}.json"
    if path is not None and path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    every = max(2, run.every * steps // 2000)  # as many checkpoints, however short the run
    row = Training(replace(run, every=every), steps).finish()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".part").write_text(json.dumps(row))
        path.with_suffix(".part").rename(path)
    return row


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per kind of run: mean loss, spread over seeds, difference to its own seed."""
    plain = {row["seed"]: row["held_out_loss"] for row in rows if row["name"] == "no fault"}
    names = list(dict.fromkeys(row["name"] for row in rows))
    found = []
    for name in names:
        own = [row for row in rows if row["name"] == name]
        losses = [row["held_out_loss"] for row in own]
        paired = [row["held_out_loss"] - plain[row["seed"]] for row in own if row["seed"] in plain]
        found.append(
            {
                "name": name,
                "every": own[0]["every"],
                "k_end": sorted({row["k_end"] for row in own}),
                "seeds": len(own),
                "loss": statistics.mean(losses),
                "spread": statistics.stdev(losses) if len(losses) > 1 else 0.0,
                "difference": statistics.mean(paired) if paired else math.nan,
                "worst": max(paired, default=math.nan),
                "plt": statistics.mean(row["plt"] for row in own),
                "steps_repeated": statistics.mean(row["steps_repeated"] for row in own),
            }
        )
    return found


def show(rows: list[dict[str, Any]]) -> None:
    """The one table."""
    heads = ("loss (std)", "to own seed (worst)", "PLT %", "again")
    print(f"\n{'run':18s}every  K at end  seeds  " + "{:18s}{:23s}{:>7s}  {}".format(*heads))
    for line in summary(rows):
        k_end = "/".join(str(k) for k in line["k_end"])
        print(
            f"{line['name']:18s}{line['every']:5d}{k_end:>10s}{line['seeds']:7d}  "
            f"{line['loss']:.4f} ({line['spread']:.4f})  {line['difference']:+11.4f} "
            f"({line['worst']:+.4f}) {100 * line['plt']:8.2f} {line['steps_repeated']:6.0f}"
        )


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="300 steps, one seed")
    parser.add_argument("--json", metavar="FILE", help="write the report there")
    parser.add_argument("--steps", type=int, default=0, help="steps of each run")
    parser.add_argument("--runs", default="", help="only runs whose name starts with one of these")
    parser.add_argument("--seeds", type=int, default=0, help="seeds of each run with faults (3)")
    parser.add_argument("--keep", metavar="DIR", help="keep finished runs there, read them back")
    args = parser.parse_args()
    torch.set_num_threads(1)
    steps = args.steps or (300 if args.quick else 2000)
    seeds = args.seeds or (1 if args.quick else 3)
    keep = Path(args.keep) if args.keep else None
    starts = tuple(args.runs.split(","))
    print(f"{steps} steps of {BATCH} x {SEQ_LEN} tokens, {LAYERS} layers of {EXPERTS} experts")
    rows = []
    for run in runs(seeds):
        if not run.name.startswith(starts):
            continue
        rows.append(row := row_of(run, steps, keep))
        print(
            f"{run.name + f' (seed {run.seed})':28s} {row['held_out_loss']:10.4f} "
            f"{100 * row['plt']:9.3f} % lost {row['steps_repeated']:6d} steps again "
            f"{row['wall_s']:6.0f} s",
            flush=True,
        )
    show(rows)
    if args.json:
        report = {"steps": steps, "runs": rows, "summary": summary(rows)}
        Path(args.json).write_text(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""``lazarus demo``: a small Mixture-of-Experts trains, loses a node in plain sight, and goes on."""

from __future__ import annotations

import argparse
from pathlib import Path

from lazarus.commands import runs
from lazarus.commands.train import train
from lazarus.record.events import read_events
from lazarus.record.metrics import summarise
from lazarus.run.run_place import open_place

STEPS = 60
KILL_AT = 30
# 12 experts in 4 x 8 slots: after one loss 3 x 8 = 24 slots hold each of them exactly twice, so
# that some replicas really have to be rebuilt on the survivors.
SETTINGS = (
    "run.name=demo",
    f"train.steps={STEPS}",
    "train.global_batch=24",
    "train.micro_batch_size=8",
    "model.experts=12",
    "placement.slots_per_node=8",
    "optim.lr=2e-3",
    "optim.warmup_steps=6",
    "checkpoint.every=0",
    f"faults.specs=['kill:2@{KILL_AT}']",
)


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's options."""
    parser = subparsers.add_parser(
        "demo",
        help="see a node die and training go on",
        description="Train a tiny GPT-MoE on Python's own sources over 4 nodes on this machine; "
        f"node 2 is killed in step {KILL_AT}.",
    )
    runs.add_run_options(parser)
    parser.set_defaults(config=None, set=[], preset="tiny")


def run(args: argparse.Namespace) -> int:
    """Train with a kill, then tell what happened, from the record alone."""
    config = runs.load_config(args, base=SETTINGS)
    place = open_place(
        config, resume=None, in_ray_job=runs.in_ray_job(args.environment), say=runs.say
    )
    runs.say("A small Mixture-of-Experts model learns Python from the standard library's sources,")
    runs.say(f"over {config.cluster.nodes} nodes on this machine.")
    for spec in config.faults.parsed():
        target = "" if spec.node is None else f" of node {spec.node}"
        runs.say(f"On purpose, by itself: {spec.kind}{target} in step {spec.step}.")
    code = train(place)
    tell(place.folder)
    return code


def tell(folder: Path) -> None:
    """What happened, computed from the events of the record."""
    summary = summarise(read_events(folder))
    print()
    print("What happened")
    for line in runs.story(summary):
        print(f"  {line}")
    if not summary.recoveries:
        print("  no node was lost")
    first, last = summary.first_loss, summary.final_loss
    if first is not None and last is not None:
        print(f"  loss {first:.3f} -> {last:.3f} over {summary.steps} steps")
    print(f"  steps lost in all: {summary.steps_lost}")
    print(f"The record lies in {folder} (config.toml, events.jsonl)")

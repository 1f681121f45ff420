"""``lazarus train``: train the configured model, on an embedded cluster or on a running one."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lazarus.basics.format import bytes_of_text, bytes_text
from lazarus.callbacks import configured
from lazarus.callbacks.prometheus import RayMetrics
from lazarus.checkpoint.selection.adaptive import DEFAULT_EVERY
from lazarus.commands import runs
from lazarus.config.hf_folder import hf_warnings, num_experts
from lazarus.config.preflight import stated_ranks_per_node, warnings_of
from lazarus.config.train_config import TrainConfig
from lazarus.control.plans.verdict import slots_for
from lazarus.data.units import Units
from lazarus.errors import ConfigError
from lazarus.record.condensed import condensed_events
from lazarus.record.metrics import summarise
from lazarus.run.run_place import RunPlace, open_place

if TYPE_CHECKING:
    from lazarus.run.dry_run import State


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's options."""
    parser = subparsers.add_parser(
        "train",
        help="train a model",
        description=__doc__,
        epilog="Exit codes: 0 finished, 1 failed, 2 bad input and nothing started, "
        "3 ended short but resumable, 130 Ctrl-C.",
    )
    runs.add_config_options(parser)
    runs.add_run_options(parser)
    parser.add_argument(
        "--resume", metavar="RUN_DIR|URL|auto", help="go on from the newest usable checkpoint"
    )
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="section.key",
        help="resume although this key differs; may be repeated",
    )
    parser.add_argument("--dry-run", action="store_true", help="check and plan, start nothing")
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        help="plan for ranks with this much memory each, such as 80GB; with --dry-run alone",
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Check everything that can be checked, then train."""
    memory = _memory(args)
    config = runs.load_config(args)
    for warning in (*hf_warnings(config), *_warnings(config)):
        runs.say(f"warning: {warning}")
    configured(config, run_dir=config.run.dir)  # packages that are missing are bad input
    place = open_place(
        config,
        resume=args.resume,
        allow_change=args.allow_change,
        in_ray_job=runs.in_ray_job(args.environment),
        say=runs.say,
    )
    return _dry_run(place, memory) if args.dry_run else train(place, as_json=args.json)


def _memory(args: argparse.Namespace) -> int:
    """Bytes of ``--memory``; 0: it was not given."""
    if args.memory is None:
        return 0
    if not args.dry_run:
        raise ConfigError("--memory is for --dry-run; a run has the memory of its machines")
    try:
        return bytes_of_text(args.memory)
    except ValueError as problem:
        raise ConfigError(f"--memory: {problem}") from problem


def _warnings(config: TrainConfig) -> list[str]:
    """What works, but perhaps not as intended, with the slots that the controller will choose.

    Only workers know the experts of a model that a function builds.
    """
    experts = num_experts(config)
    if not experts:
        return []
    asked, nodes = config.placement.slots_per_node, config.cluster.nodes
    slots = slots_for(
        num_nodes=nodes,
        num_experts=experts,
        configured=None if asked == "auto" else asked,
        started_nodes=nodes,
        min_replicas=config.placement.min_replicas,
        spare_losses=config.placement.spare_losses,
        ranks_per_node=stated_ranks_per_node(config),
    )
    return warnings_of(config, num_experts=experts, slots_per_node=slots)


def train(place: RunPlace, *, as_json: bool = False) -> int:
    """Run to the end and say how it went."""
    from lazarus.console.progress import Progress
    from lazarus.run.trainer import ElasticTrainer, fit_at

    config, folder = place.config, str(place.folder)
    progress = Progress(config.metrics.progress, steps=config.train.steps)
    metrics = _ray_metrics(config)
    try:
        callbacks = [progress, *configured(config, run_dir=folder), *metrics]
        trainer = ElasticTrainer(config, callbacks=callbacks)
    except BaseException:
        place.leave()
        raise
    where = config.cluster.address or "a cluster of our own, on this machine; up in about 20 s"
    runs.say(f"run {config.run.name}  {config.cluster.nodes} nodes  {where}  record {folder}")
    try:
        result = fit_at(trainer, place)
    finally:
        progress.finish()
        for one in metrics:
            one.close()
    summary = summarise(condensed_events(folder))
    runs.say(f"{runs.closing_line(summary)}  record {folder}")
    if as_json:
        runs.print_json(runs.result_json(result, summary))
    return 0


def _ray_metrics(config: TrainConfig) -> list[RayMetrics]:
    """On a cluster that somebody scrapes; an embedded one has no scrape."""
    if not config.metrics.prometheus or config.cluster.address is None:
        return []
    constants = {
        "lazarus_tolerated_stall_seconds": config.recovery.tolerated_stall_s,
        "lazarus_checkpoint_every": float(
            DEFAULT_EVERY if config.checkpoint.every == "auto" else config.checkpoint.every
        ),
    }
    return [RayMetrics(config.run.name, constants=constants)]


def _dry_run(place: RunPlace, memory_bytes: int) -> int:
    """Say what the run would begin with; exit codes are those of a run that is refused."""
    from lazarus.run.dry_run import planned
    from lazarus.run.trainer import ElasticTrainer
    from placement import certificate

    try:
        trainer = ElasticTrainer(place.config)
    except BaseException:
        place.leave()
        raise
    shows = bool(memory_bytes) or place.config.model.hf is not None
    first = planned(
        trainer, place, memory_bytes=memory_bytes, on_state=_say_state if shows else _say_nothing
    )
    plan = first.plan
    if plan.fallback:
        runs.say(f"warning: placement.policy: {plan.fallback}; the library's plan is taken")
    if shows:
        has = f" of {bytes_text(first.memory_bytes)}" if first.memory_bytes else ""
        runs.say(f"memory: {bytes_text(first.node_bytes)}{has} on each node, with gradients")
    layers, experts = len(plan.expert_of_slot), plan.num_experts
    runs.say(
        f"{experts} experts x {layers} layers on {len(plan.node_ids)} nodes "
        f"x {plan.slots_per_node} slots; the plan that the run begins with:"
    )
    print(certificate(plan).table())
    ranks = max(len(plan.node_ids), plan.expert_of_slot.shape[1])
    for line in _price_of_units(place.config, ranks):
        print(line)
    return 0


def _price_of_units(config: TrainConfig, ranks: int) -> list[str]:
    """What elastic determinism costs a step because units are not divided further."""
    if not config.train.elastic_determinism:
        return []
    units = Units(global_batch=config.train.global_batch, unit_size=config.train.micro_batch_size)
    shares = [f"{units.slowdown(n):.2f} on {n}" for n in (ranks, ranks - 1, ranks - 2) if n > 0]
    lines = [f"units of a step      {units.count}; times the ideal: {', '.join(shares)} ranks"]
    if units.count < 4 * ranks:
        lines.append(
            "                     fewer than 4 a rank; lower train.micro_batch_size or raise "
            "train.global_batch to lose less time with uneven ranks"
        )
    return lines


def _say_state(state: State) -> None:
    """How much there is to hold, each expert once."""
    experts = state.num_experts * state.num_layers
    runs.say(
        f"state: {bytes_text(state.dense_bytes)} dense on each rank; {experts:,} experts of "
        f"{bytes_text(state.expert_bytes)} are {bytes_text(experts * state.expert_bytes)}"
    )


def _say_nothing(state: State) -> None: ...

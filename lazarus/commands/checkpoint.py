"""``lazarus checkpoint``: what is stored, whether it is sound, the plain model."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lazarus.basics.careful import read_text
from lazarus.basics.format import bytes_text, plural, seconds_text
from lazarus.checkpoint.files.storage import is_url, list_folder, open_storage, redacted
from lazarus.checkpoint.files.store import damaged_sizes, find_checkpoints
from lazarus.checkpoint.files.verify import Verification, verify
from lazarus.checkpoint.format.manifest import Manifest, expert_name
from lazarus.checkpoint.restoring.plt import portion_lost, staleness
from lazarus.commands import checkpoint_formats as outward
from lazarus.commands import runs
from lazarus.config.layers import toml_of
from lazarus.errors import ConfigError

_HEADS = ("STEP", "KIND", "EXPERTS", "BYTES", "AGE", "COMPLETE", "OLDEST EXPERT", "PLT IF RESTORED")


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the actions."""
    parser = subparsers.add_parser("checkpoint", help="list, verify, export or import checkpoints")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    for name, action, text in (
        ("list", _list, "versions per expert and their age"),
        ("verify", _verify, "recompute all checksums; exit code 1 names the bad files"),
        ("export", _export, "write the model as a safetensors file or in another format"),
    ):
        sub = actions.add_parser(name, help=text)
        sub.add_argument("place", metavar="RUN_DIR|URL", help="a run's folder, or a checkpoint URL")
        sub.add_argument("--json", action="store_true", help="print one JSON object")
        sub.set_defaults(run=action)
        if name == "list":
            sub.add_argument("--experts", action="store_true", help="one row per layer and expert")
        if name == "export":
            outward.add_export_options(sub)
    outward.add_import(actions)


def run(args: argparse.Namespace) -> int:
    """Run the action that was asked for."""
    return int(args.run(args))


def place_of(text: str) -> str:
    """The checkpoint root of a run's folder or URL.

    Raises:
        ConfigError: There is no such folder.
    """
    folder = Path(text).expanduser()
    if not is_url(text) and folder.is_dir():
        configured = _configured_url(folder)
        if configured:
            return configured
        inner = folder / "checkpoints"
        return str(inner if inner.is_dir() else folder)
    if not is_url(text):
        raise ConfigError(f"{text} is no folder and no URL")
    if not list_folder(open_storage(text)):
        raise ConfigError(f"{redacted(text)} is empty or cannot be reached")
    return text


def _configured_url(folder: Path) -> str:
    """``checkpoint.url`` of the run's resolved configuration, if it has one."""
    path = folder / "config.toml"
    if not path.exists():
        return ""
    try:
        table = toml_of(read_text(path))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    section = table.get("checkpoint", {})
    url = str(section.get("url", "none")) if isinstance(section, dict) else "none"
    return "" if url in {"", "none"} else url.replace("{run.dir}", str(folder))


# ---- list ----------------------------------------------------------------------------------------


def _list(args: argparse.Namespace) -> int:
    url = place_of(args.place)
    found, storage = find_checkpoints(url), open_storage(url)
    true_steps = {m.step for m in found.on_lineage()}
    rows = []
    for manifest in found.manifests:
        problems = (*damaged_sizes(storage, manifest), *manifest.missing())
        rows.append(describe(manifest, problems=problems, on_lineage=manifest.step in true_steps))
    unreadable = [{"step": step, "error": str(error)} for step, error in found.unreadable]
    if args.json:
        runs.print_json(
            {"schema": 1, "url": redacted(url), "checkpoints": rows, "unreadable": unreadable}
        )
        return 0
    if not rows:
        print(f"no checkpoints at {redacted(url)}")
    else:
        print(table([_HEADS, *(_cells(row) for row in rows)]))
    if args.experts and rows:
        print(_expert_table(rows[-1]))
    for item in unreadable:
        runs.say(f"! step {item['step']}: {item['error']}")
    return 0


def describe(
    manifest: Manifest, *, problems: Sequence[str] = (), on_lineage: bool = True
) -> dict[str, Any]:
    """One checkpoint as the JSON of ``list`` has it."""
    steps = [
        [manifest.expert_step(layer, expert) for expert in range(entry.num_experts)]
        for layer, entry in enumerate(manifest.layers)
    ]
    ages = [(step, x, e) for x, row in enumerate(steps) for e, step in enumerate(row)]
    oldest = min(ages, default=(manifest.step, -1, -1))
    return {
        "step": manifest.step,
        "kind": manifest.kind,
        "generation": manifest.generation,
        "term": manifest.term,
        "job": manifest.job,
        "created_at": manifest.created_at_s,
        "experts_saved": manifest.fresh_experts(),
        "experts": len(ages),
        "bytes": manifest.own_bytes(),
        "bytes_referenced": sum(f.num_bytes for f in manifest.files.values()),
        "complete": not problems,
        "problems": list(problems),
        "superseded": not on_lineage,
        "oldest": {"layer": oldest[1], "expert": oldest[2], "step": oldest[0]},
        "plt_if_restored": plt_of(manifest),
        "versions": steps,
    }


def plt_of(manifest: Manifest) -> float | None:
    """PLT that resuming from this checkpoint adds; None if it does not hold the counts."""
    history = manifest.meta.get("history")
    routed = manifest.meta.get("routed", history[1] if history else None)
    if routed is None:
        return None
    counts = [[int(n) for n in row] for row in routed]
    versions = [
        [manifest.oldest(x, e).routed if parts else 0 for e, parts in enumerate(layer)]
        for x, layer in enumerate(manifest.experts)
    ]
    return portion_lost(staleness(versions, routed=counts), routed=counts)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    oldest, plt = row["oldest"], row["plt_if_restored"]
    state = "yes" if row["complete"] else "NO"
    return (
        str(row["step"]),
        row["kind"],
        f"{row['experts_saved']}/{row['experts']}",
        bytes_text(row["bytes"]),
        seconds_text(max(0.0, time.time() - row["created_at"])),
        f"{state} (superseded)" if row["superseded"] else state,
        f"{expert_name(oldest['layer'], oldest['expert'])} from step {oldest['step']}",
        "-" if plt is None else f"{100 * plt:.2g} %",
    )


def _expert_table(row: dict[str, Any]) -> str:
    lines = [("EXPERT", "FROM STEP", "STEPS BEHIND")]
    for layer, steps in enumerate(row["versions"]):
        for expert, step in enumerate(steps):
            lines.append((expert_name(layer, expert), str(step), str(row["step"] - step)))
    return table(lines)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


# ---- verify, export ------------------------------------------------------------------------------


def _verify(args: argparse.Namespace) -> int:
    url = place_of(args.place)
    outcome = verify(url)
    if args.json:
        runs.print_json(_verification_json(url, outcome))
    elif outcome.bad:
        for path, problem in outcome.bad:
            print(f"bad: {path} {problem}")
        usable = f"step {outcome.usable[-1]}" if outcome.usable else "none"
        print(f"newest usable checkpoint: {usable}")
    else:
        print(
            f"ok: {plural(outcome.checkpoints, 'checkpoint')}, {plural(outcome.files, 'file')}, "
            f"{bytes_text(outcome.num_bytes)}, all checksums match"
        )
    return 1 if outcome.bad or not outcome.checkpoints else 0


def _verification_json(url: str, outcome: Verification) -> dict[str, Any]:
    return {
        "schema": 1,
        "url": redacted(url),
        "ok": not outcome.bad,
        "checkpoints": outcome.checkpoints,
        "files": outcome.files,
        "bytes": outcome.num_bytes,
        "bad": [{"file": path, "problem": problem} for path, problem in outcome.bad],
        "usable": list(outcome.usable),
        "superseded": list(outcome.superseded),
        "foreign": list(outcome.foreign),
    }


def _export(args: argparse.Namespace) -> int:
    return outward.export(args, place_of(args.place))

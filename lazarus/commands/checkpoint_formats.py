"""``lazarus checkpoint export`` and ``import``: a run's model in other formats, and back."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from lazarus.basics.format import bytes_of_text, bytes_text, plural
from lazarus.checkpoint.files.storage import is_url
from lazarus.commands import runs
from lazarus.errors import ConfigError

_FILES = ("model", "experts")  # layouts that are one safetensors file
_DEFAULT_FILE = "model.safetensors"
_MAX_SHARD = "5GB"


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``export``."""
    add = parser.add_argument
    add("--out", metavar="FILE", help=f"target, a folder for hf and dcp; default: {_DEFAULT_FILE}")
    add("--step", type=int, metavar="STEP", help="which; default: the newest")
    add(
        "--layout",
        choices=(*_FILES, "hf", "dcp"),
        default="model",
        help="model: names of model.state_dict(); experts: one tensor per expert and field; "
        "hf: a Hugging Face folder; dcp: a torch.distributed.checkpoint folder",
    )
    add("--force", action="store_true", help="overwrite an existing file")
    _add_format_options(parser, "the folder that the model came from; default: as the run says")


def add_import(actions: Any) -> None:
    """Add the action ``import``."""
    parser = actions.add_parser(
        "import", help="write the model of a DCP folder as one that a run can start from"
    )
    add = parser.add_argument
    add("place", metavar="DIR", help="a torch.distributed.checkpoint folder")
    add("--layout", choices=("dcp",), default="dcp", help="format of DIR")
    add("--out", metavar="FILE", required=True, help="target, a folder with --like")
    add("--force", action="store_true", help="overwrite an existing file")
    add("--json", action="store_true", help="print one JSON object")
    _add_format_options(parser, "write a Hugging Face folder with the keys and files of this one")
    parser.set_defaults(run=import_dcp)


def _add_format_options(parser: argparse.ArgumentParser, like: str) -> None:
    add = parser.add_argument
    add("--like", metavar="DIR", help=like)
    add("--dtype", metavar="DTYPE", help="bf16, fp16 or fp32 for all; default: as in --like")
    add("--max-shard", metavar="SIZE", help=f"most bytes of a file (hf); default: {_MAX_SHARD}")


def export(args: argparse.Namespace, url: str) -> int:
    """Write the model of the checkpoints at ``url`` as ``args`` ask."""
    if args.layout in _FILES:
        return _export_file(args, url)
    _require_folder(args.out, args, layout=args.layout)
    return _export_hf(args, url) if args.layout == "hf" else _export_dcp(args, url)


def _export_file(args: argparse.Namespace, url: str) -> int:
    from lazarus.checkpoint.files.export import export as export_file

    for option in ("like", "dtype", "max_shard"):
        if getattr(args, option) is not None:
            name = option.replace("_", "-")
            raise ConfigError(f"--{name} goes with --layout hf or dcp, not {args.layout}")
    out = args.out or _DEFAULT_FILE
    if out.endswith("/") or (not is_url(out) and os.path.isdir(out)):
        raise ConfigError(f"{out} is a folder; --layout {args.layout} writes a file")
    _require_free(out, args)
    manifest, num_bytes = export_file(url, out, step=args.step, layout=args.layout)
    if args.json:
        runs.print_json({"schema": 1, "file": out, "step": manifest.step, "bytes": num_bytes})
    else:
        print(f"step {manifest.step} to {out}: {bytes_text(num_bytes)}")
    return 0


def _export_hf(args: argparse.Namespace, url: str) -> int:
    from lazarus.checkpoint.files.reader import open_state_dict
    from lazarus.hf.saving import export_model

    state = open_state_dict(url, step=args.step)
    saved = export_model(
        state,
        like=args.like,
        out=args.out,
        dtype=_dtype(args),
        max_shard_bytes=_shard_bytes(args),
    )
    _say_folder(args, state.manifest.step, saved.num_bytes, files=len(saved.files))
    return 0


def _export_dcp(args: argparse.Namespace, url: str) -> int:
    from lazarus.checkpoint.files.dcp import write_dcp
    from lazarus.checkpoint.files.export import StackedState
    from lazarus.checkpoint.files.reader import open_state_dict
    from lazarus.checkpoint.format.stored_state import StoredState

    _refuse_shards(args)
    plain = open_state_dict(url, step=args.step)
    state: StoredState = StackedState(plain)
    if args.like:
        from lazarus.hf.conversion import module_state_of

        state = module_state_of(Path(args.like), plain)
    num_bytes = write_dcp(state, args.out, dtype=_dtype(args))
    _say_folder(args, plain.manifest.step, num_bytes, files=1)
    return 0


def import_dcp(args: argparse.Namespace) -> int:
    """Write the model of a DCP folder as a safetensors file or a Hugging Face folder."""
    from lazarus.checkpoint.files.dcp import DcpState
    from lazarus.checkpoint.files.export import write_state

    _require_free(args.out, args)
    state = DcpState(args.place)
    if args.like:
        from lazarus.hf.saving import save_pretrained

        saved = save_pretrained(
            state,
            like=args.like,
            out=args.out,
            dtype=_dtype(args),
            max_shard_bytes=_shard_bytes(args),
        )
        num_bytes = saved.num_bytes
    else:
        _refuse_shards(args)
        if args.dtype is not None:
            raise ConfigError("--dtype of an import goes with --like")
        num_bytes = write_state(state, args.out)
    if args.json:
        runs.print_json({"schema": 1, "out": args.out, "bytes": num_bytes})
    else:
        print(f"{args.place} to {args.out}: {bytes_text(num_bytes)}")
    return 0


def _say_folder(args: argparse.Namespace, step: int, num_bytes: int, *, files: int) -> None:
    if args.json:
        told = {"folder": args.out, "step": step, "bytes": num_bytes, "files": files}
        runs.print_json({"schema": 1, **told})
    else:
        of = f" in {plural(files, 'file')}" if files > 1 else ""
        print(f"step {step} to {args.out}: {bytes_text(num_bytes)}{of}")


def _require_folder(out: str | None, args: argparse.Namespace, *, layout: str) -> None:
    if not out:
        raise ConfigError(f"--layout {layout} writes a folder: say which with --out DIR")
    if layout == "dcp" and is_url(out):
        raise ConfigError(f"--layout dcp writes to a local folder, not to {out}")
    if not is_url(out) and os.path.isfile(out):
        raise ConfigError(f"{out} is a file; --layout {layout} writes a folder")
    _require_free(out, args)


def _require_free(out: str, args: argparse.Namespace) -> None:
    is_there = not is_url(out) and os.path.exists(out)
    if is_there and not args.force and not (os.path.isdir(out) and not os.listdir(out)):
        raise ConfigError(f"{out} exists; give another --out, or --force")


def _refuse_shards(args: argparse.Namespace) -> None:
    if args.max_shard is not None:
        raise ConfigError("--max-shard goes with a Hugging Face folder")


def _dtype(args: argparse.Namespace) -> str | None:
    from lazarus.checkpoint.files.tensors import dtype_named

    try:
        return None if args.dtype is None else dtype_named(args.dtype)
    except ValueError as error:
        raise ConfigError(f"--{error}") from error


def _shard_bytes(args: argparse.Namespace) -> int:
    try:
        return bytes_of_text(args.max_shard or _MAX_SHARD)
    except ValueError as error:
        raise ConfigError(f"--max-shard: {error}") from error

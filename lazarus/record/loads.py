"""Expert loads, recorded by a run or synthetic. Shapes: T steps, L layers, E experts."""

from __future__ import annotations

import base64
import re
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lazarus.basics.careful import open_regular
from lazarus.basics.files import replaced
from lazarus.control.vector import VectorLayout
from lazarus.errors import ConfigError, LazarusError
from lazarus.record.journal_reader import LOADS, TRIES, each_entry
from lazarus.record.load_history import Row, each_load

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]

# Exceptions that numpy raises for a file of another format, or a truncated one.
UNREADABLE = (
    OSError, ValueError, TypeError, EOFError, KeyError, zipfile.BadZipFile, zlib.error,
    NotImplementedError, RuntimeError, MemoryError, SyntaxError, tokenize.TokenError,
)  # fmt: skip
_KEYS = ("expert_load", "load", "counts")
_FINE = 1e9  # the largest count after scaling fractional loads to integers


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadTrace:
    """Routed copies of committed steps.

    ``steps`` is int64 [T], ascending; ``counts`` is int64 [T, L, E].
    """

    steps: Counts
    counts: Counts
    name: str = ""  # the file or the name of a synthetic load

    def at(self, step: int) -> Floats:
        """Fraction of its layer's copies that each expert gets at a step, float64 [L, E].

        The counts of the last recorded step at or before ``step`` are used, or of the first step.
        """
        index = int(np.searchsorted(self.steps, step, side="right")) - 1
        row = self.counts[max(0, index)].astype(np.float64)
        total = row.sum(1, keepdims=True)
        uniform = np.full_like(row, 1.0 / row.shape[1])
        shares: Floats = np.where(total > 0, row / np.where(total > 0, total, 1.0), uniform)
        return shares


def save_loads(path: str | Path, counts_TLE: Any, *, steps: Any = None) -> Path:
    """Write ``expert_load.npz``: ``expert_load`` [T, L, E] and ``steps`` [T] (default 1..T).

    ``lazarus plan --load`` and ``lazarus simulate --load`` read this file.

    Raises:
        ValueError: ``counts_TLE`` has not three dimensions, or ``steps`` has another length.
    """
    counts = np.asarray(counts_TLE, dtype=np.int64)
    numbers = np.arange(1, len(counts) + 1) if steps is None else np.asarray(steps, dtype=np.int64)
    if counts.ndim != 3 or len(numbers) != len(counts):
        raise ValueError(
            f"loads of shape {counts.shape} with {len(numbers)} steps; wanted [T, L, E]"
        )
    place = Path(path)
    with replaced(place) as partial, partial.open("wb") as out:
        np.savez_compressed(out, steps=numbers, expert_load=counts)
    return place


def is_load_file(text: str) -> bool:
    """Whether the name of a load is a file name (.npz or .npy)."""
    return text.endswith((".npz", ".npy"))


def load_loads(path: str | Path) -> LoadTrace:
    """Read ``expert_load.npz``, any .npz with ``load`` or ``counts``, or a .npy: [T, L, E].

    A .npy may also be [L, E], one load for all time. Fractions are scaled to whole counts.

    Raises:
        ConfigError: The file does not exist, or does not hold such loads.
    """
    place = Path(path)
    try:
        name, counts, steps = _arrays_of(place)
    except ConfigError:
        raise
    except UNREADABLE as problem:
        raise ConfigError(f"{place} is not a readable .npz or .npy of numbers: {problem}") from None
    wrong = counts.ndim != 3 or counts.dtype.kind not in "iuf" or steps.shape != counts.shape[:1]
    if wrong or not counts.size or not np.isfinite(counts).all() or (counts < 0).any():
        raise ConfigError(f"{place}: {name} has shape {counts.shape}; wanted counts >= 0 [T, L, E]")
    if counts.dtype.kind == "f" and (counts != np.rint(counts)).any():
        counts = np.rint(counts * (_FINE / counts.max()))
    return LoadTrace(steps=steps.astype(np.int64), counts=counts.astype(np.int64), name=str(path))


def _arrays_of(place: Path) -> tuple[str, NDArray[Any], NDArray[Any]]:
    """The load's name in a file, the load, and its step numbers."""
    with open_regular(place) as file:
        data = np.load(file, allow_pickle=False)
        if isinstance(data, np.ndarray):
            counts = data[None] if data.ndim == 2 else data
            return "its array", counts, np.arange(1, len(counts) + 1)
        name = next((key for key in _KEYS if key in data), None)
        if name is None:
            raise ConfigError(f"{place} holds {sorted(data)}; wanted one of {list(_KEYS)}")
        keys = [key for key in ("steps", "iters") if key in data]
        counts = data[name]
        return name, counts, data[keys[0]] if keys else np.arange(1, len(counts) + 1)


def _rows_of_commits(entries: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    """The loads of commits from a journal's entries, in their order.

    The layout of a generation's vectors comes from the ``resume`` entry before its commits.
    """
    layout: VectorLayout | None = None
    for entry in entries:
        if entry["kind"] == "resume":
            layers, experts = entry["shape"]
            layout = VectorLayout(
                world_size=len(entry["seats"]), num_layers=layers, num_experts=experts
            )
        elif entry["kind"] == "commits" and layout is not None:
            for commit in entry["commits"]:
                if "lanes" not in commit:
                    continue  # archived: the loads are in ``loads.bin``
                lanes = np.frombuffer(base64.b64decode(commit["lanes"]), dtype="<f8")
                if lanes.size >= layout.num_lanes:  # measurements may follow the lanes
                    shape = (layout.num_layers, layout.num_experts)
                    yield int(commit["step"]), lanes[layout.counts].reshape(shape)


def _trace_of(rows: Iterable[Row]) -> LoadTrace:
    """Each committed step once; of one committed again after a rollback, the last commit."""
    found: dict[int, Floats] = {}
    for step, counts_LE in rows:
        while found and next(reversed(found)) >= step:  # committed again, or rolled back
            found.popitem()
        found[step] = counts_LE
    steps = list(found)  # ascending
    shape = (0, *next(iter(found.values())).shape) if found else (0, 0, 0)
    counts = np.stack([found[s] for s in steps]) if steps else np.zeros(shape)
    return LoadTrace(steps=np.array(steps, dtype=np.int64), counts=np.rint(counts).astype(np.int64))


def counts_of_run(run_dir: str | Path) -> LoadTrace | None:
    """The loads of all lives of a run; None without a journal.

    Of a step committed several times, the last commit counts. For a long run, only some steps are
    kept; see ``lazarus.record.load_history``.

    Raises:
        JournalError: An entry is damaged, or missing.
    """
    journals = journals_of(run_dir)
    return _trace_of_journals(journals) if journals else None


def _trace_of_journals(folders: Sequence[Path]) -> LoadTrace:
    for _ in range(TRIES):
        try:
            return _trace_of(_rows_of_journals(folders))
        except FileNotFoundError:  # the running run archived an entry meanwhile
            continue
    raise LazarusError(f"journal {folders[-1]} changes faster than it can be read")


def _rows_of_journals(folders: Iterable[Path]) -> Iterator[Row]:
    for folder in folders:
        yield from each_load(folder / LOADS)
        yield from _rows_of_commits(each_entry(folder))


def journals_of(run_dir: str | Path) -> list[Path]:
    """The journals of a run, life by life: ``journal``, ``journal-2``, ..., ``journal-10``."""
    lives = {
        int(named[1] or 1): folder
        for folder in Path(run_dir).glob("journal*")
        if folder.is_dir() and (named := re.fullmatch(r"journal(?:-(\d+))?", folder.name))
    }
    return [lives[life] for life in sorted(lives)]


def uniform_load(num_layers: int, num_experts: int) -> LoadTrace:
    """A load in which all experts of a layer get the same number of copies."""
    return _constant(np.ones((num_layers, num_experts)), name="uniform")


def zipf_load(num_layers: int, num_experts: int, exponent: float) -> LoadTrace:
    """A Zipf load: the i-th expert has weight i**-exponent, rotated by one from layer to layer."""
    row = np.arange(1, num_experts + 1, dtype=np.float64) ** -exponent
    turned = np.stack([np.roll(row, layer) for layer in range(num_layers)])
    return _constant(turned, name=f"zipf:{exponent:g}")


def _constant(share_LE: Floats, *, name: str) -> LoadTrace:
    counts = np.rint(share_LE / share_LE.sum(1, keepdims=True) * 1e6).astype(np.int64)
    return LoadTrace(steps=np.array([0], dtype=np.int64), counts=counts[None], name=name)


def fitted(trace: LoadTrace, *, num_layers: int, num_experts: int) -> LoadTrace:
    """Convert a trace to another number of layers and experts.

    Layers are repeated cyclically. For fewer experts, the most loaded ones over the whole trace are
    kept; for more experts, each expert is split into equal parts.
    """
    _, layers, experts = trace.counts.shape
    counts = trace.counts[:, np.arange(num_layers) % layers]
    if num_experts < experts:
        top = np.sort(np.argsort(-counts.sum(0), axis=1, kind="stable")[:, :num_experts], axis=1)
        counts = np.take_along_axis(counts, np.broadcast_to(top, (len(counts), *top.shape)), 2)
    elif num_experts > experts:
        parts = -(-num_experts // experts)
        counts = np.repeat(counts, parts, axis=2)[:, :, :num_experts] // parts
    return LoadTrace(steps=trace.steps, counts=counts, name=trace.name)

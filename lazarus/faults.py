"""Parse faults for tests: ``KIND[:NODE]@STEP[/PHASE][,key=value]...``, and random schedules."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import MappingProxyType

from lazarus.errors import ConfigError, Problem

PHASES = (
    "data",
    "forward",
    "dispatch",
    "combine",
    "backward",
    "grad_sync",
    "commit",
    "optimizer",
    "reconfigure",
    "transfer",
)
# Options of each kind; durations are in seconds.
OPTIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "kill": (),
        "stop": ("for",),
        "stall": ("for",),
        "slow": ("factor", "steps"),
        "leave": ("notice",),
        "join": ("count",),
        "crash": (),
        "controller": (),
        "cut": ("for",),
    }
)
KINDS = tuple(OPTIONS)
_WITHOUT_NODE = frozenset({"join", "controller"})
_NODE_OPTIONAL = frozenset({"crash"})  # without a node: every rank raises
_DURATIONS = frozenset({"for", "notice"})
_UNITS = {"ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
_SPEC = re.compile(
    r"(?P<kind>[a-z_]+)(?::(?P<node>\d+))?@(?P<step>\d+)(?:/(?P<phase>[a-z_]+))?(?P<rest>(?:,.*)?)"
)
_FORM = "KIND[:NODE]@STEP[/PHASE][,key=value]... such as kill:2@20 or slow:1@20,factor=3,steps=50"


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultSpec:
    """One scripted fault. ``str()`` gives a text that parses to an equal object."""

    kind: str
    node: int | None  # the node's number, in the order of joining
    step: int  # the fault happens while the node is in this step; leave and join happen before it
    phase: str | None = None
    options: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        node = "" if self.node is None else f":{self.node}"
        phase = "" if self.phase is None else f"/{self.phase}"
        rest = "".join(
            f",{name}={_plain(value)}{'s' if name in _DURATIONS else ''}"
            for name, value in self.options.items()
        )
        return f"{self.kind}{node}@{self.step}{phase}{rest}"

    def __hash__(self) -> int:
        return hash(str(self))


@dataclass(frozen=True, kw_only=True, slots=True)
class ChaosSpec:
    """Random faults with a mean time between them; the same seed gives the same faults."""

    mtbf_s: float
    seed: int = 0
    kinds: tuple[str, ...] = ("kill",)

    def __str__(self) -> str:
        return f"mtbf={_plain(self.mtbf_s)}s,seed={self.seed},kinds={'+'.join(self.kinds)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ChaosEvent:
    """One random fault. ``pick`` selects the node: ``live[int(pick * len(live))]``."""

    at_s: float  # since the run's first step
    kind: str
    pick: float  # in [0, 1)


def parse_fault(text: str) -> FaultSpec:
    """Parse one fault, such as ``kill:2@20``.

    Raises:
        ConfigError: The text is not a valid fault; the message says what is wrong.
    """
    match = _SPEC.fullmatch(text.strip())
    if match is None:
        raise _bad(text, f"does not read as {_FORM}")
    kind = match["kind"]
    if kind not in OPTIONS:
        raise _bad(text, f"unknown kind {kind!r}{_nearest(kind, KINDS)}")
    node = None if match["node"] is None else int(match["node"])
    if node is None and kind not in _WITHOUT_NODE | _NODE_OPTIONAL:
        raise _bad(text, f"{kind} needs a node: {kind}:NODE@{match['step']}")
    if node is not None and kind in _WITHOUT_NODE:
        raise _bad(text, f"{kind} takes no node: {kind}@{match['step']}")
    if (step := int(match["step"])) < 1:
        raise _bad(text, "steps are counted from 1")
    if (phase := match["phase"]) is not None and phase not in PHASES:
        raise _bad(text, f"unknown phase {phase!r}{_nearest(phase, PHASES)}")
    options = _parse_options(text, kind, match["rest"])
    return FaultSpec(kind=kind, node=node, step=step, phase=phase, options=options)


def parse_chaos(text: str) -> ChaosSpec:
    """Parse random faults, such as ``mtbf=30s,seed=1,kinds=kill+join``.

    Raises:
        ConfigError: The text is not valid; the message says what is wrong.
    """
    given = dict(_pairs(text, text))
    if unknown := sorted(set(given) - {"mtbf", "seed", "kinds"}):
        raise _bad(text, f"unknown option {unknown[0]!r}{_nearest(unknown[0], _CHAOS_KEYS)}")
    if "mtbf" not in given:
        raise _bad(text, "mtbf is missing, as in mtbf=30s,seed=1,kinds=kill+join")
    kinds = tuple(given.get("kinds", "kill").split("+"))
    for kind in kinds:
        if kind not in OPTIONS:
            raise _bad(text, f"unknown kind {kind!r}{_nearest(kind, KINDS)}")
    mtbf_s = _number(text, "mtbf", given["mtbf"])
    seed = given.get("seed", "0")
    if not seed.isdecimal():
        raise _bad(text, f"seed={seed} is not a whole number >= 0")
    return ChaosSpec(mtbf_s=mtbf_s, seed=int(seed), kinds=kinds)


def chaos_events(spec: ChaosSpec) -> Iterator[ChaosEvent]:
    """Yield the endless, reproducible sequence of random faults, with exponential gaps."""
    rng = random.Random(f"lazarus chaos {spec.seed}")
    at_s = 0.0
    while True:
        at_s += rng.expovariate(1.0 / spec.mtbf_s)
        yield ChaosEvent(at_s=at_s, kind=rng.choice(spec.kinds), pick=rng.random())


def fault_problems(
    faults: Iterable[FaultSpec], *, nodes: int, steps: int, chaos: ChaosSpec | None = None
) -> list[Problem]:
    """Problems of faults that can never happen in a run with this many nodes and steps.

    A node exists from the start, or comes with an earlier ``join`` fault. With random joins, a
    node with any number may come.
    """
    specs = list(faults)
    problems = []
    for spec in specs:
        joined = sum(int(f.options.get("count", 1)) for f in _joins_before(specs, spec.step))
        last = nodes + joined - 1
        there = f"{nodes} nodes and {joined} joins" if joined else f"{nodes} nodes"
        if spec.node is not None and spec.node > last and not (chaos and "join" in chaos.kinds):
            problems.append(
                Problem(
                    f"fault {spec}: there is no node {spec.node}; {there} are numbered 0 to {last}"
                )
            )
        if spec.step > steps:
            problems.append(
                Problem(
                    f"fault {spec}: the run has {steps} steps, step {spec.step} never comes",
                    key="faults.specs",
                )
            )
    return problems


def _joins_before(specs: Sequence[FaultSpec], step: int) -> list[FaultSpec]:
    return [spec for spec in specs if spec.kind == "join" and spec.step < step]


_CHAOS_KEYS = ("mtbf", "seed", "kinds")


def _parse_options(text: str, kind: str, rest: str) -> dict[str, float]:
    options = {}
    for name, value in _pairs(text, rest.removeprefix(",")) if rest else ():
        if name not in OPTIONS[kind]:
            allowed = ", ".join(OPTIONS[kind]) or "none"
            raise _bad(text, f"{kind} has no option {name!r}; it takes: {allowed}")
        options[name] = _number(text, name, value)
    return options


def _pairs(text: str, rest: str) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for part in rest.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not name or not value:
            raise _bad(text, f"{part!r} is not key=value")
        if name in dict(pairs):
            raise _bad(text, f"{name} is given twice")
        pairs.append((name, value))
    return pairs


def seconds_of(text: str) -> float:
    """Parse a duration such as 30, 500ms, 30s, 5min or 1h; return seconds.

    Raises:
        ValueError: The text is not a duration.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|min|h)?", text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a duration such as 30s, 5min or 1h")
    return float(match[1]) * _UNITS[match[2] or "s"]


def _number(text: str, name: str, value: str) -> float:
    match = re.fullmatch(r"([0-9.eE+-]+?)\s*(ms|s|min|h)?", value)
    try:
        number = float(match[1]) if match else float("nan")
    except ValueError:
        number = float("nan")
    if match is None or not 0 < number < float("inf"):
        raise _bad(text, f"{name}={value} is not a number > 0, such as 30, 0.5 or 30s")
    if match[2] is not None and name not in _DURATIONS | {"mtbf"}:
        raise _bad(text, f"{name}={value} is not a duration; leave out {match[2]!r}")
    return number * _UNITS[match[2] or "s"]


def _plain(number: float) -> str:
    """A short text that parses to the same number."""
    return f"{number:g}" if float(f"{number:g}") == number else repr(number)


def _nearest(word: str, known: Sequence[str]) -> str:
    close = get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"


def _bad(text: str, reason: str) -> ConfigError:
    return ConfigError(f"fault {text!r}: {reason}")

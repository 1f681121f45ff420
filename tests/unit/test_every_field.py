"""Every field that a process is handed changes something; a field without an entry fails.

Of what the controller decides by, a whole small story is told with and without the change, and its
commands are compared. Of the other processes' specs, what they do with it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from control_desk import EXPERTS, Desk
from msgspec.structs import replace as changed

from lazarus import cli
from lazarus.checkpoint.restoring.plt import PltLedger
from lazarus.checkpoint.restoring.restore_choice import StoredCheckpoint
from lazarus.config.timeouts import Timeouts, derive_timeouts
from lazarus.control.cluster.state import ControlConfig
from lazarus.control.messages import DigestItem, DigestPart, Finalized, Hello, Paused
from lazarus.control.ports import ManifestDone, Stored, WriteManifest
from lazarus.policy.checked import CheckedRecovery
from lazarus.recovery import Stop
from placement import PlacementRequest, Plan, replan

ROOT = Path(__file__).resolve().parents[2]
Options = Mapping[str, Any]


class Zoned(Desk):
    """Nodes that name a zone and a memory."""

    def hello(self, worker: str) -> Hello:
        if not self.committed[worker]:
            self.committed[worker] = self.state.config.start_step
        zone = "a" if worker in ("w0", "w2") else "b"
        return changed(super().hello(worker), zone=zone, memory_bytes=4)


def told(desk: Desk) -> str:
    return "\n".join(map(repr, desk.log))


def course(options: Options) -> str:
    """A run that loses a node with an expert that nobody else has, goes on, gets another one."""
    desk = Zoned(**{"steps": 12, **options})
    for step in range(1, 5):
        if desk.state.resumed:
            desk.commit(desk.state.step + 1)
        if step == 2 and desk.state.resumed and "resume" not in options:
            desk.written(2)
    if "w2" in desk.state.standing.seats:
        desk.lose("w2")
    for _ in range(4):
        desk.tick(0.5)
    desk.committed["w9"] = desk.entered["w9"] = 0
    desk.held["w9"] = ()
    desk.say("w9", desk.hello("w9"))
    for _ in range(8):
        desk.tick(0.5)
    return told(desk)


def ending(options: Options) -> str:
    """A run whose last step is committed, and that ends."""
    desk = Desk(**{"steps": 3, **options})
    for step in range(1, 4):
        desk.commit(step)
    for worker in desk.state.standing.seats:
        desk.say(worker, Paused(generation=desk.state.resumed, step=3))
    for worker in desk.state.standing.seats:
        items = (DigestItem(name=worker, sha256=b"x" * 32),)
        desk.say(worker, DigestPart(generation=desk.state.resumed, step=3, items=items))
        desk.say(worker, Finalized(generation=desk.state.resumed, step=3, files="{}"))
    for _ in range(4):
        desk.tick()
    if desk.of(WriteManifest):
        desk.feed(ManifestDone(generation=1, step=3, at_s=desk.now_s, final=True, kind="full"))
    return told(desk)


def asked(options: Options) -> str:
    """What the first plan is asked for."""
    requests: list[PlacementRequest] = []

    def spy(request: PlacementRequest, *, previous: Plan | None, lost: frozenset[int]) -> Plan:
        requests.append(request)
        return replan(request, previous=previous, lost=lost)

    Zoned(**{"placement": spy, **options})
    return repr(requests)


def backwards(request: PlacementRequest, *, previous: Plan | None, lost: frozenset[int]) -> Plan:
    return replan(replace(request, resilience_weight=0.0, min_replicas=1), previous=None, lost=lost)


def stops(losses: Any, view: Any, *, now_s: float) -> Any:
    return Stop(reason=f"{len(view.checkpoints)} checkpoints")


STOPPING = CheckedRecovery(stops, limit_s=None, on_lost_expert="partial")


CHECKPOINT = StoredCheckpoint(generation=1, step=4, is_full=True)
STORED = tuple(Stored(layer=0, expert=e, generation=1, step=4, routed=32) for e in range(EXPERTS))
RESUMED = {
    "resume": "/old",
    "start_step": 4,
    "start_generation": 3,
    "start_lineage": ((1, 0),),
    "checkpoints": (CHECKPOINT,),
    "stored": STORED,
}
Entry = tuple[Any, Callable[[Options], str]] | tuple[Any, Callable[[Options], str], Options]
CONTROL: dict[str, Entry] = {
    "steps": (4, ending),
    "run_id": ("other", course),
    "faults": (("kill:0@99",), ending),
    "ledger": (True, course),
    "nodes": (4, course),
    "min_nodes": (3, course),
    "max_nodes": (2, course, {"nodes": 2}),
    "ranks_per_node": (2, course),
    "min_replicas": (2, asked),
    "slots_per_node": (3, asked),
    "spare_losses": (2, asked),
    "timeouts": (derive_timeouts(1.0), course),
    "join_debounce_s": (60.0, course),
    "quorum_timeout_s": (1.0, course, {"min_nodes": 3}),
    "final_checkpoint": (False, ending),
    "on_lost_expert": ("fail", course),
    "resilience_weight": (0.25, asked),
    "solver": ("ilp", asked),
    "plan_limit_s": (0.5, asked),
    "plans_by_zone": (True, asked),
    "memory_fraction": (0.01, asked),
    "version": ("other", course),
    "start_plt": (PltLedger(spans={(0, 1): ((0, 32),)}), course, {**RESUMED, "plt_budget": 0.3}),
    "start_plt_spent": (0.5, course, {**RESUMED, "plt_budget": 1e-9}),
    "plt_budget": (1.0, course, RESUMED),
    "placement": (backwards, course, {"slots_per_node": 2}),
    "plan_text": (lambda plan: Plan.to_json(plan) + " ", course),
    "resume": ("/new", course, RESUMED),
    "start_step": (5, course, RESUMED),
    "start_generation": (8, course, RESUMED),
    "start_lineage": (((2, 0),), course, RESUMED),
    "checkpoint_url": ("/elsewhere", course),
    "probes_place": (True, course),
    "recovery": (STOPPING, course),
    "checkpoints": ((), course, {**RESUMED, "recovery": STOPPING}),
    "stored": ((), course, RESUMED),
}
# What needs more of a scene than is told here: the test that shows it names the field.
ELSEWHERE = {
    "global_batch": "unit/test_step_measures.py",
    "seed": "unit/test_step_measures.py",
    "heal": "fault/test_heal.py",
    "partial_checkpoints": "unit/test_control_saves.py",
    "rescue_url": "unit/test_control_finalizing.py",
    "on_mismatch": "unit/test_control_repair.py",
    "saves": "unit/test_control_saves.py",
}


def test_every_field_of_the_controllers_configuration_has_an_entry() -> None:
    assert sorted({*CONTROL, *ELSEWHERE}) == sorted(f.name for f in fields(ControlConfig))
    for name, path in ELSEWHERE.items():
        assert name in (ROOT / "tests" / path).read_text(), name


@pytest.mark.parametrize("name", CONTROL)
def test_a_field_changes_what_the_controller_does(name: str) -> None:
    value, story, *more = CONTROL[name]
    beside: Options = more[0] if more else {}
    assert story(beside) != story({**beside, name: value})


# ---- time-outs ----------------------------------------------------------------------------------


def attributes_read() -> set[str]:
    """Every attribute that the code reads, the definition of the time-outs apart."""
    found: set[str] = set()
    for path in (ROOT / "lazarus").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add(node.attr)
    return found


def test_every_time_out_is_read_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    names = [f.name for f in fields(Timeouts)]
    assert set(names) <= attributes_read()
    assert cli.main(["config", "show", "--set", "recovery.tolerated_stall_s=3"]) == 0
    shown = re.findall(r"^# (\w+) = ([\d.]+)$", capsys.readouterr().out, flags=re.MULTILINE)
    derived = derive_timeouts(3.0)
    assert [(name, float(value)) for name, value in shown] == [
        (name, pytest.approx(getattr(derived, name))) for name in names
    ]


def defaults_of(tree: ast.AST) -> set[tuple[str, str]]:
    """(function or class, parameter) of every parameter that has a default."""
    found: set[tuple[str, str]] = set()
    for node in ast.walk(tree):
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        for item in inner:
            if isinstance(item, ast.AnnAssign) and item.value and isinstance(node, ast.ClassDef):
                found.add((node.name, ast.unparse(item.target)))
            if isinstance(item, ast.FunctionDef):
                made = isinstance(node, ast.ClassDef) and item.name == "__init__"
                owner = node.name if made else item.name  # type: ignore[attr-defined]
                args, late = item.args.args, item.args.kwonlyargs
                named = args[len(args) - len(item.args.defaults) :]
                named += [a for a, d in zip(late, item.args.kw_defaults, strict=True) if d]
                found |= {(owner, arg.arg) for arg in named}
    return found


def test_a_time_out_that_is_passed_on_has_no_default_where_it_arrives() -> None:
    """Else a call that forgets it goes unnoticed, and the setting decides nothing there."""
    given: set[tuple[str, str]] = set()
    optional: set[tuple[str, str]] = set()
    for path in (ROOT / "lazarus").rglob("*.py"):
        tree = ast.parse(path.read_text())
        optional |= defaults_of(tree)
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func).rpartition(".")[2]
            given |= {
                (name, str(word.arg))
                for word in call.keywords
                if re.search(r"timeouts\.\w+$", ast.unparse(word.value))
            }
    assert len(given) > 15
    assert given & optional == set()


def test_every_time_out_follows_the_stall() -> None:
    one, other = derive_timeouts(0.5), derive_timeouts(1000.0)
    same = [f.name for f in fields(Timeouts) if getattr(one, f.name) == getattr(other, f.name)]
    assert same == []


def test_a_stall_is_multiplied_nowhere_else() -> None:
    """Neither by name nor as the attribute of a configuration."""
    found = []
    for path in (ROOT / "lazarus").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult | ast.Div):
                words = ast.unparse(node)
                if re.search(r"\b(tolerated_stall_s|stall_s|timeouts\.\w+)\b", words):
                    found.append(f"{path.name}: {words}")
    doubled = "saves.py: state.config.timeouts.whole_pause_s * 2 ** "
    assert [words for words in found if not words.startswith(doubled)] == []

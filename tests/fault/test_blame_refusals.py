"""A rank that says what cannot be is a bug of ours, and never read as a machine that failed."""

from __future__ import annotations

from pathlib import Path

import pytest
from user_scripts import run_script

pytestmark = pytest.mark.timeout(300)

# Some processes report a step that cannot be once they are fenced; then another one is killed.
ODD_REPORTS = """
from msgspec.structs import replace
from lazarus.runtime.fence.ledger import StepLedger

ROLES, PLACE = {roles!r}, {place!r}
sound = StepLedger.raise_fence

def odd(ledger, *args, **more):
    report = sound(ledger, *args, **more)
    return None if report is None else replace(report, committed=1 << 40)

def loss(model, batch):
    calls = model.calls = getattr(model, "calls", 0) + 1
    if calls == 1:
        for number, role in enumerate(ROLES):
            try:
                os.close(os.open(os.path.join(PLACE, str(number)), os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            model.role = role
            break
        if getattr(model, "role", "") == "odd":
            StepLedger.raise_fence = odd
    if calls == 9 and getattr(model, "role", "") == "victim":
        os.kill(os.getpid(), 9)
    return LossSum(model(batch["x"]).square().sum(), batch["x"].numel())
"""


def script(place: Path, roles: tuple[str, ...]) -> str:
    place.mkdir()
    return ODD_REPORTS.replace("{roles!r}", repr(roles)).replace("{place!r}", repr(str(place)))


@pytest.mark.slow
def test_a_rank_that_is_not_understood_is_lost_through_our_fault(tmp_path: Path) -> None:
    body = script(tmp_path / "roles", ("odd", "victim"))
    left = run_script(tmp_path, body, nodes=4, steps=8, settings=("recovery.tolerated_stall_s=2",))
    assert left.code == 0, left.err[-2000:]
    refused = left.of("message_refused")
    assert refused and {e["message"] for e in refused} == {"Report"}
    (ours,) = left.of("internal_error")
    causes = {e["node"]: e["cause"] for e in left.of("node_lost")}
    assert len(causes) == 2
    assert causes[ours["node"]].startswith("Lazarus failed: Report of its worker was refused")
    assert left.of("run_finished")[0]["refused_messages"] == len(refused)


@pytest.mark.slow
def test_two_ranks_that_are_not_understood_end_the_run_as_internal(tmp_path: Path) -> None:
    """Exit 1, a report for the bug tracker, and no word of failed nodes."""
    body = script(tmp_path / "roles", ("odd", "odd", "victim"))
    left = run_script(tmp_path, body, nodes=4, steps=8, settings=("recovery.tolerated_stall_s=2",))
    assert left.code == 1, left.err[-2000:]
    (end,) = left.of("run_finished")
    assert (end["status"], end["cause"]) == ("failed", "internal")
    assert "Report of its worker was refused" in end["error"]
    assert "InternalError" in left.err
    (report,) = left.folder.glob("internal-error-*.txt")
    assert report.name in left.err and "Report of its worker was refused" in report.read_text()

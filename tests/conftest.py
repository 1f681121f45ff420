"""Settings shared by all tests."""

import gc
import os
import signal
import threading
import time
from multiprocessing import forkserver, resource_tracker

import pytest
from hypothesis import HealthCheck, settings

# No deadline for one example: machines are shared. Where a failure must be the change's own, the
# examples are the same in every run; everywhere else each run tries new ones.
settings.register_profile(
    "lazarus",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
    derandomize="CI" in os.environ,
)
settings.load_profile("lazarus")

# A shell's background job ignores interrupts, and so would every program that these tests start
# and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_BUDGET_S = float(os.environ.get("LAZARUS_TEST_BUDGET_S", "inf"))
_STARTED_S = time.monotonic()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Keep what the tests' modules have imported out of the garbage collections of the tests."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Within a time budget, slow tests that would start too late are skipped, and say so."""
    if item.get_closest_marker("slow") and time.monotonic() - _STARTED_S > _BUDGET_S:
        pytest.skip(f"the time budget of {_BUDGET_S:.0f} s for slow tests is spent")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A selection that matches no test is no failure: the slow ones may not be there yet.

    The fork server of the process launcher and multiprocessing's resource tracker are waited for,
    so that nothing outlives the tests; the tracker not for long, since a process that a test left
    behind would keep it alive.
    """
    forkserver._forkserver._stop()
    ending = threading.Thread(target=resource_tracker._resource_tracker._stop, daemon=True)
    ending.start()
    ending.join(5.0)
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and session.config.option.markexpr:
        session.exitstatus = pytest.ExitCode.OK

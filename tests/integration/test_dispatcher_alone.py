"""The dispatcher without a runtime: its example runs; importing it loads neither Ray nor us."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*command: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, check=True, capture_output=True,
        text=True, timeout=100,
    ).stdout  # fmt: skip


def test_the_example_serves_every_copy() -> None:
    lines = run("examples/dispatcher_alone.py").splitlines()
    assert len(lines) == 4
    assert sum(int(line.split()[3]) for line in lines) == 4 * 100 * 2


def test_the_dispatcher_needs_no_ray_and_no_runtime() -> None:
    seen = run(
        "-c",
        "import sys, dispatcher, dispatcher.trace; "
        "print([m for m in ('ray', 'grpc', 'lazarus', 'placement', 'scipy') if m in sys.modules])",
    )
    assert seen.strip() == "[]"

"""A controller that restarts is up at once: it loads nothing that it does not need to listen."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "scipy", "ray", "plotly", "pulp", "cloudpickle")


@pytest.mark.parametrize(
    "module", ["lazarus.runtime.controller.shell", "lazarus.runtime.launch.ray_actors"]
)
def test_the_controllers_process_imports_no_torch_and_no_scipy(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"

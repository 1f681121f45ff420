"""What the autoscaler of a cluster was last asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

_PROGRAM = """
import sys, ray
from ray.experimental.internal_kv import _internal_kv_get
from ray.autoscaler._private.constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL as channel
ray.init(address=sys.argv[1], log_to_driver=False, configure_logging=False)
print((_internal_kv_get(channel) or b"[]").decode())
"""


def asked_for(head: Any) -> list[dict[str, float]]:
    """The resources of each machine that was asked for."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, head.address],
        env=head.environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    asked: list[dict[str, float]] = json.loads(done.stdout.strip().splitlines()[-1])
    return asked

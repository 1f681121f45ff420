"""Folder, token and settings of an embedded Ray. Imports no Ray, which reads them at import."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
from pathlib import Path

_PREFIX = "lz-"
_OWNER = "owner"  # file that names the process whose end makes the folder useless
_MAX_TEMP = 40  # Unix socket paths below it must stay under 108 characters


class PrivateHome:
    """Must exist before Ray is imported, or token authentication stays as Ray found it then."""

    def __init__(self) -> None:
        base = tempfile.gettempdir()
        base = base if len(base) < _MAX_TEMP else "/tmp"
        sweep(Path(base))
        self.folder = tempfile.mkdtemp(prefix=_PREFIX, dir=base)
        (Path(self.folder) / _OWNER).write_text(f"{_pid_namespace()} {os.getpid()}")
        settings = {
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        }
        if "ray" not in sys.modules:
            token = Path(self.folder) / "token"
            token.touch(mode=0o600)
            token.write_text(secrets.token_hex(32))
            settings |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        self._before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)

    def close(self) -> None:
        """Put the settings back and remove the folder."""
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        shutil.rmtree(self.folder, ignore_errors=True)


def _pid_namespace() -> str:
    return os.readlink("/proc/self/ns/pid")


def sweep(base: Path) -> None:
    """Remove what killed drivers left behind: logs, and the token of a Ray that is gone."""
    for folder in base.glob(f"{_PREFIX}*"):
        try:
            namespace, pid = (folder / _OWNER).read_text().split()
        except (OSError, ValueError):
            continue  # not ours
        if namespace == _pid_namespace() and not Path("/proc", pid).exists():
            shutil.rmtree(folder, ignore_errors=True)

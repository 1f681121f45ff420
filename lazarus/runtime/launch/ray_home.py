"""Folder, token and settings of an embedded Ray.

This module does not import Ray, because Ray reads its settings at import.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
from pathlib import Path

_PREFIX = "lz-"
_OWNER = "owner"  # file with the driver's process id; ``sweep`` reads it
_RAY = "r"  # Ray's folder: Ray makes it readable by everybody, so it lies in a private one
_LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # "0": this node's address is the loopback's
# Longest base folder: a path to a Unix socket has at most 107 letters, of which 78 follow the base:
# lz-8LETTERS/r/, the session's name with a process id of seven digits, /sockets/plasma_store.
_MAX_TEMP = 107 - 78


class PrivateHome:
    """The private folder of an embedded Ray, and the environment variables that Ray reads.

    Create it before Ray is imported: Ray reads the settings of token authentication at import.

    Attributes:
        folder: Folder that only this user can enter.
        ray_folder: Ray's temporary folder, inside ``folder``.
    """

    def __init__(self) -> None:
        base = tempfile.gettempdir()
        base = base if len(base) <= _MAX_TEMP else "/tmp"
        sweep(Path(base))
        self.folder = tempfile.mkdtemp(prefix=_PREFIX, dir=base)
        self.ray_folder = str(Path(self.folder) / _RAY)
        Path(self.ray_folder).mkdir(mode=0o700)
        (Path(self.folder) / _OWNER).write_text(f"{_pid_namespace()} {os.getpid()}")
        settings = {
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            _LOOPBACK_ONLY: "0",
        }
        if "ray" not in sys.modules:
            token = Path(self.folder) / "token"
            token.touch(mode=0o600)
            token.write_text(secrets.token_hex(32))
            settings |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        self._before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)

    def close(self) -> None:
        """Restore the environment variables and remove the folder."""
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        shutil.rmtree(self.folder, ignore_errors=True)


def _pid_namespace() -> str:
    return os.readlink("/proc/self/ns/pid")


def sweep(base: Path) -> None:
    """Remove the folders in ``base`` of drivers that were killed: logs and tokens."""
    for folder in base.glob(f"{_PREFIX}*"):
        try:
            namespace, pid = (folder / _OWNER).read_text().split()
        except (OSError, ValueError):
            continue  # not a folder of this library
        if namespace == _pid_namespace() and not Path("/proc", pid).exists():
            shutil.rmtree(folder, ignore_errors=True)

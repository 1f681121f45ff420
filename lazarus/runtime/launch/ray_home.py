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
_RAY = "r"  # folder that is Ray's own: Ray opens it to everybody, so it lies inside one that is not
_LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # "0": this node's address is the loopback's
# Letters of a path to a Unix socket, less those below the base: lz-8LETTERS/r/, the session's
# name with a process id of seven digits, /sockets/plasma_store.
_MAX_TEMP = 107 - 78


class PrivateHome:
    """Must exist before Ray is imported, or token authentication stays as Ray found it then.

    Attributes:
        folder: Nobody else can enter it.
        ray_folder: Ray's temporary folder, inside.
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

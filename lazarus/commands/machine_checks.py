"""Is this machine fit for a run? Each check gives one finding with its way out."""

from __future__ import annotations

import importlib
import os
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from lazarus.basics.format import bytes_text

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What one check saw."""

    name: str
    level: Level
    text: str
    fix: str = ""

    def __str__(self) -> str:
        fix = f"  -> {self.fix}" if self.fix else ""
        return f"{self.level:4}  {self.name:10} {self.text}{fix}"


def examine(environment: Mapping[str, str]) -> list[Finding]:
    """All checks; some seconds, since torch and Ray are imported."""
    found = [_python(), *_packages()]
    checks: tuple[Callable[[], Finding], ...] = (_memory, _shared_memory, _disk, _files, _loopback)
    found += [check() for check in checks]
    return [*found, _name_resolves(), _ray_token(environment), _threads(environment), _gpu()]


def _python() -> Finding:
    have = ".".join(map(str, sys.version_info[:3]))
    return Finding(name="python", level="ok", text=have)


def _packages() -> list[Finding]:
    """Each dependency: installed, importable, within the tested range."""
    wanted = [Requirement(text) for text in requires("lazarus-moe") or ()]
    return [_package(r) for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]


def _package(wanted: Requirement) -> Finding:
    install = f"pip install '{wanted}'"
    try:
        have = version(wanted.name)
    except PackageNotFoundError:
        return Finding(name=wanted.name, level="fail", text="not installed", fix=install)
    if not wanted.specifier.contains(have, prereleases=True):
        text = f"{have}, tested with {wanted.specifier}"
        return Finding(name=wanted.name, level="warn", text=text, fix=install)
    module = {"grpcio": "grpc"}.get(wanted.name, wanted.name)
    try:
        importlib.import_module(module.lower())
    except ImportError as error:
        return Finding(name=wanted.name, level="fail", text=f"{have}: {error}", fix=install)
    return Finding(name=wanted.name, level="ok", text=have)


def _memory() -> Finding:
    pages = {
        line.split(":")[0]: int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
    }
    free = pages.get("MemAvailable", 0)
    text = f"{bytes_text(free)} of {bytes_text(pages.get('MemTotal', 0))} free"
    if free < 2 * 2**30:
        return Finding(name="memory", level="fail", text=text, fix="a rank takes about 0.5 GiB")
    if free < 6 * 2**30:
        return Finding(name="memory", level="warn", text=text, fix="the demo takes up to 6 GB")
    return Finding(name="memory", level="ok", text=text)


def _shared_memory() -> Finding:
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        text, fix = "no /dev/shm", "Ray then keeps its objects on disk"
        return Finding(name="/dev/shm", level="warn", text=text, fix=fix)
    level: Level = "ok" if free > 256 * 2**20 else "warn"
    fix = "" if level == "ok" else "give the container more shared memory (--shm-size)"
    return Finding(name="/dev/shm", level=level, text=f"{bytes_text(free)} free", fix=fix)


def _disk() -> Finding:
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    level: Level = "ok" if free > 2 * 2**30 else "warn"
    fix = "" if level == "ok" else "free some, or set TMPDIR"
    return Finding(name="disk", level=level, text=f"{bytes_text(free)} free in {folder}", fix=fix)


def _files() -> Finding:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    level: Level = "ok" if limit >= 1024 else "warn"
    fix = "" if level == "ok" else "ulimit -n 65536"
    return Finding(name="open files", level=level, text=f"limit {limit}", fix=fix)


def _loopback() -> Finding:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=2).close()
    except OSError as error:
        fix = "an embedded run needs TCP on 127.0.0.1"
        return Finding(name="loopback", level="fail", text=str(error), fix=fix)
    return Finding(name="loopback", level="ok", text="TCP works")


def _name_resolves() -> Finding:
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError:
        fix = f"add {host} to /etc/hosts; gloo looks it up, which can take seconds"
        return Finding(name="host name", level="warn", text=f"{host} does not resolve", fix=fix)
    return Finding(name="host name", level="ok", text=f"{host} is {address}")


def _ray_token(environment: Mapping[str, str]) -> Finding:
    mode = environment.get("RAY_AUTH_MODE")
    token = Path(environment.get("HOME", "~"), ".ray", "auth_token").expanduser()
    if mode is None and token.exists():
        text = f"{token} exists, RAY_AUTH_MODE is not set"
        fix = "export RAY_AUTH_MODE=token, lest `ray job submit` be refused"
        return Finding(name="ray auth", level="warn", text=text, fix=fix)
    return Finding(name="ray auth", level="ok", text=f"RAY_AUTH_MODE={mode or 'unset'}")


def _threads(environment: Mapping[str, str]) -> Finding:
    cores = len(os.sched_getaffinity(0))
    asked = environment.get("OMP_NUM_THREADS")
    text = f"{cores} cores, OMP_NUM_THREADS={asked or 'unset'}"
    return Finding(name="cores", level="ok", text=text)


def _gpu() -> Finding:
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return Finding(name="gpu", level="ok", text="none: ranks compute on the CPU, over gloo")
    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    text = f"{torch.cuda.device_count()} x {', '.join(sorted(names))}"
    return Finding(name="gpu", level="ok", text=text)

"""The private folder of an embedded Ray: secret, put back, and swept when its owner was killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lazarus.runtime.launch import ray_home


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "t"
    folder.mkdir()
    monkeypatch.setattr(ray_home.tempfile, "gettempdir", lambda: str(folder))
    monkeypatch.setattr(ray_home, "_MAX_TEMP", 4096)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    return folder


def test_the_token_is_for_the_owner_alone_and_the_environment_is_put_back(base: Path) -> None:
    home = ray_home.PrivateHome()
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert token.parent == Path(home.folder)
    assert token.stat().st_mode & 0o777 == 0o600
    assert Path(home.folder).stat().st_mode & 0o777 == 0o700
    assert os.environ["RAY_AUTH_MODE"] == "token"
    home.close()
    assert os.environ["RAY_AUTH_MODE"] == "disabled"
    assert list(base.iterdir()) == []


def test_a_folder_is_swept_when_its_owner_is_gone_and_only_then(base: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    namespace = os.readlink("/proc/self/ns/pid")
    owners = {
        "lz-dead": f"{namespace} {gone.pid}",
        "lz-alive": f"{namespace} {os.getpid()}",
        "lz-other": f"pid:[1] {gone.pid}",
        "lz-foreign": "something else entirely",
    }
    for name, owner in owners.items():
        (base / name).mkdir()
        (base / name / "owner").write_text(owner)
    (base / "lz-empty").mkdir()
    home = ray_home.PrivateHome()
    home.close()
    left = {path.name for path in base.iterdir()}
    assert left == {"lz-alive", "lz-other", "lz-foreign", "lz-empty"}


def test_the_longest_path_of_a_socket_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """E3: at the longest base that is taken; a longer one is left for /tmp."""
    below = "/lz-abcdefgh/r/session_2026-11-30_16-49-40_435023_4194304/sockets/plasma_store"
    assert ray_home._MAX_TEMP + len(below) == 107  # of sun_path's 108, one is the end
    monkeypatch.setattr(ray_home.tempfile, "gettempdir", lambda: "/tmp/" + 30 * "x")
    home = ray_home.PrivateHome()
    try:
        assert Path(home.folder).parent == Path("/tmp")
        assert Path(home.ray_folder).parent == Path(home.folder)
    finally:
        home.close()

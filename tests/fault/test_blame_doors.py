"""Doors: who may connect, what crosses the wire, what is listened on and what is advertised."""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import make_pair
from fault_runs import Watched, watch
from listening import Sniffer, listeners, tree_of

from lazarus.checkpoint.files.store import Tag
from lazarus.errors import ConfigError
from lazarus.runtime.keeper.client import KeeperClient
from lazarus.runtime.keeper.process import KeeperConfig
from lazarus.runtime.launch.launcher import hosts_of
from lazarus.runtime.launch.local_nodes import LocalNodes
from lazarus.runtime.rpc.channel import CONTROL, KEEPER, method
from lazarus.runtime.rpc.credentials import Credentials, check_certificate, read_secret

SECRET = "5eC7e7-" * 5
SAVES = ("checkpoint.every=1", "checkpoint.copies=1", "metrics.report=false")


@pytest.fixture
def secret_file(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.touch(mode=0o600)
    path.write_text(f"{SECRET}\n")
    return path


def keepers_of(run: Watched) -> list[int]:
    pids = [pid for node in run.node_names() for pid in run.pids(node)]
    return [
        p
        for p in pids
        if b"lazarus.runtime.keeper.process" in Path(f"/proc/{p}/cmdline").read_bytes()
    ]


def plain_call(address: str, service: str, name: str) -> grpc.StatusCode:
    """How a client in the clear fares that knows the secret."""
    with grpc.insecure_channel(address) as channel:
        call = channel.stream_stream(method(service, name))
        answers = call(iter([b""]), metadata=(("authorization", f"Bearer {SECRET}"),), timeout=10)
        try:
            list(answers)
        except grpc.RpcError as problem:
            return problem.code()
    return grpc.StatusCode.OK


def sniffed(folder: Path, address: str, *settings: str, look: Callable[[Watched], Any]) -> bytes:
    """All that a run of two nodes sent, its last save and copies included."""
    sniffer = Sniffer(address)
    saved = threading.Event()

    def act(run: Watched) -> None:
        look(run)
        saved.set()

    run = watch(
        folder,
        nodes=2,
        steps=8,
        settings=(*SAVES, f"security.bind={address}", *settings),
        acts=[(lambda event: event["event"] == "checkpoint_persisted", act)],
    )
    assert saved.is_set()
    assert run.steps == list(range(1, 9))
    return sniffer.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_with_tls_the_secret_crosses_nowhere_and_a_plain_client_is_refused(
    tmp_path: Path, secret_file: Path
) -> None:
    """E1: controller, keepers and all that speak to them; and the same wire without TLS."""
    pair = make_pair(tmp_path / "pki", "IP:127.0.0.77")
    given = f"security.secret_file={secret_file}"
    doors: dict[str, tuple[str, str]] = {}

    def knock(run: Watched) -> None:
        controller = listeners([run.controller_pid()])[run.controller_pid()]
        (port,) = {e["port"] for e in run.journal() if e["kind"] == "term"}
        assert ("127.0.0.77", port) in controller
        doors[f"127.0.0.77:{port}"] = (CONTROL, "Drive")
        for bound in listeners(keepers_of(run)).values():
            ((host, port),) = bound
            assert host == "127.0.0.77"
            doors[f"{host}:{port}"] = (KEEPER, "Attach")
        for address, (service, name) in doors.items():
            assert plain_call(address, service, name) is grpc.StatusCode.UNAVAILABLE
            host, _, number = address.partition(":")
            ssl.get_server_certificate((host, int(number)), ca_certs=str(pair.ca))

    seen = sniffed(tmp_path / "tls", "127.0.0.77", given, *pair.settings(), look=knock)
    assert len(doors) == 3
    assert len(seen) > 100_000
    assert SECRET.encode() not in seen
    seen = sniffed(tmp_path / "plain", "127.0.0.78", given, look=lambda run: None)
    assert SECRET.encode() in seen


@pytest.mark.slow
def test_the_secret_comes_from_the_file_and_lies_nowhere_else(
    tmp_path: Path, secret_file: Path
) -> None:
    """E2: it opens the controller's door, and is in no file of the run and on no command line."""
    told: list[grpc.StatusCode] = []
    lines: list[bytes] = []

    def knock(run: Watched) -> None:
        (port,) = {e["port"] for e in run.journal() if e["kind"] == "term"}
        told.append(plain_call(f"127.0.0.1:{port}", CONTROL, "Nothing"))
        for path in Path("/proc").glob("[0-9]*"):
            try:
                lines.append((path / "cmdline").read_bytes() + (path / "environ").read_bytes())
            except OSError:
                continue

    watch(
        tmp_path / "run",
        nodes=2,
        steps=4,
        settings=(*SAVES, f"security.secret_file={secret_file}"),
        acts=[(lambda event: event["event"] == "checkpoint_persisted", knock)],
    )
    assert told == [grpc.StatusCode.UNIMPLEMENTED]  # past the door: that method is not there
    assert not any(SECRET.encode() in line for line in lines)
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("mode", "text", "said"),
    [
        (0o640, SECRET, "chmod 600"),
        (0o604, SECRET, "chmod 600"),
        (0o600, "", "openssl rand"),
        (0o600, "short", "openssl rand"),
        (0o600, "two words that are long enough", "openssl rand"),
        (0o600, "ünprintable-and-long-enough", "openssl rand"),
    ],
)
def test_a_secret_that_others_can_read_or_guess_is_refused(
    tmp_path: Path, mode: int, text: str, said: str
) -> None:
    """E2: with the command that mends it; the secret itself is never said."""
    path = tmp_path / "secret"
    path.write_text(text)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=said) as refused:
        read_secret(path)
    assert not text or text not in str(refused.value)
    with pytest.raises(ConfigError, match=said):
        watch(tmp_path / "run", nodes=2, steps=1, settings=(f"security.secret_file={path}",))
    assert not (tmp_path / "run").exists()


def test_whoever_prints_credentials_sees_no_secret() -> None:
    config = KeeperConfig(job="j", credentials=Credentials(secret=SECRET), silent_s=30.0)
    assert SECRET not in f"{config!r} {config} {config.credentials}"
    with pytest.raises(ValueError, match="TLS needs"):
        Credentials(secret=SECRET, key="k")


def test_a_certificate_for_another_address_is_refused_before_anything_starts(
    tmp_path: Path,
) -> None:
    """E1: it says for which name clients will look; one name for all machines is enough."""
    pair = make_pair(tmp_path, "DNS:lazarus", "IP:10.0.0.1")
    credentials = pair.credentials(SECRET)
    check_certificate(credentials, host="10.0.0.1")
    with pytest.raises(ConfigError, match=r"not good for 127\.0\.0\.1"):
        check_certificate(credentials, host="127.0.0.1")
    named = pair.credentials(SECRET, tls_name="lazarus")
    check_certificate(named, host="127.0.0.1")
    local = LocalNodes("127.0.0.1", bind_host="127.0.0.1")
    keeper = KeeperConfig(job="j", credentials=named, silent_s=30.0)
    place = local.open("n", keeper=keeper, folder=tmp_path / "n")
    tag = Tag(job="j", term=1, generation=1)
    client = KeeperClient(place.keeper, credentials=named, tag=tag, timeout_s=30.0)
    assert client.inventory().keys == ()
    client.close()
    local.close_all()
    stranger = make_pair(tmp_path / "other", "DNS:lazarus").key.read_text()
    odd = Credentials(secret=SECRET, key=stranger, cert=named.cert, ca=named.ca)
    with pytest.raises(ConfigError, match="no PEM pair"):
        check_certificate(odd, host="lazarus")


def test_all_addresses_are_listened_on_and_the_own_one_is_told() -> None:
    """E4: nobody can reach 0.0.0.0 on another machine."""
    assert hosts_of("auto", own="10.0.0.7") == ("10.0.0.7", "10.0.0.7")
    assert hosts_of("0.0.0.0", own="10.0.0.7") == ("10.0.0.7", "0.0.0.0")
    assert hosts_of("::", own="10.0.0.7") == ("10.0.0.7", "::")
    assert hosts_of("10.9.9.9", own="10.0.0.7") == ("10.9.9.9", "10.9.9.9")


@pytest.mark.slow
def test_a_run_that_listens_everywhere_advertises_an_address(tmp_path: Path) -> None:
    """E4: controller, store and keepers listen on 0.0.0.0; what peers are told is not that."""
    found: dict[str, Any] = {}

    def look(run: Watched) -> None:
        pid = run.controller_pid()
        found["controller"] = {host for host, _ in listeners([pid])[pid]}
        found["keepers"] = {h for b in listeners(keepers_of(run)).values() for h, _ in b}
        driver = run.handle._driver  # type: ignore[union-attr]
        found["told"] = driver._address.rpartition(":")[0], driver._launcher.host
        keepers = driver._launcher._nodes._keepers.values()
        found["keeper"] = {k.address.rpartition(":")[0] for k in keepers}

    run = watch(
        tmp_path / "run",
        nodes=3,
        steps=6,
        settings=(*SAVES, "security.bind=0.0.0.0", "checkpoint.full_at_end=true"),
        acts=[(lambda event: event["event"] == "checkpoint_persisted", look)],
    )
    assert run.steps == [1, 2, 3, 4, 5, 6]
    everywhere = {"0.0.0.0", "::"}
    assert found["controller"] <= everywhere
    assert found["keepers"] <= everywhere
    assert found["told"] == ("127.0.0.1", "127.0.0.1")
    assert found["keeper"] == {"127.0.0.1"}


_EMBEDDED = """
import json, os, sys
from lazarus.runtime.launch.ray_home import PrivateHome
home = PrivateHome()
from lazarus.runtime.launch.ray_cluster import EmbeddedRay
cluster = EmbeddedRay(home, num_cpus=2)
import ray
class Actor:
    def pid(self):
        return os.getpid()
actor = ray.remote(Actor).remote()
print(json.dumps({"home": home.folder, "actor": ray.get(actor.pid.remote())}), flush=True)
sys.stdin.readline()
cluster.close()
"""

_STRANGER = """
import os, sys
home = sys.argv[1]
def tried(act):
    try:
        act()
    except PermissionError:
        return "refused"
    return "done"
print(*(
    tried(lambda: os.listdir(home)),
    tried(lambda: os.remove(f"{home}/owner")),
    tried(lambda: os.rename(f"{home}/r/session_latest", f"{home}/r/gone")),
    tried(lambda: os.listdir(f"{home}/r")),
    tried(lambda: open(f"{home}/token", "w")),
))
"""


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(400)
def test_the_embedded_ray_is_on_loopback_in_a_folder_of_its_owner() -> None:
    """E3, E7: another user cannot enter its folder; none of its processes listens elsewhere."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    owner = subprocess.Popen(
        [sys.executable, "-c", _EMBEDDED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        assert owner.stdout is not None
        told = json.loads(owner.stdout.readline())
        home, seen = Path(told["home"]), {}
        for _ in range(40):  # some processes begin to listen later; whenever they do, it is there
            seen |= {pid: b for pid, b in listeners(tree_of(owner.pid)).items() if b}
            assert {host for bound in seen.values() for host, _ in bound} == {"127.0.0.1"}
            time.sleep(0.25)
        assert told["actor"] in seen
        assert len(seen) >= 4, seen
        assert home.stat().st_mode & 0o777 == 0o700
        assert {path.name for path in home.iterdir()} == {"owner", "token", "r"}
        sockets = [path for path in home.rglob("*") if path.is_socket()]
        assert sockets
        assert max(len(str(path)) for path in sockets) <= 107
        if os.getuid() == 0:
            said = subprocess.run(
                ["/usr/bin/env", "python3", "-c", _STRANGER, str(home)],
                user=65534, group=65534, extra_groups=(), cwd="/", text=True,
                capture_output=True, env={"PATH": "/usr/local/bin:/usr/bin:/bin"},
            )  # fmt: skip
            assert said.stdout.split() == ["refused"] * 5, said.stderr
    finally:
        owner.communicate("\n", timeout=120)
    assert not home.exists()

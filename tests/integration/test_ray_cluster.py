"""Runs on a Ray cluster that was there before: submitted, joined, grown, refused."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ray_asked import asked_for

from lazarus.record.events import read_events
from lazarus.record.journal_reader import read_journal

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


def lazarus(head: Any, *arguments: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "lazarus", "train", "configs/tiny.toml", *arguments],
        cwd=ROOT,
        env=head.environment | {"RAY_ADDRESS": ""},
        stdout=(folder / "out").open("w"),
        stderr=(folder / "err").open("w"),
        text=True,
    )


def steps_of(record: Path) -> list[int]:
    return [e["step"] for e in read_events(record) if e["event"] == "step_committed"]


def submit(head: Any, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``ray job submit``, again until the head's agent is up to take it."""
    command = (
        *(sys.executable, "-m", "ray.scripts.scripts", "job", "submit"),
        *("--working-dir", ".", "--", sys.executable, "-m", "lazarus"),
        *("train", "configs/tiny.toml", *arguments),
    )
    environment = head.environment | {"RAY_ADDRESS": f"http://127.0.0.1:{head.ports[1]}"}
    del environment["PYTHONPATH"]  # the job must find everything in its working directory
    for _ in range(20):
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        if "No available agent" not in done.stderr:
            break
    return done


def test_a_submitted_job_trains_and_survives_its_controllers_death(
    ray_head: Any, quick: list[str]
) -> None:
    record = ray_head.folder / "record"
    faults = ("--fault", "controller@3", "--fault", "kill:1@6")
    submitted_s = time.time()
    done = submit(
        ray_head, *quick, "--nodes", "3", "--steps", "9", *faults, "--run-dir", str(record)
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    events = read_events(record)
    assert steps_of(record) == list(range(1, 10))
    names = [e["event"] for e in events]
    assert "controller_restarted" in names
    assert [e["node"] for e in events if e["event"] == "node_lost"] == [1]
    assert events[-1]["event"] == "run_finished"
    terms = [entry for entry in read_journal(record / "journal") if entry["kind"] == "term"]
    assert len(terms) >= 2
    assert len({entry["port"] for entry in terms}) == 1  # it came back where workers look for it
    assert len({entry["pid"] for entry in terms}) == len(terms)
    assert_lines_are_ours(done.stdout)
    first = next(e["t"] for e in events if e["event"] == "step_committed")
    print(f"the first step {first - submitted_s:.0f} s after the job was submitted")


# A process in brackets, a time stamp with a file of Ray's, a dump of the raylet.
RAYS_LINE = re.compile(r"^\(\w+.*\) |^\[?\d{4}-\d\d-\d\d \S+.*\.(?:py|cc):\d+|state-dump")


def assert_lines_are_ours(said: str) -> None:
    """R12: the job's log says what is waited for, and Ray adds nothing, not even after a loss."""
    lines = said.partition("Running entrypoint for job")[2].splitlines()[1:]
    lines = [line for line in lines if " cli.py:" not in line]  # of the command that shows the log
    assert "3 nodes are up" in lines and any("node 1 lost" in line for line in lines), said
    assert [line for line in lines if RAYS_LINE.search(line)] == []


def test_too_few_cpus_are_waited_for_with_numbers_and_a_wrong_address_is_refused(
    ray_head: Any, quick: list[str], tmp_path: Path
) -> None:
    record = tmp_path / "record"
    words = ("--set", "cluster.min_nodes=5", "--set", "cluster.quorum_timeout_s=3")
    arguments = ("--nodes", "5", "--address", ray_head.address, "--run-dir", str(record))
    assert lazarus(ray_head, *quick, *words, *arguments, folder=tmp_path).wait(180) == 3
    said = (tmp_path / "err").read_text()
    assert (
        "1 has no machine: a node needs 1 CPU; the cluster has 1 Ray node with 0 CPUs free" in said
    )
    assert "Traceback" not in said

    record = tmp_path / "another"
    arguments = ("--address", "127.0.0.1:1", "--run-dir", str(record))
    assert lazarus(ray_head, *quick, *arguments, folder=tmp_path).wait(60) == 2
    assert "127.0.0.1:1: no Ray head there" in (tmp_path / "err").read_text()
    assert not record.exists()


def test_lost_experts_come_back_from_the_keepers_of_other_ray_actors(
    ray_head: Any, quick: list[str], tmp_path: Path
) -> None:
    record = tmp_path / "record"
    settings = (
        "model.experts=6",
        "model.top_k=2",
        "placement.slots_per_node=3",  # nodes 0 and 1 alone hold some experts
        "checkpoint.every=4",
        "checkpoint.k_persist=2",
    )
    words = [word for setting in settings for word in ("--set", setting)]
    faults = ("--fault", "kill:0@14", "--fault", "kill:1@14")
    arguments = ("--nodes", "4", "--steps", "18", "--address", ray_head.address)
    run = lazarus(
        ray_head, *quick, *words, *faults, *arguments, "--run-dir", str(record), folder=tmp_path
    )
    assert run.wait(300) == 0, (tmp_path / "err").read_text()

    events = read_events(record)
    assert steps_of(record) == list(range(1, 19))
    restored = [e for e in events if e["event"] == "expert_restored"]
    assert restored
    assert {e["source"] for e in restored} <= {"own_snapshot", "node_snapshot", "storage"}
    assert any(e["source"] != "storage" for e in restored)
    assert any(e["event"] == "checkpoint_persisted" for e in events)
    left = [line for line in ray_head.books.alive().values() if "keeper" in line]
    assert not left, left


def test_a_ray_node_that_comes_is_noticed_and_one_that_drains_is_left(
    ray_head: Any, quick: list[str], tmp_path: Path, poll: Any
) -> None:
    record = tmp_path / "record"
    arguments = ("--nodes", "2", "--steps", "100000", "--address", ray_head.address)
    run = lazarus(ray_head, *quick, *arguments, "--run-dir", str(record), folder=tmp_path)

    def happened(kind: str, **fields: Any) -> bool:
        assert run.poll() is None, (tmp_path / "err").read_text()
        if not (record / "events.jsonl").exists():
            return False
        found = [e for e in read_events(record) if e["event"] == kind]
        return any(all(e.get(k) == v for k, v in fields.items()) for e in found)

    assert poll(lambda: happened("step_committed", num_nodes=2), timeout_s=180)
    assert asked_for(ray_head) == [{"CPU": 1.0}] * 2
    ray_head.add_node(1)
    assert poll(lambda: happened("step_committed", num_nodes=3), timeout_s=180)
    joined = [e["node"] for e in read_events(record) if e["event"] == "node_joined"]

    drain(ray_head)
    assert poll(lambda: happened("drain_notice", node=max(joined)), timeout_s=180)
    assert poll(lambda: happened("node_left", node=max(joined)), timeout_s=180)
    run.send_signal(2)
    assert run.wait(120) == 130, (tmp_path / "err").read_text()
    steps = steps_of(record)
    assert steps == list(range(1, len(steps) + 1))
    assert asked_for(ray_head) == []

    def actors() -> list[str]:
        return [x for x in ray_head.books.alive().values() if "ray::" in x and "Actor" in x]

    # Ray ends what a driver leaves behind in its own time.
    assert poll(lambda: not actors(), timeout_s=30), actors()


DRAIN = """
import sys, time, ray
from ray.core.generated import autoscaler_pb2
ray.init(address=sys.argv[1], log_to_driver=False, configure_logging=False)
head = [n for n in ray.nodes() if "node:__internal_head__" in n["Resources"]][0]["NodeID"]
node = [n["NodeID"] for n in ray.nodes() if n["Alive"] and n["NodeID"] != head][0]
gcs = ray._private.worker.global_worker.gcs_client
reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
deadline = int((time.time() + 600) * 1000)
print(gcs.drain_node(node, reason, "a test", deadline))
"""


def drain(head: Any) -> None:
    """Tell the cluster that its second machine will go in ten minutes."""
    subprocess.run(
        [sys.executable, "-c", DRAIN, head.address],
        env=head.environment,
        timeout=120,
        check=True,
        capture_output=True,
    )

"""What operators are given: metrics, alerts, dashboard, manifests, runbook, all of one piece."""

import json
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lazarus.callbacks.prometheus import METRICS, REPEAT_S, RayMetrics, ray_series

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
SAMPLES = ("_bucket", "_sum", "_count")


def known(name: str) -> bool:
    base = name.removeprefix("ray_")
    return base in METRICS or any(base.removesuffix(s) in METRICS for s in SAMPLES)


def named_in(text: str) -> set[str]:
    return set(re.findall(r"ray_lazarus_\w+", text))


def rules() -> list[dict[str, Any]]:
    content = yaml.safe_load((DEPLOY / "prometheus-rules.yaml").read_text())
    return [rule for group in content["spec"]["groups"] for rule in group["rules"]]


def test_events_become_series_with_the_runs_name() -> None:
    seen: dict[str, list[tuple[float, Mapping[str, str]]]] = {}

    def make(name: str, kind: str, meaning: str, labels: tuple[str, ...]) -> Any:
        assert labels[0] == "run"
        values = seen.setdefault(name, [])
        return lambda value, given: values.append((value, given))

    metrics = RayMetrics("olmoe", constants={"lazarus_checkpoint_every": 200}, make=make)
    base = {"t": 0.0, "generation": 2}
    step = {"loss": 2.0, "tokens": 10, "wall_s": 0.5, "num_nodes": 3}
    for event in (
        {"event": "run_started", "num_nodes": 4, "world_size": 4},
        {"event": "step_committed", "step": 5, **step},
        {"event": "step_committed", "step": 3, **step, "loss": None},
        {"event": "node_lost", "node": 1, "cause": "heartbeat"},
        {"event": "reconfigured", "reason": "loss", "phases": {"plan": 0.1}, "num_nodes": 3},
        {"event": "plan_adopted", "floor": 1, "requested_floor": 2},
        {"event": "drain_notice", "node": 3},
        {"event": "node_left", "node": 3},
        {"event": "of_tomorrow"},
    ):
        metrics.on_event(base | event)
    assert seen["lazarus_step"] == [(5.0, {"run": "olmoe"}), (3.0, {"run": "olmoe"})]
    assert seen["lazarus_loss"] == [(2.0, {"run": "olmoe"})]
    assert seen["lazarus_lost_steps_total"] == [(3.0, {"run": "olmoe"})]
    assert seen["lazarus_nodes_lost_total"] == [(1.0, {"run": "olmoe", "cause": "heartbeat"})]
    draining = [v for v, given in seen["lazarus_nodes"] if given["state"] == "draining"]
    assert draining == [1.0, 0.0]
    assert seen["lazarus_checkpoint_every"][0][0] == 200


def test_gauges_are_set_again_and_again_and_each_run_has_a_name_of_its_own() -> None:
    """R9: Ray drops a gauge that nobody sets; what is not repeated is gone when an alert asks."""
    seen: dict[str, list[tuple[float, str]]] = {}
    often = threading.Event()

    def make(name: str, kind: str, meaning: str, labels: tuple[str, ...]) -> Any:
        values = seen.setdefault(name, [])

        def take(value: float, given: Mapping[str, str]) -> None:
            values.append((value, given["run"]))
            if len(seen.get("lazarus_holding", ())) > 3:
                often.set()

        return take

    metrics = RayMetrics(
        "olmoe", constants={"lazarus_checkpoint_every": 200}, make=make, repeat_s=0.01
    )
    started = {"event": "run_started", "num_nodes": 4, "world_size": 4, "run": "olmoe-1f3a"}
    metrics.on_event({"t": 0.0, "generation": 1} | started)
    metrics.on_event({"t": 0.0, "generation": 1, "event": "checkpoint_failed"})
    assert often.wait(30)
    metrics.close()
    assert set(seen["lazarus_holding"]) == {(0.0, "olmoe-1f3a")}
    assert len(seen["lazarus_checkpoint_every"]) >= 3
    assert seen["lazarus_checkpoint_failures_total"] == [(1.0, "olmoe-1f3a")]  # a counter is not
    assert REPEAT_S < 14  # half of what Ray waits


def test_every_metric_can_be_made_of_rays_classes() -> None:
    for name, (kind, meaning, labels) in METRICS.items():
        assert callable(ray_series(name, kind, meaning, ("run", *labels)))


def test_alerts_use_metrics_that_exist_and_have_a_runbook_page() -> None:
    found = rules()
    assert len(found) >= 7
    for rule in found:
        assert named_in(rule["expr"])
        assert all(map(known, named_in(rule["expr"]))), rule["expr"]
        page = ROOT / "docs" / "runbook" / Path(rule["annotations"]["runbook"]).name
        text = page.read_text()
        assert rule["alert"] in text
        for part in ("## What it means", "## First command", "## Likely cause", "## Way out"):
            assert part in text, page
    pages = {p.name for p in (ROOT / "docs" / "runbook").glob("*.md")} - {"README.md"}
    assert pages == {Path(r["annotations"]["runbook"]).name for r in found}


def test_the_dashboard_shows_metrics_that_exist() -> None:
    board = json.loads((DEPLOY / "grafana.json").read_text())
    queries = [t["expr"] for panel in board["panels"] for t in panel["targets"]]
    assert len(queries) >= 8
    assert all(known(name) for query in queries for name in named_in(query))
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_the_ray_job_keeps_driver_and_controller_off_spot_and_can_resume() -> None:
    (job,) = yaml.safe_load_all((DEPLOY / "kuberay" / "rayjob.yaml").read_text())
    spec = job["spec"]
    assert "--resume auto" in spec["entrypoint"]
    assert spec["backoffLimit"] >= 1
    head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert "spot" not in json.dumps(head.get("nodeSelector", {}))
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    pod = group["template"]["spec"]
    drain = next(
        int(e["value"])
        for e in pod["containers"][0]["env"]
        if e["name"] == "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
    )
    assert pod["terminationGracePeriodSeconds"] > drain
    assert "secret" not in json.dumps(job.get("metadata")).lower()


def test_the_network_policy_lets_only_pods_of_the_cluster_talk() -> None:
    (policy,) = yaml.safe_load_all((DEPLOY / "networkpolicy.yaml").read_text())
    (own, _) = policy["spec"]["ingress"]
    (source,) = own["from"]
    assert source["podSelector"]["matchLabels"] == policy["spec"]["podSelector"]["matchLabels"]
    assert "ports" not in own


def test_the_network_policy_lets_kuberays_operator_and_submitter_reach_the_dashboard_only() -> None:
    (policy,) = yaml.safe_load_all((DEPLOY / "networkpolicy.yaml").read_text())
    (job,) = yaml.safe_load_all((DEPLOY / "kuberay" / "rayjob.yaml").read_text())
    (_, door) = policy["spec"]["ingress"]
    operator, submitter = door["from"]
    assert operator["podSelector"]["matchLabels"] == {
        "app.kubernetes.io/component": "kuberay-operator"
    }
    assert operator["namespaceSelector"] == {}  # it has a namespace of its own
    names = submitter["podSelector"]["matchLabels"]
    assert names == {"ray.io/originated-from-cr-name": job["metadata"]["name"]}
    assert door["ports"] == [{"protocol": "TCP", "port": 8265}]


def test_the_image_takes_the_tested_versions() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    assert "constraints.txt" in text
    assert re.search(r"^USER (?!root)", text, re.MULTILINE)

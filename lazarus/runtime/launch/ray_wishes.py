"""Resources that runs request from a Ray cluster's autoscaler.

Ray keeps one request per cluster, so concurrent runs would overwrite each other's. Each run stores
its own request (its wish) in Ray's internal key-value store, under its Ray job. Each run then
requests the sum of all wishes, when its own changes and every few seconds, and deletes the wishes
of jobs that have ended.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ray
from ray._private import state as ray_state
from ray.autoscaler.sdk import request_resources
from ray.experimental import internal_kv

_SPACE = b"lazarus-wishes"
_KV: Any = internal_kv  # untyped, as the next
_STATE: Any = ray_state

Wish = Mapping[str, Any]  # "bundles" and "labels", as Ray takes them


def total(wishes: Iterable[Wish]) -> tuple[list[dict[str, float]], list[dict[str, str]]]:
    """The bundles of all wishes, and for each bundle its labels."""
    bundles: list[dict[str, float]] = []
    labels: list[dict[str, str]] = []
    for wish in wishes:
        bundles += wish["bundles"]
        labels += wish["labels"]
    return bundles, labels


class Wishes:
    """One run's wish, and the request for the wishes of all runs.

    Args:
        run: A name for the run that is unique within its Ray job.
    """

    def __init__(self, run: str) -> None:
        self._key = f"{ray.get_runtime_context().get_job_id()} {run}".encode()
        self._asked: object = None  # the last request for all runs

    def ask(self, count: int, bundle: Mapping[str, float], labels: Mapping[str, str]) -> None:
        """Store this run's wish and request it.

        Args:
            count: Number of nodes.
            bundle: Resources of one node, by Ray's names.
            labels: Labels that the machine of a node must have.
        """
        wish = {"bundles": [dict(bundle)] * count, "labels": [dict(labels)] * count}
        _KV._internal_kv_put(self._key, json.dumps(wish).encode(), True, namespace=_SPACE)
        self.refresh()

    def refresh(self) -> None:
        """Request the sum of the wishes of live jobs if it changed; delete those of dead jobs."""
        live = _live_jobs()
        wishes: list[Wish] = []
        for key in sorted(_KV._internal_kv_list(b"", namespace=_SPACE)):
            if key.split()[0].decode() not in live:
                _KV._internal_kv_del(key, namespace=_SPACE)
            elif (text := _KV._internal_kv_get(key, namespace=_SPACE)) is not None:
                wishes.append(json.loads(text))
        asked = total(wishes)
        if asked != self._asked:
            _request(*asked)
            self._asked = asked

    def withdraw(self) -> None:
        """Delete this run's wish and request what the other runs want."""
        _KV._internal_kv_del(self._key, namespace=_SPACE)
        self._asked = None
        self.refresh()


def _request(bundles: Sequence[dict[str, float]], labels: Sequence[dict[str, str]]) -> None:
    selectors = list(labels) if any(labels) else None
    request_resources(bundles=list(bundles), bundle_label_selectors=selectors)


def _live_jobs() -> set[str]:
    """Ids of the Ray jobs whose drivers are alive."""
    return {str(job["JobID"]) for job in _STATE.state.job_table() if not job["IsDead"]}

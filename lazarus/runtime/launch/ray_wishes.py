"""What runs ask a cluster's autoscaler for. Ray keeps one request for a cluster: ours add up.

Each run keeps its wish in Ray's internal key-value store, under its job. Whoever changes a wish,
and every run every few seconds, asks for the sum of the wishes of live jobs; those of dead ones go.
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
_KV: Any = internal_kv  # these two have no types
_STATE: Any = ray_state

Wish = Mapping[str, Any]  # "bundles" and "labels", as Ray takes them


def total(wishes: Iterable[Wish]) -> tuple[list[dict[str, float]], list[dict[str, str]]]:
    """The bundles of all wishes, and the labels of each."""
    bundles: list[dict[str, float]] = []
    labels: list[dict[str, str]] = []
    for wish in wishes:
        bundles += wish["bundles"]
        labels += wish["labels"]
    return bundles, labels


class Wishes:
    """One run's wish, and its care for those of the others."""

    def __init__(self, run: str) -> None:
        self._key = f"{ray.get_runtime_context().get_job_id()} {run}".encode()
        self._asked: object = None  # what was last asked for on behalf of all

    def ask(self, count: int, bundle: Mapping[str, float], labels: Mapping[str, str]) -> None:
        """This run wants so many machines; an autoscaler adds nothing unasked."""
        wish = {"bundles": [dict(bundle)] * count, "labels": [dict(labels)] * count}
        _KV._internal_kv_put(self._key, json.dumps(wish).encode(), True, namespace=_SPACE)
        self.refresh()

    def refresh(self) -> None:
        """Ask for what all live runs want, if that has changed; forget those that are gone."""
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
        """The run is over: what the others want stays."""
        _KV._internal_kv_del(self._key, namespace=_SPACE)
        self._asked = None
        self.refresh()


def _request(bundles: Sequence[dict[str, float]], labels: Sequence[dict[str, str]]) -> None:
    selectors = list(labels) if any(labels) else None
    request_resources(bundles=list(bundles), bundle_label_selectors=selectors)


def _live_jobs() -> set[str]:
    """Ids of the jobs whose drivers live."""
    return {str(job["JobID"]) for job in _STATE.state.job_table() if not job["IsDead"]}

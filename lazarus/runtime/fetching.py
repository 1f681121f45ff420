"""Experts without a live replica: each holder fetches the one chosen copy (rule 27). EFFECTS."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import torch

from lazarus.checkpoint.reader import CheckpointReader, read_newest_expert
from lazarus.checkpoint.store import Tag, load_manifest
from lazarus.checkpoint.tensors import tensors_of
from lazarus.control.losses import bad_source_of
from lazarus.control.messages import Prepare, Restore, Snapped
from lazarus.errors import BadSourceError, CheckpointError
from lazarus.runtime.keeper_client import KeeperClient
from lazarus.runtime.replica import Replica
from lazarus.runtime.rpc.credentials import Credentials
from lazarus.runtime.transfer import Feed
from placement import Plan


class Fetcher:
    """The restores of one PREPARE, for one rank.

    Attributes:
        versions: What came from storage, where a damaged file is passed over for an older one.
    """

    def __init__(
        self, order: Prepare, replica: Replica, *, credentials: Credentials, tag: Tag
    ) -> None:
        self._order, self._replica = order, replica
        self._credentials, self._tag = credentials, tag
        self._readers: dict[str, CheckpointReader] = {}
        self.versions: list[Snapped] = []

    def fetch(self, plan: Plan, seat: int, into: Feed, *, entering: Callable[[], None]) -> None:
        """Stage what this seat is to hold; ``entering`` is called before each expert.

        Raises:
            BadSourceError: A copy cannot be read; the next attempt chooses another one.
        """
        for restore in self._order.restores:
            if restore.source == "init" or seat not in plan.ranks_of(restore.layer, restore.expert):
                continue
            entering()
            try:
                tensors = self._tensors(restore)
            except CheckpointError as problem:
                place = restore.source.partition(":")[2]
                name = bad_source_of(restore) if restore.detail else place
                what = f"L{restore.layer}/E{restore.expert}"
                raise BadSourceError(
                    name=name, what=what, source=place, reason=str(problem)
                ) from problem
            record = self._replica.record_of(restore.layer, restore.expert, tensors)
            into.staged[(restore.layer, restore.expert)] = record
            into.bytes_received += record.numel()

    def _tensors(self, restore: Restore) -> Mapping[str, torch.Tensor]:
        kind, _, place = restore.source.partition(":")
        if kind == "storage" and restore.detail:
            return self._newest_stored(restore, place.rpartition(" ")[0])
        if kind == "storage":
            if place not in self._readers:
                url, _, step = place.rpartition(" ")
                self._readers[place] = CheckpointReader(url, load_manifest(url, int(step)))
            return self._readers[place].expert(restore.layer, restore.expert)
        client = KeeperClient(place, credentials=self._credentials, tag=self._tag)
        try:
            _, image = client.fetch(
                layer=restore.layer,
                expert=restore.expert,
                generation=restore.generation,
                step=restore.step,
            )
        finally:
            client.close()
        return tensors_of(image, where=f"L{restore.layer}/E{restore.expert} from {place}")

    def _newest_stored(self, restore: Restore, url: str) -> Mapping[str, torch.Tensor]:
        """From storage, passing over damaged files: the same version on every rank."""
        lineage = [(int(g), int(b)) for g, b in json.loads(self._order.lineage)]
        found = read_newest_expert(
            url, restore.layer, restore.expert, lineage=lineage, resume_step=self._order.step
        )
        self.versions.append(
            Snapped(
                layer=restore.layer,
                expert=restore.expert,
                generation=found.generation,
                step=found.step,
                routed=found.routed,
            )
        )
        return found.tensors

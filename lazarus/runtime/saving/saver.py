"""One rank's part in partial expert checkpoints: schedules, takes and reports snapshots.

Every rank computes the same schedule from committed counts, so all ranks begin a snapshot at the
same step without a message. A save delays an optimizer step by no more than a memory copy.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from typing import Any

from lazarus.basics.threads import say_so, spawn
from lazarus.checkpoint.errors import CheckpointError
from lazarus.checkpoint.files.store import RecordKey, Tag
from lazarus.checkpoint.in_memory.snapshot import SnapshotItem, SnapshotRequest, Snapshotter
from lazarus.checkpoint.selection.adaptive import DEFAULT_EVERY
from lazarus.checkpoint.selection.saving import RankShare, plan_save
from lazarus.checkpoint.selection.schedule import ScheduleConfig, Selection, default_schedule
from lazarus.config.train_config import TrainConfig
from lazarus.control.messages import ShareReported, SnapshotHeld
from lazarus.runtime.comm.standing import Standing
from lazarus.runtime.keeper.client import KeeperClient
from lazarus.runtime.keeper.trainer_link import RemoteKeeperLink
from lazarus.runtime.rpc.credentials import Credentials
from lazarus.runtime.saving.final_checkpoint import layer_entry
from lazarus.runtime.saving.model_origin import origin_of
from lazarus.runtime.saving.save_schedule import SaveSchedule
from lazarus.runtime.state.replica import Replica
from placement import Plan

_SHARES_KEPT = 2  # one being written, one waiting for its manifest


class Saver:
    """Schedules, takes and reports snapshots on one rank.

    Args:
        config: The run's configuration.
        replica: This rank's state.
        keeper: Address of this node's keeper.
        credentials: For connections to keepers.
        job: Id of the run.
        url: Where checkpoints are written.
        scalars: Gives the JSON that a manifest stores of the common state.
        send: Sends a report to the controller.
    """

    def __init__(
        self,
        config: TrainConfig,
        replica: Replica,
        *,
        keeper: str,
        credentials: Credentials,
        job: str,
        url: str,
        scalars: Callable[[], str],
        send: Callable[[ShareReported], None],
    ) -> None:
        self._config = config
        self._scalars = scalars
        self._replica = replica
        self._keeper = keeper
        self._credentials = credentials
        self._job = job
        self._url = url
        self.schedule = SaveSchedule(
            _schedule(config, replica),
            last_step=config.train.steps if config.checkpoint.full_at_end else 0,
        )
        self._send = send
        self._lock = threading.Lock()
        self._heads: dict[int, dict[str, Any]] = {}
        self._told: deque[ShareReported] = deque(maxlen=_SHARES_KEPT)
        self._link = RemoteKeeperLink(
            keeper,
            credentials=credentials,
            timeout_s=config.timeouts.keeper_answer_s,
            on_report=self._report,
        )
        self._snapshotter = Snapshotter(self._link)
        self._began_s: float | None = None  # when the newest snapshot began; None after the apply
        self._window_s = 0.0  # from there to the optimizer step, which must not wait

    def aligned(self, generation: int) -> None:
        """Report a share of a checkpoint that was never begun, because ``generation`` is over."""
        step = self.schedule.aligned()
        if step is not None:
            record = {"kind": "persist", "step": step, "generation": generation, "ok": False}
            self._report({**record, "error": "the members changed before the save began"})

    # ---- protocol points -----------------------------------------------------------------------

    def wait_before_write(self) -> None:
        """Wait until no snapshot reads the training tensors."""
        self._snapshotter.wait_before_apply()

    def before_apply(self) -> None:
        """``wait_before_write`` at the end of a step; also measures the time a snapshot had."""
        if self._began_s is not None:
            self._window_s, self._began_s = time.monotonic() - self._began_s, None
        self.wait_before_write()

    def after_commit(
        self,
        step: int,
        standing: Standing,
        *,
        plan: Plan,
        published: int,
    ) -> None:
        """Begin the snapshot scheduled for the state after ``step``; returns at once.

        Args:
            step: The committed step.
            standing: This rank's place in the current generation.
            plan: The plan in force.
            published: The last step that the controller has journaled.
        """
        selection = self.schedule.take_due(step)
        if selection is None:
            return
        rank, generation = standing.rank, standing.generation
        share = self._share(selection, plan, rank=rank, nodes=standing.nodes)
        keeper_of = dict(zip(standing.nodes, standing.keepers, strict=True))
        items = self._items(share, step=step, rank=rank, generation=generation, keepers=keeper_of)
        if selection.persists and rank == 0:
            head = self._head()
            with self._lock:
                self._heads[step] = head
        base = {"kind": "persist", "step": step, "generation": generation}
        if not items:
            if selection.persists:
                self._report({**base, "ok": True, "files": []})
            return
        request = SnapshotRequest(
            tag=Tag(job=self._job, term=standing.term, generation=generation),
            step=step,
            items=items,
            url=self._url,
            published_step=published,
        )
        if self._snapshotter.begin(request):
            self._began_s = time.monotonic()
        elif selection.persists:
            error = "the snapshot before this one has not ended"
            self._report({**base, "ok": False, "error": error})

    def _share(
        self, selection: Selection, plan: Plan, *, rank: int, nodes: Sequence[int]
    ) -> RankShare:
        replica, checkpoint = self._replica, self._config.checkpoint
        frozen = set(replica.frozen_names)
        dense = {name: t.numel() * t.element_size() for name, t in replica.dense_tensors()}
        if not selection.is_full(replica.num_experts):  # frozen ones are in an older checkpoint
            dense = {name: size for name, size in dense.items() if name not in frozen}
        sizes = [records.part_bytes() for records in replica.records]
        return plan_save(
            selection,
            ranks_of=plan.ranks_of,
            node_of_rank=nodes,
            num_experts=replica.num_experts,
            part_bytes={part: max(size[part] for size in sizes) for part in sizes[0]},
            dense_bytes=dense,
            parts=checkpoint.parts,
            copies=checkpoint.copies,
            layer_parts=[records.parts for records in replica.records],
        )[rank]

    def _items(
        self,
        share: RankShare,
        *,
        step: int,
        rank: int,
        generation: int,
        keepers: dict[int, str],
    ) -> tuple[SnapshotItem, ...]:
        replica, items = self._replica, []
        for order in share.experts:
            tensors = {
                name: tensor
                for part, name, tensor in replica.expert_parts(order.layer, order.expert)
                if part in order.parts
            }
            key = RecordKey(
                layer=order.layer,
                expert=order.expert,
                step=step,
                generation=generation,
                routed=int(self.schedule.routed_LE[order.layer, order.expert]),
                parts=order.parts,
            )
            copy_to = tuple(keepers[node] for node in order.copy_nodes if keepers.get(node))
            items.append(
                SnapshotItem(key=key, tensors=tensors, copy_to=copy_to, persist=order.persist)
            )
        if share.dense_names:
            dense = dict(replica.snapshot_tensors())
            key = RecordKey(layer=-1, expert=rank, step=step, generation=generation)
            chosen = {name: dense[name] for name in share.dense_names}
            items.append(SnapshotItem(key=key, tensors=chosen, persist=True))
        return tuple(items)

    def _head(self) -> dict[str, Any]:
        """What a manifest holds beside the files, as of this step."""
        replica = self._replica
        return {
            "layers": [layer_entry(replica, layer) for layer in range(len(replica.layers))],
            "dense_names": [name for name, _ in replica.dense_tensors()],
            "frozen_names": replica.frozen_names,
            "tied": replica.tied,
            "scalars": self._scalars(),
            "history": replica.history.tolist(),
            "routed": self.schedule.routed_LE.tolist(),
            **origin_of(replica.model),
        }

    def _report(self, record: dict[str, Any]) -> None:
        """Report a share to the controller at once, so that the report survives this node."""
        step = int(record.get("step", -1))
        if record["kind"] == "persist":
            with self._lock:
                head = self._heads.get(step)
                self._heads = {s: h for s, h in self._heads.items() if s > step}
            record = record if head is None else {**record, "head": head}
            record = record | self._measured(record)
        body = ShareReported(
            generation=int(record.get("generation", 0)), step=step, record=json.dumps(record)
        )
        if record["kind"] == "persist" and record["ok"]:
            with self._lock:
                self._told.append(body)
        self._send(body)

    def _measured(self, record: dict[str, Any]) -> dict[str, Any]:
        """Rates of copying and writing a share, and the time available for a copy."""
        rate, wall_s = self._snapshotter.rate(), float(record.get("wall_s", 0.0))
        if rate is None or wall_s <= 0 or self._window_s <= 0:
            return {}
        figures = {
            "copy_rate": rate,
            "write_rate": int(record["bytes"]) / wall_s,
            "window_s": self._window_s,
        }
        return {"measured": figures}

    @property
    def told(self) -> tuple[ShareReported, ...]:
        """The last shares that this rank reported, to repeat them to a new controller."""
        with self._lock:
            return tuple(self._told)

    def inventory(self, *, term: int, generation: int) -> tuple[SnapshotHeld, ...]:
        """Expert copies complete in this node's keeper; none if the keeper does not answer."""
        client = KeeperClient(
            self._keeper,
            credentials=self._credentials,
            tag=Tag(job=self._job, term=term, generation=generation),
            timeout_s=self._config.timeouts.keeper_list_s,
        )
        try:
            copies = client.inventory().copies(node=0)
        except CheckpointError:
            return ()
        finally:
            client.close()
        return tuple(
            SnapshotHeld(
                layer=copy.layer,
                expert=copy.expert,
                generation=copy.generation,
                step=copy.step,
                routed=copy.routed,
                num_bytes=copy.num_bytes,
            )
            for copy in copies
            if copy.layer >= 0
        )

    def tell_resumed(
        self, lineage: Sequence[tuple[int, int]], step: int, *, term: int, generation: int
    ) -> None:
        """Tell the keeper, in the background, which of its copies the newest RESUME makes void."""
        client = KeeperClient(
            self._keeper,
            credentials=self._credentials,
            tag=Tag(job=self._job, term=term, generation=generation),
            timeout_s=self._config.timeouts.keeper_list_s,
        )

        def tell() -> None:
            # A keeper that cannot be reached is ignored: if dead, its copies are gone.
            with closing(client), suppress(CheckpointError):
                client.tell(lineage=lineage, resume_step=step)

        spawn("keeper", tell, on_death=say_so)

    def close(self) -> None:
        self._snapshotter.close()
        self._link.close()


def _schedule(config: TrainConfig, replica: Replica) -> ScheduleConfig:
    """The configured schedule, with the library's defaults for ``auto``."""
    return default_schedule_of(
        config, num_layers=len(replica.layers), num_experts=replica.num_experts
    )


def default_schedule_of(
    config: TrainConfig, *, num_layers: int, num_experts: int
) -> ScheduleConfig:
    """The schedule that ``config`` asks for, for a model of this shape."""
    checkpoint = config.checkpoint
    return default_schedule(
        num_layers=num_layers,
        num_experts=num_experts,
        every=DEFAULT_EVERY if checkpoint.every == "auto" else int(checkpoint.every),
        k_snapshot=None if checkpoint.k_snapshot == "auto" else int(checkpoint.k_snapshot),
        k_persist=None if checkpoint.k_persist == "auto" else int(checkpoint.k_persist),
        select=checkpoint.select,
        parts=checkpoint.parts,
        plt_budget=checkpoint.plt_budget,
    )

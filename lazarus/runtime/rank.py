"""One rank's state between orders: replica, groups, staged copies, the step that is computed."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import cloudpickle
import torch

from lazarus.checkpoint.reader import CheckpointReader, read_newest_expert
from lazarus.checkpoint.store import Tag, load_manifest
from lazarus.checkpoint.tensors import tensors_of
from lazarus.config import TrainConfig
from lazarus.control.healing import missing_after, without
from lazarus.control.losses import bad_source_of
from lazarus.control.messages import (
    Align,
    Aligned,
    Body,
    DigestPart,
    Finalize,
    Finalized,
    Healed,
    Prepare,
    Ready,
    Restore,
    Resume,
    Seat,
    Snapped,
    Vector,
)
from lazarus.control.vector import Lanes, StepSums, VectorLayout, decode
from lazarus.errors import BadSourceError, CheckpointError, FencedError, LazarusError
from lazarus.runtime import builtin
from lazarus.runtime.base import Base, read_base
from lazarus.runtime.boundary import Boundary
from lazarus.runtime.context import WorkerContext
from lazarus.runtime.evaluating import Evaluator
from lazarus.runtime.finals import write_share
from lazarus.runtime.groups import Group
from lazarus.runtime.guard import GuardedExchange
from lazarus.runtime.hooks import Hooks
from lazarus.runtime.inject import Observer
from lazarus.runtime.keeper_client import KeeperClient
from lazarus.runtime.ledger import StepLedger
from lazarus.runtime.reading import open_reading
from lazarus.runtime.replica import Replica
from lazarus.runtime.saver import Saver
from lazarus.runtime.sources import Seating
from lazarus.runtime.spec import UserCode, WorkerSpec
from lazarus.runtime.step import Batching, Step, World
from lazarus.runtime.transfer import Feed, Piece, expert_pieces, rounds_of
from placement import Plan


@dataclass(kw_only=True)
class Pending:
    """A prepared generation that waits for RESUME."""

    order: Prepare
    plan: Plan
    exchange: GuardedExchange | None  # None on a rank that leaves
    feed: Feed
    base: Base | None  # all state goes back to this one


class Rank:
    """What the training thread does for each order; ``release`` alone is called from elsewhere."""

    def __init__(
        self,
        spec: WorkerSpec,
        *,
        node: int,
        ledger: StepLedger,
        observer: Observer,
        send: Callable[[Body], None],
    ) -> None:
        self._spec = spec
        self._config = TrainConfig.from_dict(spec.config)
        self._ledger = ledger
        self._observer = observer
        self._lock = threading.Lock()
        self._groups: list[Group] = []
        self._pending: Pending | None = None
        self._world: World | None = None
        self._step: Step | None = None
        self.user: UserCode = cloudpickle.loads(spec.user)
        self.device = _device(spec.local_rank)
        self.context = WorkerContext(
            rank=-1,
            world_size=0,
            node=node,
            device=self.device,
            generation=0,
            seed=self._config.run.seed,
            dtype=torch.float32 if self._config.train.precision == "fp32" else torch.bfloat16,
        )
        self._term = 0
        self._loaded = spec.resume is None
        self.saver: Saver | None = None
        self._behind: list[list[Piece]] = []
        self._read: list[Snapped] = []  # versions that came from storage
        self._load_user_code()
        if spec.keeper and self._config.checkpoint.every:
            self.saver = Saver(
                self._config,
                self.replica,
                keeper=spec.keeper,
                secret=spec.controller.secret,
                job=spec.run_id,
                url=spec.checkpoint_url,
                scalars=self._scalars,
                send=send,
            )
        self._first_scalars = self._scalars()

    def _load_user_code(self) -> None:
        config, user = self._config, self.user
        self.replica = self._make_replica()
        data = user.data
        opened = builtin.training_data(config) if data is None else self._opened(data)
        self.reading = open_reading(
            opened,
            collate=user.collate or builtin.collate,
            seed=config.run.seed,
            global_batch=config.train.global_batch,
            num_shards=config.data.num_shards,
            shuffle_shards=config.data.shuffle_shards,
            prefetch_steps=builtin.prefetch_steps(config, opened),
        )
        self.batching = Batching(
            seed=config.run.seed,
            global_batch=config.train.global_batch,
            micro_batch_size=config.train.micro_batch_size,
            precision=config.train.precision,
        )
        self._hooks = Hooks(user.hooks)
        self._hooks.setup(self.context, self.replica.model)
        self._boundary = Boundary(
            self.replica,
            evaluator=self._evaluator() if config.eval.every else None,
            compare_every=config.recovery.compare_every,
            hooks=self._hooks,
        )

    def _make_replica(self) -> Replica:
        config, user = self._config, self.user
        make_model = user.model
        return Replica(
            (lambda: builtin.model(config)) if make_model is None else self._own_model,
            optimizer=user.optimizer or builtin.optimizer(config),
            schedule=user.schedule or builtin.schedule(config),
            clip_norm=config.optim.clip_norm,
            seed=config.run.seed,
            device=self.device,
        )

    def _opened(self, data: Any) -> Any:
        return data(self.context) if callable(data) else data

    def _evaluator(self) -> Evaluator:
        config, user = self._config, self.user
        data = user.eval_data
        return Evaluator(
            self.replica,
            builtin.held_out_data(config) if data is None else self._opened(data),
            batching=self.batching,
            every=config.eval.every,
            batches=config.eval.batches,
            collate=user.collate or builtin.collate,
            loss=user.loss or builtin.loss,
            observer=self._observer,
            measures=self.context.measures,
        )

    def _own_model(self) -> Any:
        assert self.user.model is not None
        return self.user.model(self.context)

    # ---- orders --------------------------------------------------------------------------------

    def release(self) -> None:
        """Free the training thread from whatever it waits for. Called by the control thread."""
        with self._lock:
            groups = list(self._groups)
        for group in groups:
            group.release()

    def _close_groups(self) -> None:
        with self._lock:
            groups, self._groups = self._groups, []
        self._world = self._step = None
        self._behind = []
        for group in groups:
            group.close()

    def redo(self) -> None:
        """Drop the attempt: scratch goes back to what the last commit left (rule 20)."""
        self._close_groups()
        self._still()
        self.replica.restore_scratch()

    def _still(self) -> None:
        """Before anything writes training tensors: no snapshot reads them any more."""
        if self.saver is not None:
            self.saver.wait_before_write()

    def accept(self, lanes: Lanes, order: Align) -> None:
        """Apply a step that others decided, with their vector, bit for bit (rule 20)."""
        step, world = self._step, self._world
        assert step is not None and world is not None
        sums = decode(world.layout, lanes)
        self._ledger.accept(Vector(generation=world.generation, step=order.step, lanes=order.lanes))
        self.apply(sums)
        self._ledger.applied(order.step)
        self._close_groups()

    def aligned(self, generation: int, term: int, *, step: int) -> Aligned:
        """Where this rank stands, for the controller to compare and plan with."""
        self._close_groups()
        base = None if self._pending is None else self._pending.base
        self._pending = None
        if base is not None and base.step == step != self._ledger.committed:
            self._take_base(base)  # that RESUME was given, and did not reach this rank
        self._term = term
        if not self._loaded:
            assert self._spec.resume is not None
            self._take_base(self._read_base(self._spec.resume))
            self._loaded = True
        replica = self.replica
        snapshots: tuple[Snapped, ...] = ()
        if self.saver is not None and self._spec.local_rank == 0:
            snapshots = self.saver.inventory(term=term, generation=generation)
        return Aligned(
            generation=generation,
            step=self._ledger.committed,
            dense_digest=replica.dense_digest(),
            history_digest=replica.history_digest(),
            history=replica.history.astype("<f8").tobytes(),
            held=replica.held(),
            scalars=self._scalars(),
            top_k=replica.layers[0].top_k,
            snapshots=snapshots,
            dense_bytes=replica.dense_image().num_bytes,
            expert_bytes=replica.record_bytes,
            num_layers=len(replica.layers),
            num_experts=replica.num_experts,
        )

    def _scalars(self) -> str:
        """Numbers that are equal on all ranks: the optimizer's, and the save schedule's."""
        save = None if self.saver is None else self.saver.state_text()
        return json.dumps(
            {
                "optimizer": self.replica.scalars(),
                "save": save,
                "data": self.reading.state(),
                "evaluated": self._boundary.state(),
            }
        )

    def _take_scalars(self, text: str) -> None:
        found = json.loads(text)
        self.replica.take_scalars(found["optimizer"])
        self._boundary.take_state(found.get("evaluated"))
        if "data" in found:
            self.reading.take_state(found["data"])
        if self.saver is not None and found["save"] is not None:
            self.saver.take_state(found["save"])

    def _read_base(self, place: str) -> Base:
        """The dense state of a checkpoint ("url step") or of the first step ("init").

        Experts come with PREPARE. Nothing of this rank's own state is touched yet (rule 23).

        Raises:
            BadSourceError: The checkpoint lacks something or is damaged.
        """
        if place == "init":
            fresh = self._make_replica()
            return Base.of(fresh, step=0, scalars=self._first_scalars)
        try:
            return read_base(place, self.replica)
        except CheckpointError as problem:
            url, _, step = place.rpartition(" ")
            what = f"the checkpoint of step {step}"
            raise BadSourceError(
                name=place, what=what, source=url, reason=str(problem)
            ) from problem

    def _take_base(self, base: Base) -> None:
        """Stand at another step: all that this rank held belongs to a history that is over."""
        self._still()
        self.replica.load_dense(base.dense)
        self.replica.history = base.history
        self._take_scalars(base.scalars)
        self.replica.forget_experts()
        self._ledger.stand(base.step)

    def prepare(self, order: Prepare) -> Ready:
        """Groups, transfers into staging, comparison of digests (rules 23 and 24)."""
        self._close_groups()
        self._pending = None
        self._read = []
        plan = Plan.from_json(order.plan)
        own = self._spec.worker
        seat = next((i for i, s in enumerate(order.seats) if s.worker == own), None)
        started = time.monotonic()
        exchange = self._build(order.seats, order, "train") if seat is not None else None
        feeding = exchange
        if len(order.feeders) > len(order.seats):
            feeding = self._build(order.feeders, order, "feed")
        assert feeding is not None
        built = time.monotonic()
        base = self._read_base(order.reload) if order.reload else None
        feed = Feed(
            order,
            feeding,
            read_record=self.replica.read_record,
            dense=self.replica.dense_image(),
            record_bytes=self.replica.record_bytes,
            device=self.device,
        )
        feed.run()
        if seat is not None:
            self._fetch(order, plan, seat, feed)
        if seat in order.dense_targets:
            self._take_over(order)
        self._boundary.agree(order.scalars)
        self._compare(order, plan, feeding, base)
        self._pending = Pending(order=order, plan=plan, exchange=exchange, feed=feed, base=base)
        return Ready(
            generation=order.generation,
            plan_digest=plan.digest,
            groups_s=built - started,
            transfer_s=time.monotonic() - built,
            bytes_received=feed.bytes_received,
            restored=tuple(self._read),
            history=b"" if base is None else base.history.astype("<f8").tobytes(),
        )

    def _fetch(self, order: Prepare, plan: Plan, seat: int, feed: Feed) -> None:
        """Experts without a live replica: each holder fetches the one chosen copy (rule 27)."""
        readers: dict[str, CheckpointReader] = {}
        for restore in order.restores:
            if restore.source == "init" or seat not in plan.ranks_of(restore.layer, restore.expert):
                continue
            self._observer.enter("transfer")
            try:
                tensors = self._tensors_from(restore, order, readers)
            except CheckpointError as problem:  # the next attempt chooses another copy
                place = restore.source.partition(":")[2]
                name = bad_source_of(restore) if restore.detail else place
                what = f"L{restore.layer}/E{restore.expert}"
                raise BadSourceError(
                    name=name, what=what, source=place, reason=str(problem)
                ) from problem
            record = self.replica.record_of(restore.layer, restore.expert, tensors)
            feed.staged[(restore.layer, restore.expert)] = record
            feed.bytes_received += record.numel()

    def _tensors_from(
        self, restore: Restore, order: Prepare, readers: dict[str, CheckpointReader]
    ) -> Mapping[str, torch.Tensor]:
        kind, _, place = restore.source.partition(":")
        if kind == "storage" and restore.detail:
            return self._newest_stored(restore, order, place.rpartition(" ")[0])
        if kind == "storage":
            if place not in readers:
                url, _, step = place.rpartition(" ")
                readers[place] = CheckpointReader(url, load_manifest(url, int(step)))
            return readers[place].expert(restore.layer, restore.expert)
        client = KeeperClient(
            place,
            secret=self._spec.controller.secret,
            tag=Tag(job=self._spec.run_id, term=self._term, generation=order.generation),
        )
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

    def _newest_stored(
        self, restore: Restore, order: Prepare, url: str
    ) -> Mapping[str, torch.Tensor]:
        """From storage, passing over damaged files: the same version on every rank."""
        lineage = [(int(g), int(b)) for g, b in json.loads(order.lineage)]
        found = read_newest_expert(
            url, restore.layer, restore.expert, lineage=lineage, resume_step=order.step
        )
        self._read.append(
            Snapped(
                layer=restore.layer,
                expert=restore.expert,
                generation=found.generation,
                step=found.step,
                routed=found.routed,
            )
        )
        return found.tensors

    def _build(self, seats: tuple[Seat, ...], order: Prepare, kind: str) -> GuardedExchange:
        controller_port = int(self._spec.controller.address.rpartition(":")[2])
        group = Group(generation=order.generation, skip_ports=frozenset({controller_port}))
        with self._lock:
            self._groups.append(group)
        if self._ledger.fence != order.generation:
            raise FencedError(generation=order.generation, fence=self._ledger.fence)
        rank = next(i for i, s in enumerate(seats) if s.worker == self._spec.worker)
        stall_s = self._config.recovery.tolerated_stall_s
        self._observer.waiting("groups")
        try:
            group.build(
                store=order.store,
                prefix=f"{self._spec.run_id}/{order.generation}/{kind}",
                rank=rank,
                size=len(seats),
                host=self._spec.host,
                device=self.device,
                timeout_s=30 * stall_s,
            )
            exchange = group.exchange(
                shared=self.device.type == "cpu" and self._config.dispatch.transport == "auto",
                timeout_s=30 * stall_s,
            )
        except RuntimeError as problem:
            raise FencedError(generation=order.generation, fence=self._ledger.fence) from problem
        finally:
            self._observer.done()
        return GuardedExchange(exchange, ledger=self._ledger, observer=self._observer)

    def _take_over(self, order: Prepare) -> None:
        """A joiner has the dense state: make it its own."""
        replica = self.replica
        shape = replica.history.shape
        history = torch.frombuffer(bytearray(order.history), dtype=torch.float64)
        replica.history = history.numpy().reshape(shape).copy()
        self._take_scalars(order.scalars)
        replica.keep_buffers()
        replica.forget_experts()
        self._loaded = True
        self._ledger.stand(order.step)

    def _compare(
        self, order: Prepare, plan: Plan, exchange: GuardedExchange, base: Base | None
    ) -> None:
        """All-gather what must be equal on every rank; each compares."""
        words = (
            self._spec.run_id,
            str(order.generation),
            str(order.step),
            plan.digest,
            self.replica.dense_digest() if base is None else base.dense_digest(),
            self.replica.history_digest() if base is None else base.history_digest(),
        )
        sums = [zlib.crc32(word.encode()) for word in words]
        own = torch.tensor(sums, dtype=torch.int64, device=self.device)
        everybody = own.new_empty(len(words) * exchange.size)
        exchange.all_gather(everybody, own, label="digest")
        rows = everybody.cpu().view(exchange.size, len(words))
        if not bool((rows == rows[0]).all()):
            names = ("run", "generation", "step", "plan", "dense state", "load history")
            wrong = [n for i, n in enumerate(names) if not bool((rows[:, i] == rows[0, i]).all())]
            raise LazarusError(f"ranks disagree on {', '.join(wrong)} before RESUME")

    def resume(self, order: Resume) -> None:
        """Switch slots, free old ones, stand ready for the next step (rule 25)."""
        pending = self._pending
        if pending is None or pending.order.generation != order.generation:
            raise FencedError(generation=order.generation, fence=self._ledger.fence)
        plan, exchange = pending.plan, pending.exchange
        assert exchange is not None
        self._pending = None
        replica = self.replica
        self._still()
        if pending.base is not None:
            self._take_base(pending.base)
        replica.ensure_slots(plan.expert_of_slot.shape[2])
        if self.saver is not None:
            self.saver.adapt(order)
        self._missing = missing_after(pending.order.moves_behind)
        pieces = expert_pieces(pending.order.moves_behind, record_bytes=replica.record_bytes)
        self._behind = list(rounds_of(pieces))
        self._feed = pending.feed
        self._whole_plan = plan
        self._whole_moves = pending.order.moves_behind
        self._exchange = exchange
        self._speeds = pending.order.speeds
        plan = without(plan, self._missing)
        for layer in range(len(replica.layers)):
            experts = [int(e) for e in plan.expert_of_slot[layer, exchange.rank] if e >= 0]
            replica.place(layer, experts, pending.feed.staged)
        self._seats = pending.order.seats
        self._tell_keeper(order)
        self.reading.seat(
            Seating(
                rank=exchange.rank,
                size=exchange.size,
                committed=order.step,
                speeds=tuple(self._speeds) or None,
            )
        )
        self.context = dataclasses.replace(
            self.context,
            rank=exchange.rank,
            world_size=exchange.size,
            generation=order.generation,
        )
        self._enter(plan, exchange, order.generation)

    def _enter(self, plan: Plan, exchange: GuardedExchange, generation: int) -> None:
        """Compute with these replicas from the next step on."""
        self._world = World(
            self.replica,
            plan,
            exchange,
            generation=generation,
            speeds=self._speeds,
            mode=split_mode(self._config.dispatch.mode, self.device),
            rows_per_replica=self._config.dispatch.rows_per_replica,
        )
        self._step = Step(
            self.replica,
            self._world,
            batching=self.batching,
            reading=self.reading,
            loss=self.user.loss or builtin.loss,
            observer=self._observer,
            context=self.context,
            hooks=self._hooks,
        )

    def _heal_on(self, step: int, send: Callable[[Body], None]) -> None:
        """One round of refilling between two optimizer steps, when the tensors stand still."""
        world = self._world
        assert world is not None
        batch = self._behind.pop(0)
        self._feed.run_round(batch)
        moved = frozenset((piece.layer, piece.expert, piece.target) for piece in batch)
        self._missing -= moved
        plan, rank = without(self._whole_plan, self._missing), world.exchange.rank
        for layer in sorted({piece.layer for piece in batch if piece.target == rank}):
            experts = [int(e) for e in plan.expert_of_slot[layer, rank] if e >= 0]
            self.replica.place(layer, experts, self._feed.staged)
        self._feed.staged.clear()
        self._enter(plan, self._exchange, world.generation)
        if not self._behind and rank == 0:
            total = len(self._whole_moves) * self.replica.record_bytes
            send(Healed(generation=world.generation, step=step, bytes_received=total))

    def _tell_keeper(self, order: Resume) -> None:
        """What the new lineage voids in this node's memory; nobody waits for it."""
        saver = self.saver
        if saver is None or self._spec.local_rank != 0:
            return
        lineage = [(int(g), int(b)) for g, b in json.loads(order.lineage)]
        options = {"term": self._term, "generation": order.generation}
        threading.Thread(
            target=saver.resumed,
            args=(lineage, order.step),
            kwargs=options,
            name="keeper",
            daemon=True,
        ).start()

    # ---- training ------------------------------------------------------------------------------

    @property
    def step(self) -> Step:
        assert self._step is not None
        return self._step

    @property
    def is_reporter(self) -> bool:
        """The lowest rank sends each vector; the others keep theirs until acknowledged."""
        return self._world is not None and self._world.exchange.rank == 0

    def compute(self, step: int, *, pause: Callable[[], bool]) -> Lanes:
        return self.step.compute(step, pause=pause, prepared=lambda: self._ledger.prepare(step))

    def apply(self, sums: StepSums) -> None:
        if self.saver is not None:
            self.saver.before_apply()
        self.replica.apply(sums, dense_square=self.step.dense_square)
        self.context.measures.commit()
        self.reading.committed(sums.step)
        if self.saver is not None:
            self.saver.committed(sums.counts)

    @property
    def told(self) -> tuple[Body, ...]:
        """The last evaluation and shares of checkpoints that this rank reported."""
        shares = () if self.saver is None else self.saver.told
        evaluation = self._boundary.told
        return shares if evaluation is None else (evaluation, *shares)

    def before_training(self, step: int, send: Callable[[Body], None]) -> None:
        """Training goes on from the state after ``step``."""
        assert self._world is not None
        self._boundary.before_training(step, self._world, send)

    def after_commit(self, step: int, send: Callable[[Body], None], *, published: int) -> None:
        """What follows a commit at its boundary: a snapshot, a digest now and then."""
        if self._behind:
            self._heal_on(step, send)
        world = self._world
        if self.saver is not None and world is not None:
            self.saver.after_commit(
                step,
                plan=world.plan,
                rank=world.exchange.rank,
                nodes=[seat.node for seat in self._seats],
                keepers=[seat.keeper for seat in self._seats],
                generation=world.generation,
                term=self._term,
                published=published,
            )
        assert world is not None
        self._boundary.after_commit(
            step, world, send, context=self.context, nodes=[seat.node for seat in self._seats]
        )
        every = self._config.run.digest_every
        if every and step % every == 0:
            send(self._digest_part(step))

    def _digest_part(self, step: int) -> DigestPart:
        world = self._world
        assert world is not None
        items = self.replica.digest_items(world.plan.home, world.exchange.rank)
        return DigestPart(generation=world.generation, step=step, items=items)

    def finalize(self, order: Finalize) -> list[Body]:
        """Last digest, and this rank's share of the last checkpoint."""
        started = time.monotonic()
        files = ""
        if order.checkpoint:
            files = json.dumps(self._write_checkpoint(order))
        done = Finalized(
            generation=order.generation,
            step=order.step,
            files=files,
            wall_s=time.monotonic() - started,
        )
        return [self._digest_part(order.step), done]

    def _write_checkpoint(self, order: Finalize) -> dict[str, Any]:
        world = self._world
        assert world is not None
        return write_share(
            self._spec.checkpoint_url,
            self.replica,
            world.plan,
            rank=world.exchange.rank,
            size=world.exchange.size,
            tag=Tag(job=self._spec.run_id, term=order.term, generation=world.generation),
            step=order.step,
            scalars=self._scalars(),
        )

    def close(self) -> None:
        self.reading.close()
        if self.saver is not None:
            self.saver.close()


def split_mode(mode: str, device: torch.device) -> str:
    """``dispatch.mode`` with auto decided: spreading pays where every rank has its own device."""
    if mode != "auto":
        return mode
    return "home" if device.type == "cpu" else "balanced"


def _device(local_rank: int) -> torch.device:
    """The rank's device: one GPU each where there are any."""
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        with suppress(RuntimeError):
            torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


__all__ = ["Pending", "Rank", "VectorLayout"]

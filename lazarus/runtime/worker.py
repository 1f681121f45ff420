"""One rank: a training thread that computes and obeys, a control thread that fences and reports.

Workers never decide. The training thread waits for orders (ALIGN, PREPARE, RESUME, FINALIZE),
trains from RESUME until a pause, a fence or an error, and then waits again.
"""

from __future__ import annotations

import faulthandler
import io
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch

from dispatcher.memory import keep_freed_memory
from lazarus.control.messages import (
    Ack,
    Align,
    Aligned,
    AskStacks,
    Body,
    Depart,
    Fence,
    Fenced,
    Finalize,
    FromWorker,
    Go,
    Heartbeat,
    Hello,
    LeaveRequest,
    Pause,
    Paused,
    Prepare,
    Resume,
    Stacks,
    Strike,
    Suspicion,
    UserError,
    Vector,
    Welcome,
)
from lazarus.errors import (
    BadSourceError,
    BrokenInvariantError,
    CollectiveError,
    DataError,
    FencedError,
    TransferError,
)
from lazarus.faults import FaultSpec, parse_fault
from lazarus.runtime.inject import InjectedCrashError, Observer, register_process
from lazarus.runtime.ledger import StepLedger
from lazarus.runtime.link import Link
from lazarus.runtime.memory import visible_bytes
from lazarus.runtime.rank import Rank
from lazarus.runtime.spec import WorkerSpec

_FOREVER = 1 << 60  # a fence that nothing follows


class UserCodeFailure(Exception):
    """Wraps whatever the user's code raised, so that the runtime's own errors stay apart."""


class Worker:
    """The process of one rank, from hello to depart."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        start = 0 if spec.resume is None else int(spec.resume.rpartition(" ")[2])
        self._ledger = StepLedger(committed=start)
        self._orders: queue.SimpleQueue[Body] = queue.SimpleQueue()
        self._rank: Rank | None = None
        self._node = -1
        self._term = 0
        self._pause = 0  # newest generation that shall pause; may be told before it is entered
        self._building = True
        self._over = threading.Event()
        self._acked = 0
        self._last_words: Body | None = None  # what a new controller must hear again
        stall_s = float(spec.config["recovery"]["tolerated_stall_s"])
        self._stall_s = stall_s
        self._link = Link(
            spec.controller.address,
            secret=spec.controller.secret,
            ca=spec.controller.ca,
            speaker=FromWorker,
            hello=self._hello,
            on_message=self._on_message,
            on_dead=self._on_dead,
            allowance_s=6 * stall_s,
        )
        self._observer = Observer(
            ledger=self._ledger,
            faults=(),
            send=self._link.send,
            node_folder=spec.node_folder,
            go_timeout_s=6 * stall_s,
        )
        self._welcomed = threading.Event()
        self._memory_bytes = int(spec.memory_share * visible_bytes())

    # ---- control thread ------------------------------------------------------------------------

    def _hello(self) -> Hello:
        spec, ledger = self._spec, self._ledger
        return Hello(
            worker=spec.worker,
            node_key=spec.node_key,
            local_rank=spec.local_rank,
            ranks_per_node=spec.ranks_per_node,
            host=spec.host,
            pid=os.getpid(),
            version=spec.version,
            term=self._term,
            generation=ledger.gen,
            fence=ledger.fence,
            committed=ledger.decided,
            keeper=spec.keeper,
            zone=spec.zone,
            memory_bytes=self._memory_bytes,
        )

    def _on_message(self, term: int, body: Body) -> None:
        if term < self._term:
            return
        if term > self._term:
            self._term = term
            self._resend()
        match body:
            case Welcome(node=node):
                self._node = node
                self._welcomed.set()
            case Fence(generation=generation):
                report = self._ledger.raise_fence(generation, self._release)
                if report is not None:
                    self._link.send(report)
            case Pause(generation=generation):
                self._pause = max(self._pause, generation)
            case Ack(step=step):
                self._acked = step
                self._ledger.acknowledge(step)
            case Go():
                self._observer.go()
            case Strike(kind=kind):
                self._observer.strike(kind)
            case AskStacks():
                self._link.send(Stacks(text=stacks()))
            case Depart() | Fenced():
                self._end(body)
            case _:
                self._orders.put(body)

    def _resend(self) -> None:
        """A new controller: say again what it may not have heard (rule 14)."""
        for vector in self._ledger.unacknowledged(above=self._acked):
            self._link.send(vector)
        if self._observer.leaving:  # before its pause: the transition there takes it out
            self._link.send(LeaveRequest(generation=self._ledger.gen, cause="leave"))
        if (last := self._last_words) is not None:
            self._link.send(last)
        for told in () if self._rank is None else self._rank.told:
            self._link.send(told)
        if (announced := self._observer.announced) is not None:
            self._link.send(announced)

    def _release(self) -> None:
        rank = self._rank
        if rank is not None:
            rank.release()

    def _end(self, body: Body) -> None:
        self._over.set()
        self._welcomed.set()
        self._ledger.raise_fence(_FOREVER, self._release)
        self._orders.put(body)

    def _on_dead(self, reason: str) -> None:
        print(f"worker {self._spec.worker}: {reason}", file=sys.stderr, flush=True)
        self._end(Fenced(reason=reason))

    def _beat(self) -> None:
        interval = min(1.0, self._stall_s / 10)
        while not self._over.wait(interval):
            observer = self._observer
            if self._building:
                observer.progress += 1
            self._link.send(
                Heartbeat(
                    generation=self._ledger.gen,
                    step=observer.step,
                    phase=observer.phase,
                    progress=observer.progress,
                    waiting=observer.is_waiting,
                    acked=self._acked,
                )
            )

    # ---- training thread -----------------------------------------------------------------------

    def run(self) -> int:
        """The whole life of the process.

        Returns:
            0 after Depart, 1 after an error or exclusion.
        """
        register_process(self._spec.node_folder)
        self._link.start()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()
        self._welcomed.wait()
        try:
            return self._serve()
        except UserCodeFailure as failure:
            return self._user_failed(failure)
        finally:
            self._over.set()
            self._release()
            if self._rank is not None:
                self._rank.close()
            self._link.close()

    def _serve(self) -> int:
        if self._over.is_set():
            return 1
        self._observer._faults.extend(self._own_faults())
        self._rank = self._build()
        self._building = False
        while True:
            order = self._orders.get()
            if isinstance(order, Depart):
                return 0
            if isinstance(order, Fenced):
                return 1
            generation = getattr(order, "generation", 0)
            if generation != self._ledger.fence:
                continue  # of an older attempt
            try:
                self._obey(order)
            except FencedError:
                continue
            except (CollectiveError, TransferError) as problem:
                self._suspect(problem)
            except DataError as problem:
                raise UserCodeFailure from problem

    def _own_faults(self) -> list[FaultSpec]:
        faults = [parse_fault(text) for text in self._spec.faults]
        first = self._spec.local_rank == 0
        return [f for f in faults if self._mine(f) and (first or f.kind in ("slow", "stall"))]

    def _mine(self, fault: FaultSpec) -> bool:
        if fault.node is None:
            return self._node == 0
        return fault.node == self._node

    def _build(self) -> Rank:
        try:
            return Rank(
                self._spec,
                node=self._node,
                ledger=self._ledger,
                observer=self._observer,
                send=self._link.send,
            )
        except BaseException as problem:
            raise UserCodeFailure from problem

    def _obey(self, order: Body) -> None:
        rank = self._rank
        assert rank is not None
        self._observer.phase = type(order).__name__.lower()
        self._observer.progress += 1
        match order:
            case Align():
                self._last_words = None
                self._observer.enter("reconfigure")
                self._link.send(self._align(rank, order))
            case Prepare():
                self._observer.step = max(self._observer.step, order.step)  # a joiner's first
                self._link.send(rank.prepare(order, self._term))
            case Resume():
                self._acked = min(self._acked, order.step)  # a rollback does steps again
                rank.resume(order)
                if self._ledger.enter(order.generation):
                    self._train(rank, order.step + 1)
            case Finalize():
                for body in rank.finalize(order):
                    self._link.send(body)
            case _:
                raise BrokenInvariantError(f"no such order: {type(order).__name__}")

    def _align(self, rank: Rank, order: Align) -> Aligned:
        if order.commit and self._ledger.decided < order.step:
            lanes = np.frombuffer(order.lanes, dtype="<f8").copy()
            rank.accept(lanes, order)
        else:
            self._ledger.withdraw()
            rank.redo()
        return rank.aligned(order.generation, self._term, step=order.step)

    def _train(self, rank: Rank, first: int) -> None:
        step = first
        steps = int(self._spec.config["train"]["steps"])
        with self._user_code():
            rank.before_training(first - 1, self._link.send)
        while step <= steps:
            self._ledger.check()
            self._observer.begin_step(step)
            pause = self._one_step(rank, step)
            if pause:
                break
            step += 1
        self._observer.phase = "paused"
        self._say(Paused(generation=self._ledger.gen, step=self._ledger.committed))

    def _one_step(self, rank: Rank, step: int) -> bool:
        """Compute, commit, apply (rules 9-13). True: all ranks stop here."""
        began = time.monotonic()
        with self._user_code():
            lanes = rank.compute(step, pause=self._wants_pause)
        sums = rank.step.check(lanes, step=step)
        vector = Vector(
            generation=self._ledger.gen,
            step=step,
            lanes=lanes.astype("<f8").tobytes(),
            wall_s=time.monotonic() - began,
        )
        if not self._ledger.decide(vector):
            self._ledger.check()
        self._observer.enter("optimizer")
        rank.apply(sums)
        self._ledger.applied(step)
        if rank.is_reporter:
            self._link.send(vector)
        with self._user_code():
            rank.after_commit(step, self._link.send, published=self._acked)
        return sums.pause

    @contextmanager
    def _user_code(self) -> Iterator[None]:
        """What the user's code raises ends this rank, unless the attempt was over anyway."""
        try:
            yield
        except (FencedError, CollectiveError):
            raise
        except InjectedCrashError as problem:
            raise UserCodeFailure from problem
        except Exception as problem:
            if self._ledger.fence != self._ledger.gen:
                raise FencedError(
                    generation=self._ledger.gen, fence=self._ledger.fence
                ) from problem
            raise UserCodeFailure from problem

    def _wants_pause(self) -> bool:
        return self._pause == self._ledger.gen or self._observer.leaving

    def _suspect(self, problem: CollectiveError | TransferError) -> None:
        if self._over.is_set():
            return
        self._say(
            Suspicion(
                generation=self._ledger.fence,
                step=self._observer.step,
                phase=self._observer.phase,
                error=str(problem),
                bad_source=problem.name if isinstance(problem, BadSourceError) else "",
            )
        )

    def _say(self, body: Body) -> None:
        """Send, and keep: a controller that comes back must hear it too."""
        self._last_words = body
        self._link.send(body)

    def _user_failed(self, failure: UserCodeFailure) -> int:
        cause = failure.__cause__
        assert cause is not None
        text = "".join(traceback.format_exception(cause))
        error = f"{type(cause).__name__}: {cause}".splitlines()[0]
        self._link.send(
            UserError(
                generation=self._ledger.gen, step=self._observer.step, error=error, traceback=text
            )
        )
        return 1

    def leave(self, cause: str) -> None:
        """Ask to go (SIGTERM, a notice from the machine)."""
        self._observer.leaving = True
        self._link.send(LeaveRequest(generation=self._ledger.gen, cause=cause))


def stacks() -> str:
    """Python stacks of all threads of this process."""
    frames = sys._current_frames()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    out = io.StringIO()
    for ident, frame in frames.items():
        out.write(f"--- {names.get(ident, ident)}\n")
        out.write("".join(traceback.format_stack(frame)))
    return out.getvalue()


def prepare_process(threads: int) -> None:
    """Process-wide settings of a worker: fixed thread count, determinism, no Ctrl-C."""
    torch.set_num_threads(threads)
    with suppress(RuntimeError):
        torch.set_num_interop_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    keep_freed_memory()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(OSError, ValueError, io.UnsupportedOperation):
        faulthandler.enable()
        faulthandler.register(signal.SIGUSR1, chain=False)  # stacks of all threads to stderr


def run_worker(spec: WorkerSpec) -> int:
    """Entry point of a rank's process, whoever started it."""
    config: Any = spec.config
    prepare_process(max(1, int(config["cluster"]["cpus_per_rank"])))
    worker = Worker(spec)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: worker.leave(f"SIGTERM on {socket.gethostname()}"))
    return worker.run()

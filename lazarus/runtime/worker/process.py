"""The process of one rank: a training thread that computes, and a control thread that fences.

Workers decide nothing. The training thread waits for orders of the controller (ALIGN, PREPARE,
RESUME, FINALIZE), trains from RESUME until a pause, a fence or an error, and then waits again.
Orders are carried out in ``rank.py``, steps in ``training_loop.py``. The control thread receives
all messages and reports to the controller.

Rules named in this module are those of docs/protocol.md.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import sys
import threading

import cloudpickle

from lazarus.basics.threads import spawn
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
    InjectFault,
    LeaveRequest,
    Pause,
    Paused,
    Prepare,
    Resume,
    Stacks,
    Welcome,
)
from lazarus.errors import (
    BrokenInvariantError,
    CollectiveError,
    DataError,
    FencedError,
    TransferError,
)
from lazarus.failure import Cause
from lazarus.runtime.fence.ledger import StepLedger
from lazarus.runtime.fence.observer import Observer, register_process
from lazarus.runtime.fence.whereabouts import Note, Whereabouts
from lazarus.runtime.host.memory import visible_bytes
from lazarus.runtime.rpc.link import Link
from lazarus.runtime.spec import WorkerSpec
from lazarus.runtime.worker.rank import Rank
from lazarus.runtime.worker.setup import crashes_noted, prepare_process, stacks
from lazarus.runtime.worker.training_loop import TrainingLoop
from lazarus.runtime.worker.user_errors import (
    UserCodeFailure,
    catch_exit,
    fatal,
    message_of,
    places_of,
    suspicion_of,
)
from lazarus.version import __version__

_FOREVER = 1 << 60  # above every generation: the rank never trains again


class Worker:
    """The process of one rank, from its first message (hello) to its last order (depart)."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        start = 0 if spec.resume is None else spec.resume.step
        self._ledger = StepLedger(committed=start)
        self._orders: queue.SimpleQueue[Body] = queue.SimpleQueue()
        self._rank: Rank | None = None
        self._node = -1
        self._term = 0
        self._pause = 0  # newest generation told to pause; perhaps not entered yet
        self._building = True
        self._over = threading.Event()
        self._left = threading.Event()  # the training thread has finished
        self._is_alone = False  # this process is a worker's own and may be killed
        self._acked = 0
        self._last_words: Body | None = None  # message to repeat to a new controller
        self._timeouts = spec.config.timeouts
        self._link = Link(
            spec.controller,
            credentials=spec.credentials,
            speaker=FromWorker,
            hello=self._hello,
            on_message=self._on_message,
            on_dead=self._on_dead,
            allowance_s=self._timeouts.controller_restart_s,
        )
        self._observer = Observer(
            ledger=self._ledger,
            faults=(),
            send=self._link.send,
            node_folder=spec.node_folder,
            go_timeout_s=self._timeouts.fault_recorded_s,
            is_first=self._is_first,
        )
        self._welcomed = threading.Event()
        self._loop = TrainingLoop(
            spec.config,
            ledger=self._ledger,
            observer=self._observer,
            send=self._link.send,
            wants_pause=self._wants_pause,
            published=lambda: self._acked,
        )
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
            version=__version__,
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
                tail = self._observer.tail()
                report = self._ledger.raise_fence(generation, self._release, tail=tail)
                if report is not None:
                    self._link.send(report)
            case Pause(generation=generation):
                self._pause = max(self._pause, generation)
            case Ack(step=step):
                self._acked = step
                self._ledger.acknowledge(step)
            case Go(is_done=is_done):
                self._observer.go(is_done=is_done)
            case InjectFault(kind=kind):
                self._observer.strike(kind)
            case AskStacks():
                self._link.send(Stacks(text=stacks()))
            case Depart() | Fenced():
                self._end(body)
            case _:
                self._orders.put(body)

    def _resend(self) -> None:
        """Repeat to a new controller what it may not have received (rule 14)."""
        for vector in self._ledger.unacknowledged(above=self._acked):
            self._link.send(vector)
        if self._observer.leaving:  # before its pause, which lets the node go
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
        if self._is_alone:
            spawn("last bound", self._end_anyway, on_death=self._thread_died)

    def _on_dead(self, reason: str) -> None:
        print(f"worker {self._spec.worker}: {reason}", file=sys.stderr, flush=True)
        self._end(Fenced(reason=reason))

    def _end_anyway(self) -> None:
        """Kill the process if its training thread stays in user code.

        The driver would kill it too, but may be gone; an endless loop would then run on.
        """
        if not self._left.wait(self._timeouts.final_s):
            os.kill(os.getpid(), signal.SIGKILL)

    def _beat(self) -> None:
        while not self._over.wait(self._timeouts.heartbeat_interval_s):
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
        """Run the process from start to end.

        Returns:
            0 after Depart, 1 after an error or exclusion.
        """
        spec, observer = self._spec, self._observer
        register_process(spec.node_folder)
        observer.where = Whereabouts.in_folder(spec.node_folder, spec.local_rank)
        catch_exit(observer.where)
        self._is_alone = True
        with crashes_noted(spec.node_folder, spec.local_rank):
            return self._run()

    def _run(self) -> int:
        self._link.start()
        spawn("heartbeat", self._beat, on_death=self._thread_died)
        self._welcomed.wait()
        try:
            return self._serve()
        except UserCodeFailure as failure:
            return self._failed(failure.problem, failure.note, Cause.USER_CODE)
        except BaseException as problem:  # noqa: BLE001 - the edge of the process
            return self._failed(problem, self._observer.where.now, Cause.INTERNAL)
        finally:
            self._observer.where.leave()
            self._over.set()
            self._release()
            if self._rank is not None:
                self._rank.close()
            self._link.close()
            self._left.set()

    def _thread_died(self, name: str, problem: BaseException) -> None:
        """Report that a background thread has died, and end the process."""
        self._failed(problem, self._observer.where.now, Cause.INTERNAL)
        self._link.close()
        os._exit(1)

    def _serve(self) -> int:
        if self._over.is_set():
            return 1
        self._observer.add_faults(self._spec.faults, node=self._node, rank=self._spec.local_rank)
        rank = self._rank = self._build()
        self._building = False
        while True:
            order = self._orders.get()
            if isinstance(order, Depart):
                return 0
            if isinstance(order, Fenced):
                return 1
            generation = getattr(order, "generation", 0)
            if generation != self._ledger.fence:
                continue  # an order of an older attempt
            try:
                self._obey(rank, order)
            except FencedError:
                continue
            except (CollectiveError, TransferError) as problem:
                self._suspect(problem)
            except DataError as problem:
                raise UserCodeFailure(problem, self._observer.where.now) from problem

    def _is_first(self) -> bool:
        """Whether this rank fires faults that name no node; before groups exist every rank may."""
        return self._rank is None or self._rank.is_first

    def _build(self) -> Rank:
        where = self._observer.where
        with fatal(where, "build"):
            where.places = places_of(cloudpickle.loads(self._spec.user))
            where.enter("build")
            return Rank(
                self._spec,
                node=self._node,
                ledger=self._ledger,
                observer=self._observer,
                send=self._link.send,
            )

    def _obey(self, rank: Rank, order: Body) -> None:
        self._observer.phase = type(order).__name__.lower()
        self._observer.progress += 1
        match order:
            case Align():
                self._last_words = None
                self._observer.enter("reconfigure")
                self._link.send(self._align(rank, order))
            case Prepare():
                self._observer.step = max(self._observer.step, order.step)  # joining: no step yet
                self._link.send(rank.prepare(order, self._term))
            case Resume():
                self._acked = min(self._acked, order.step)  # a rollback repeats steps
                generation = rank.resume(order)
                if self._ledger.enter(order.generation):
                    self._loop.run(generation, halt=order.halt)
                    self._observer.phase = "paused"
                    self._say(Paused(generation=order.generation, step=self._ledger.committed))
            case Finalize():
                for body in rank.finalize(order):
                    self._link.send(body)
            case _:
                raise BrokenInvariantError(f"no such order: {type(order).__name__}")

    def _align(self, rank: Rank, order: Align) -> Aligned:
        if order.commit and self._ledger.decided < order.step:
            with fatal(self._observer.where, "optimizer"):
                rank.accept(order)
        else:
            self._ledger.withdraw()
            rank.redo()
        if order.reload:
            self._acked = order.step
            rank.reload(order.reload)
        return rank.aligned(order, self._term)

    def _wants_pause(self) -> bool:
        return self._pause == self._ledger.gen or self._observer.leaving

    def _suspect(self, problem: CollectiveError | TransferError) -> None:
        if self._over.is_set():
            return
        observer = self._observer
        generation, step, phase = self._ledger.fence, observer.step, observer.phase
        self._say(suspicion_of(problem, generation=generation, step=step, phase=phase))

    def _say(self, body: Body) -> None:
        """Send a message, and keep it to repeat it to a new controller."""
        self._last_words = body
        self._link.send(body)

    def _failed(self, problem: BaseException, note: Note, cause: Cause) -> int:
        """Report an exception, and wait until the controller ends this process."""
        told = message_of(problem, note, generation=self._ledger.gen, cause=cause)
        if cause is Cause.INTERNAL:
            print(f"worker {self._spec.worker}: {told.traceback}", file=sys.stderr, flush=True)
        for vector in self._ledger.unacknowledged(above=self._acked):
            self._link.send(vector)  # commits are recorded before the error
        self._say(told)
        self._release()
        self._over.wait(self._timeouts.controller_restart_s)
        return 1

    def leave(self, cause: str) -> None:
        """Ask the controller to let this node leave (after SIGTERM or a preemption notice)."""
        self._observer.leaving = True
        self._link.send(LeaveRequest(generation=self._ledger.gen, cause=cause))


def run_worker(spec: WorkerSpec) -> int:
    """Entry point of a rank's process."""
    prepare_process(max(1, int(spec.config.cluster.cpus_per_rank)))
    worker = Worker(spec)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: worker.leave(f"SIGTERM on {socket.gethostname()}"))
    return worker.run()

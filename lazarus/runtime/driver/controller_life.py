"""The controller's process as its owner sees it: started, watched, ended and replaced."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

from lazarus.basics.clock import now_s
from lazarus.basics.threads import spawn
from lazarus.config.timeouts import Timeouts
from lazarus.errors import ControllerDiedError, StartupError
from lazarus.failure import Cause, Failure
from lazarus.runtime.driver.restarts import Again, GiveUp, PulseWatch, Restarts
from lazarus.runtime.launch.launcher import Launcher
from lazarus.runtime.spec import ControllerSpec

_STARTING_S = 10.0  # for a start that is under way when the run ends


class ControllerLife:
    """All lives of one run's controller. No call waits, ``start`` apart.

    Args:
        on_over: Called once, from any thread, when it will not live: the run is over.
    """

    def __init__(
        self,
        launcher: Launcher,
        *,
        timeouts: Timeouts,
        on_over: Callable[[Failure], None],
    ) -> None:
        self._launcher = launcher
        self._timeouts = timeouts
        self._on_over = on_over
        self._spec: ControllerSpec | None = None
        self._restarts = Restarts(
            settled_s=timeouts.controller_settled_s, pause_s=timeouts.restart_pause_s
        )
        self._lock = threading.Lock()
        self._failure: Failure | None = None  # its last word, if it had one
        self._hung = ""  # why the driver ended it
        self._on_purpose = False
        self._closed = threading.Event()
        self._starting: threading.Thread | None = None
        self._pulse = PulseWatch(
            limit_s=timeouts.controller_silent_s,
            on_hung=self._end_hung,
            on_death=self._thread_died,
        )

    def start(self, spec: ControllerSpec) -> int:
        """The first life; waits until it listens. Returns its port.

        Raises:
            StartupError: It did not come up.
        """
        port = self._launcher.start_controller(spec, timeout_s=self._timeouts.startup_s)
        self._spec = replace(spec, port=port)
        self._begins()
        self._pulse.start()
        return port

    def _begins(self) -> None:
        self._restarts.born(now_s())
        self._pulse.heard()

    # ---- what it says --------------------------------------------------------------------------

    def pulse(self) -> None:
        """Its loop turns."""
        self._pulse.heard()

    def failed(self, failure: Failure) -> None:
        """It says of what it dies."""
        with self._lock:
            self._failure = failure

    # ---- its death -----------------------------------------------------------------------------

    def strike(self) -> None:
        """End it, to see how the run takes it."""
        with self._lock:
            self._on_purpose = True
        self._launcher.kill("controller")

    def _end_hung(self, silent_s: float) -> None:
        with self._lock:
            self._hung = f"its loop gave no sign for {silent_s:.1f} s"
        self._launcher.kill("controller")

    def died(self, cause: str) -> None:
        """Its process has ended; another one follows, soon, or the run is over."""
        self._pulse.gone()
        starting = self._starting
        if starting is not None and starting is not threading.current_thread():
            starting.join(1.0)  # it died while it started: its last word is on the way
        with self._lock:
            failure, hung, on_purpose = self._failure, self._hung, self._on_purpose
            self._failure, self._hung, self._on_purpose = None, "", False
        error = "" if failure is None else failure.message
        match self._restarts.died(error, now_s(), on_purpose=on_purpose):
            case Again(pause_s=pause_s):
                self._starting = spawn(
                    "restart", self._restart, pause_s, on_death=self._thread_died
                )
            case GiveUp(reason=reason):
                self._on_over(_dead(reason, failure, hung or cause))

    def _restart(self, pause_s: float) -> None:
        """Its journal and its port are where they were; workers come back by themselves."""
        assert self._spec is not None
        if self._closed.wait(pause_s):
            return
        try:
            self._launcher.start_controller(self._spec, timeout_s=self._timeouts.startup_s)
        except ControllerDiedError as problem:
            if problem.failure:
                self.failed(Failure.from_json(problem.failure))
            return  # the launcher tells of its end, as of any other
        except StartupError as problem:
            self.died(str(problem))
            return
        self._begins()

    def _thread_died(self, name: str, problem: BaseException) -> None:
        text = f"{type(problem).__name__}: {problem}"
        self._on_over(Failure(cause=Cause.INTERNAL, message=f"driver's thread {name}: {text}"))

    def close(self) -> None:
        """The run is over."""
        self._closed.set()
        self._pulse.close()
        if self._starting is not None:
            self._starting.join(_STARTING_S)


def _dead(reason: str, failure: Failure | None, cause: str) -> Failure:
    """Why there is no controller any more."""
    if failure is None:
        text = f"the controller's process died {reason}: {cause}"
        return Failure(cause=Cause.INTERNAL, message=text)
    return replace(failure, message=f"the controller failed {reason}: {failure.message}")

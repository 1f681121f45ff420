"""Starts the controller's process, watches it, and restarts it when it dies or hangs."""

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

_STARTING_S = 10.0  # longest wait for a restart that is under way when the run ends


class ControllerLife:
    """Keeps one run's controller alive. Only ``start`` and ``close`` block.

    Args:
        launcher: Starts and kills the controller's process.
        timeouts: The run's timeouts.
        on_over: Called from any thread when the controller will not be restarted again.
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
        self._failure: Failure | None = None  # what the controller said of its own death
        self._hung = ""  # why the driver killed the controller
        self._on_purpose = False
        self._closed = threading.Event()
        self._starting: threading.Thread | None = None
        self._pulse = PulseWatch(
            limit_s=timeouts.controller_silent_s,
            on_hung=self._end_hung,
            on_death=self._thread_died,
        )

    def start(self, spec: ControllerSpec) -> int:
        """Start the first controller and wait until it listens. Returns its port.

        Raises:
            StartupError: The controller did not start.
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
        """Note a sign of life of the controller's event loop."""
        self._pulse.heard()

    def failed(self, failure: Failure) -> None:
        """Note the failure that the controller reports before its process ends."""
        with self._lock:
            self._failure = failure

    # ---- its death -----------------------------------------------------------------------------

    def strike(self) -> None:
        """Kill the controller as an injected fault; the death does not count against it."""
        with self._lock:
            self._on_purpose = True
        self._launcher.kill("controller")

    def _end_hung(self, silent_s: float) -> None:
        with self._lock:
            self._hung = f"its loop gave no sign for {silent_s:.1f} s"
        self._launcher.kill("controller")

    def died(self, cause: str) -> None:
        """Handle the end of the controller's process: restart it, or call ``on_over``."""
        self._pulse.gone()
        starting = self._starting
        if starting is not None and starting is not threading.current_thread():
            starting.join(1.0)  # it died while starting: ``_restart`` is about to note the failure
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
        """Start the next controller on the same journal and port; workers reconnect to it."""
        assert self._spec is not None
        if self._closed.wait(pause_s):
            return
        try:
            self._launcher.start_controller(self._spec, timeout_s=self._timeouts.startup_s)
        except ControllerDiedError as problem:
            if problem.failure:
                self.failed(Failure.from_json(problem.failure))
            return  # the launcher reports the end of this process, which calls ``died``
        except StartupError as problem:
            self.died(str(problem))
            return
        self._begins()

    def _thread_died(self, name: str, problem: BaseException) -> None:
        text = f"{type(problem).__name__}: {problem}"
        self._on_over(Failure(cause=Cause.INTERNAL, message=f"driver's thread {name}: {text}"))

    def close(self) -> None:
        """Stop watching and restarting the controller; does not end its process."""
        self._closed.set()
        self._pulse.close()
        if self._starting is not None:
            self._starting.join(_STARTING_S)


def _dead(reason: str, failure: Failure | None, cause: str) -> Failure:
    """The failure of a run whose controller is not restarted."""
    if failure is None:
        text = f"the controller's process died {reason}: {cause}"
        return Failure(cause=Cause.INTERNAL, message=text)
    return replace(failure, message=f"the controller failed {reason}: {failure.message}")

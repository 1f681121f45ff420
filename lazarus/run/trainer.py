"""``ElasticTrainer``, the Python API to start a run and get its result. Runs in the driver."""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from lazarus.callbacks.bus import CallbackBus
from lazarus.checkpoint.files.patience import patiently
from lazarus.checkpoint.files.retention import sweep
from lazarus.checkpoint.restoring.policy import RecoveryPolicy
from lazarus.config.train_config import TrainConfig
from lazarus.control.messages import RunOver
from lazarus.errors import CheckpointError, ConfigError, LazarusError, StoppedError
from lazarus.failure import Cause, Status
from lazarus.faults import FaultSpec
from lazarus.record.endings import (
    callback_failure,
    error_of,
    internal_failure,
    record_end,
    write_report,
)
from lazarus.record.events import FILE_NAME, each_event
from lazarus.record.record_repair import blank_damaged
from lazarus.run.control_config import keeps_checkpoints, policies_of
from lazarus.run.named_code import with_named
from lazarus.run.result import Result, leave_artifacts, result_of
from lazarus.run.run_place import RunPlace, open_place
from lazarus.run.run_spec import check_run, prepared, scratch_folder
from lazarus.run.signals import Signals
from lazarus.run.user_code import builder_of, pickled
from lazarus.runtime.controller.controller_end import went_along
from lazarus.runtime.driver.driver import Driver
from lazarus.runtime.launch.choose_launcher import launcher_of
from lazarus.runtime.spec import UserCode
from placement import PlacementPolicy

_HEARD = "Ctrl-C: the run stops after its next step; press it again to stop at once"


class RunHandle:
    """A run in a background thread of the driver's process, see ``ElasticTrainer.start``."""

    def __init__(self, work: Callable[[], Result], driver: Driver) -> None:
        self._driver = driver
        self._result: Result | None = None
        self._error: BaseException | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(work,), name="run")
        self._thread.start()

    def _run(self, work: Callable[[], Result]) -> None:
        try:
            self._result = work()
        except BaseException as error:  # noqa: BLE001 - raised again by wait()
            self._error = error
        finally:
            self._done.set()

    def stop(self, *, now: bool = False) -> None:
        """Stop the run.

        Args:
            now: True stops at once; False stops after the next commit, with a full checkpoint.
        """
        self._driver.stop(now=now, reason="stopped by the user")

    def start_node(self) -> str:
        """Start one more node of an embedded run and return its name."""
        return self._driver.start_node()

    def wait(self, timeout_s: float | None = None) -> Result:
        """Wait for the end of the run and return the result, or raise the run's exception.

        Args:
            timeout_s: Seconds to wait; None waits without limit.

        Raises:
            TimeoutError: The run is not over within ``timeout_s``.
        """
        if not self._done.wait(timeout_s):
            raise TimeoutError(f"the run is not over after {timeout_s} s")
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result


class ElasticTrainer:
    """Trains a model with MoE layers on nodes that may fail, leave and join during the run.

    ``model``, ``data``, ``collate``, ``loss``, ``optimizer``, ``schedule`` and ``hooks`` run in
    every worker. They are pickled once, when the trainer is made. ``callbacks`` run in the driver.

    Args:
        config: The configuration of the run.
        model: A function that builds the model in each worker; None: ``model.builder``, else
            ``config.model``.
        data: A map-style data source, or a function that opens one; None: ``data.source``, else
            ``config.data``.
        eval_data: Held-out data, like ``data``. Needed if ``eval.every`` and ``data`` are set.
        collate: Makes a micro-batch from a list of samples; None: tensors are stacked.
        loss: Maps (model, batch) to a ``LossSum``; None: ``train.loss``, else next-token
            cross-entropy.
        optimizer: Makes the optimizer from parameter groups; None: ``optim.builder``, else AdamW
            as configured.
        schedule: Maps a step to a learning-rate multiplier; None: as configured.
        callbacks: Objects that receive the run's events, see ``lazarus.callbacks``.
        hooks: Objects whose methods are called in every worker.
        placement: A placement policy; None: ``placement.policy``, else the built-in one.
        recovery: A policy for experts without a live replica (``lazarus.recovery``); None:
            ``recovery.policy``, else ``recovery.on_lost_expert``.
        faults: Scripted faults for tests, in addition to those of the configuration.

    Raises:
        ConfigError: The run cannot work with these arguments; nothing was started.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        model: Callable[[Any], nn.Module] | nn.Module | None = None,
        data: Any = None,
        eval_data: Any = None,
        collate: Callable[[list[Any]], Any] | None = None,
        loss: Callable[[nn.Module, Any], Any] | None = None,
        optimizer: Callable[[list[dict[str, Any]]], Any] | None = None,
        schedule: Callable[[int], float] | None = None,
        callbacks: Sequence[Any] = (),
        hooks: Sequence[Any] = (),
        placement: PlacementPolicy | None = None,
        recovery: RecoveryPolicy | None = None,
        faults: Sequence[str | FaultSpec] = (),
    ) -> None:
        self.config = config
        self._callbacks = tuple(callbacks)
        self.policies = policies_of(config, placement=placement, recovery=recovery)
        specs = tuple(dict.fromkeys(str(fault) for fault in (*config.faults.specs, *faults)))
        self.faults = specs
        given = {"model": builder_of(model), "data": data, "loss": loss, "optimizer": optimizer}
        functions = with_named(config, given)
        check_run(config, model=model, data=data, faults=specs)
        if config.eval.every and functions["data"] is not None and eval_data is None:
            raise ConfigError(
                f"eval.every={config.eval.every} needs held-out data; pass eval_data, or set "
                f"eval.every=0"
            )
        self.user = pickled(
            UserCode(
                eval_data=eval_data,
                collate=collate,
                schedule=schedule,
                hooks=tuple(hooks),
                **functions,
            )
        )

    def fit(
        self, *, resume: str | Path | None = None, allow_change: Collection[str] = ()
    ) -> Result:
        """Train until the last step, and return the result.

        Args:
            resume: None starts a new run. "auto" resumes the newest run of this name in its
                folder, or starts a new run if there is none. Otherwise a run's folder, or a folder
                or URL of checkpoints.
            allow_change: Keys (``section.key``) that may differ from the resumed run's.

        Raises:
            ConfigError: The run's folder belongs to another run, or the run cannot be resumed.
            UserCodeError: The user's model, data or loss raised.
            QuorumTimeoutError, LostExpertError: The run ended early and can be resumed.
            StoppedError: The run was stopped, for example by SIGTERM, and can be resumed.
            StorageError: A disk or an object store failed in a way the run cannot tolerate.
            InternalError: Lazarus itself failed; ``report`` names a file with the details.
            KeyboardInterrupt: Ctrl-C stopped the run; the record is complete.
        """
        place = open_place(self.config, resume=resume, allow_change=allow_change)
        return fit_at(self, place)

    def start(
        self, *, resume: str | Path | None = None, allow_change: Collection[str] = ()
    ) -> RunHandle:
        """Train in a background thread of this process; arguments as for ``fit``."""
        place = open_place(self.config, resume=resume, allow_change=allow_change)
        run = _Run(self, place)
        return RunHandle(run.work, run.driver)


def fit_at(trainer: ElasticTrainer, place: RunPlace) -> Result:
    """``trainer.fit`` with a folder that ``open_place`` has taken before."""
    return _Run(trainer, place).follow()


class _Run:
    """One run of a trainer. Gives ``place`` back when the run is over."""

    def __init__(self, trainer: ElasticTrainer, place: RunPlace) -> None:
        self._place = place
        self.run_id, self.run_dir, self._url = place.run_id, place.folder, place.url
        config = place.config
        self._leaves_report = config.metrics.report
        self._scratch = scratch_folder(place)
        self._bus = CallbackBus(trainer._callbacks, fail=config.metrics.on_callback_error == "fail")
        try:
            spec = prepared(
                place,
                policies=trainer.policies,
                faults=trainer.faults,
                user=trainer.user,
                scratch=self._scratch,
            )
            place.write_config()
            quiet = config.metrics.progress in ("off", "json")
            self.driver = Driver(
                spec,
                partial(launcher_of, config),
                self._bus.publish,
                say=partial(_say, is_quiet=quiet),
            )
        except BaseException:
            self._forget()
            raise
        self._is_owner = True
        place.ownership.on_lost = self._lost_folder
        self._bus.on_failure = lambda problem: self.driver.fail(callback_failure(problem))

    def _lost_folder(self, reason: str) -> None:
        """Abandon the run: its folder was removed or taken, so nothing may be written there."""
        self._is_owner = False
        nothing_stands = not self.run_dir.is_dir() and went_along(self._url, self.run_dir)
        status: Status = "failed" if nothing_stands else "short"
        self.driver.abandon(reason, cause=Cause.STORAGE, status=status)

    def _forget(self) -> None:
        """Remove all files of a run that was not started, and give its folder back."""
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._bus.close()
        self._place.leave()

    def follow(self) -> Result:
        """Call ``work`` in a thread, while this thread handles Ctrl-C and SIGTERM.

        Raises:
            KeyboardInterrupt, StoppedError: The run was stopped by Ctrl-C or SIGTERM.
        """
        outcome: list[Result | BaseException] = []
        done = threading.Event()

        def body() -> None:
            try:
                outcome.append(self.work())
            except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
                outcome.append(error)
            finally:
                done.set()

        thread = threading.Thread(target=body, name="run")
        thread.start()
        asked = self._wait(done)
        thread.join()
        result = outcome[0]
        as_asked = isinstance(result, StoppedError) or getattr(result, "status", "") == "stopped"
        if asked and as_asked:
            raise type(asked)(self._stopped_text(asked)) from None
        if isinstance(result, BaseException):
            raise result
        return result

    def _stopped_text(self, asked: BaseException) -> str:
        """A message with the last step of a run that was asked to stop."""
        step = 0
        for event in each_event(self.run_dir):
            step = int(event["steps"]) if event["event"] == "run_finished" else step
        return f"{asked} at step {step:,}; go on with --resume auto"

    def _wait(self, done: threading.Event) -> BaseException | None:
        """Wait for the end and handle signals; return the exception of the last signal, if any.

        SIGTERM or one Ctrl-C stops the run at the next commit, a second Ctrl-C at once, a third
        abandons the run without waiting for the controller.
        """
        interrupts = terminations = 0
        stopped: BaseException | None = None
        with Signals() as heard:
            while not done.is_set():
                try:
                    done.wait(0.2)
                except KeyboardInterrupt:  # raised by the caller's own signal handler
                    heard.interrupts += 1
                if heard.terminations > terminations:
                    terminations = heard.terminations
                    stopped = StoppedError("stopped by SIGTERM")
                    self.driver.stop(now=False, reason="SIGTERM", preempted=True)
                while interrupts < heard.interrupts:
                    interrupts += 1
                    stopped = KeyboardInterrupt("stopped by Ctrl-C")
                    if interrupts == 1:
                        _say(_HEARD, is_quiet=False)
                    self.driver.stop(now=interrupts > 1, reason="Ctrl-C")
                    if interrupts > 2:
                        self.driver.abandon("Ctrl-C")
        return stopped

    def _sweep(self) -> None:
        """Delete unfinished checkpoint files, after all processes of the run have ended."""
        if not keeps_checkpoints(self._place.config):
            return
        start = self._place.start
        runs = (*(() if start is None else start.lives), self.run_id)
        with suppress(CheckpointError):
            patiently(
                lambda: sweep(self._url, runs=runs),
                for_s=0.0,
                stuck_s=self._place.config.timeouts.storage_stuck_s,
                place=self._url,
                operation="sweep",
            )

    def work(self) -> Result:
        """Run the driver, complete the record, and return the result or raise the failure."""
        try:
            over, problem = self._ran()
            failure = over.failure
            if self._is_owner:
                self._mend_record()
                if failure is not None and failure.cause is Cause.INTERNAL:
                    failure = replace(failure, report=write_report(self.run_dir, failure))
                record_end(self.run_dir, status=over.status, failure=failure)
        except ConfigError:
            self._leaves_report = False
            self._forget()
            raise
        finally:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._bus.close()
            self._sweep()
            if self._leaves_report:
                leave_artifacts(self.run_dir)
            self._place.release()
        if failure is not None:
            if isinstance(problem, LazarusError):
                raise problem
            raise error_of(failure, status=over.status) from problem
        return result_of(over, run_id=self.run_id, run_dir=self.run_dir, url=self._url)

    def _mend_record(self) -> None:
        """Blank damaged lines of the record, after its writer has ended."""
        with suppress(OSError, ValueError):  # no record, or not readable
            for damaged in blank_damaged(self.run_dir / FILE_NAME):
                print(f"warning: {damaged}", file=sys.stderr, flush=True)

    def _ran(self) -> tuple[RunOver, BaseException | None]:
        """The controller's message about the end, or the driver's own failure and exception."""
        try:
            return self.driver.run(), None
        except ConfigError:
            raise
        except BaseException as problem:  # noqa: BLE001 - an end like any other, recorded below
            failure = internal_failure(problem, what="the driver failed")
            if isinstance(problem, LazarusError):
                failure = replace(failure, message=str(problem))
            return RunOver(status="failed", failure=failure), problem


def _say(text: str, *, is_quiet: bool) -> None:
    if not is_quiet:
        print(text, file=sys.stderr, flush=True)

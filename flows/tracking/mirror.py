"""The mirror of a run in MLflow: a process that is sent the number of every committed state. Training never waits for it.

A process, not a thread: MLflow takes seconds to import and milliseconds for every metric, all of it Python, and a thread
would take them from the training.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable

from flows.orchestration import page
from flows.runs.best import check_best
from flows.runs.run import Run, lease_key
from flows.store.lease import lease
from flows.tracking.tracking_uri import note_mirrored, tracking_uri
from schemas.addresses import without_user_info
from schemas.artifacts import TrainState
from schemas.errors import ConfigError, TrackingError
from stages.ops.progress import progress_bar

log = logging.getLogger("baton")
PATIENCE = 30.0  # seconds that the end of a run waits for the mirror


def sync(run: Run) -> int:
    """Brings MLflow to all that the run has, however long that takes; how many states. Raises `TrackingError`."""
    check_best(run.config)
    last = run.last()
    if last is None:
        raise ConfigError(f"run {run.name!r} is not prepared yet; go on with baton train")
    with (lease(run.store, lease_key(run.name), f"run {run.name!r}"),
          progress_bar(total=last.iteration, desc="mlflow-sync") as bar,
          Mirror(run, until_done=True, at=lambda iteration: bar.update(iteration - bar.n)) as mirror):
        mirror.push(last)
    if mirror.error:
        raise TrackingError(f"MLflow at {without_user_info(tracking_uri(run))}: {mirror.error}")
    return last.iteration + 1


class Mirror:
    """Sends `flows.tracking.client`, in a process of its own, the number of each committed state; best effort.

    `until_done`: whatever the config says, and for as long as it takes; `error` is then what went wrong, if anything did.
    `at` is called with the last iteration that is there, as it moves.
    """

    def __init__(self, run: Run, until_done: bool = False, at: Callable[[int], object] = lambda iteration: None) -> None:
        self.run, self.until_done, self.at = run, until_done, at
        self.error: str | None = None
        self._process: subprocess.Popen | None = None
        self._pushed: int | None = None  # the last iteration that was sent
        self._reached: int | None = None  # and that MLflow has

    def __enter__(self) -> Mirror:
        if self.run.config.tracking.enabled or self.until_done:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "flows.tracking.client", self.run.store.uri], text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                start_new_session=True)  # Ctrl-C is not for it
            here = contextvars.copy_context()  # in which Prefect's log knows the flow run
            self._listener = threading.Thread(target=here.run, args=(self._listen,), name="mlflow", daemon=True)
            self._listener.start()
            begin = {"uri": tracking_uri(self.run), "live": not self.until_done,
                     "record": self.run.record.model_dump(mode="json"),
                     "config": self.run.config.model_dump(mode="json")}
            self._send(json.dumps(begin))  # not as an argument: an address may hold a password
        return self

    def push(self, state: TrainState) -> None:
        """Has the state mirrored, and whatever of the run MLflow does not have yet."""
        self._pushed = state.iteration
        self._send(str(state.iteration))

    def __exit__(self, *_: object) -> None:
        if self._process is None:
            return
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(None if self.until_done else PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._warn("it did not answer in time")
        self._listener.join()
        if not self.error and self._reached == self._pushed is not None:
            with contextlib.suppress(OSError):
                note_mirrored(self.run, self._pushed)
        if self._process.wait() and not self.error:
            self._warn(f"its process ended with code {self._process.returncode}; python -m flows.tracking.client shows why")

    def _send(self, line: str) -> None:
        if self._process is not None:
            with contextlib.suppress(BrokenPipeError):  # it has printed why, and ended
                print(line, file=self._process.stdin, flush=True)

    def _listen(self) -> None:
        """`page …`: where the run is, on a server; `at …`: the last iteration that is there; `whole …`: that all is
        there up to it; `error …`: what went wrong; `recovered`: that it goes on after all."""
        for line in self._process.stdout:
            word, _, what = line.strip().partition(" ")
            if word == "page":
                page.link(self.run, what)
            elif word == "at":
                self.at(int(what))
            elif word == "whole":
                self._reached = int(what)
            elif word == "recovered":
                self.error = None
                if not self.until_done:
                    log.info("MLflow at %s is reached again; nothing is left out", self._address)
            else:
                self._warn(what)

    @property
    def _address(self) -> str:
        return without_user_info(tracking_uri(self.run))

    def _warn(self, what: str) -> None:
        self.error = without_user_info(what)
        if not self.until_done:
            log.warning("MLflow at %s: %s; training goes on without it, and it is tried again; baton mlflow-sync %s "
                        "completes it afterwards", self._address, self.error, self.run.name)

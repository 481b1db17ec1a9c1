"""The mirror of a run in MLflow: a process that is told of every committed state. Training never waits for it.

A process, not a thread: MLflow takes seconds to import and milliseconds for every metric, all of it Python, and a thread
would take them from the training.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import logging
import os
import subprocess
import sys
import threading

from flows.orchestration import page
from flows.runs.run import Run
from flows.store.lease import lease
from schemas.addresses import without_user_info
from schemas.artifacts import TrainState
from schemas.errors import ConfigError, TrackingError

log = logging.getLogger("baton")
PATIENCE = 30.0  # seconds that the end of a run waits for the mirror


def tracking_uri(run: Run) -> str:
    """Of the config, the environment, or sqlite beside the artifacts."""
    default = f"sqlite:///{(run.store.files.beside / 'mlflow.db').resolve()}"
    return run.config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or default


def how_to_open(run: Run) -> str:
    """The command, or the address, where a person sees the runs."""
    uri = without_user_info(tracking_uri(run))
    return f"mlflow ui --backend-store-uri {uri}" if uri.startswith("sqlite:") else uri


def sync(run: Run) -> int:
    """Brings MLflow to all that the run has, however long that takes; how many states. Raises `TrackingError`."""
    last = run.last()
    if last is None:
        raise ConfigError(f"run {run.name!r} is not prepared yet; go on with baton train")
    with lease(run.store, run.name), Mirror(run, in_earnest=True) as mirror:  # beside a training both would log
        mirror.push(last)
    if mirror.wrong:
        raise TrackingError(f"MLflow at {without_user_info(tracking_uri(run))}: {'; '.join(mirror.wrong)}")
    return len(run.iterations())


class Mirror:
    """Tells `flows.tracking.client`, in a process of its own, which states are committed; it does the rest, best effort.

    `in_earnest`: whatever the config says, and for as long as it takes; `wrong` is then what went wrong.
    """

    def __init__(self, run: Run, in_earnest: bool = False) -> None:
        self.run, self.in_earnest = run, in_earnest
        self.wrong: list[str] = []
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> Mirror:
        if self.run.config.tracking.enabled or self.in_earnest:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "flows.tracking.client", self.run.store.uri, self.run.name], text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                start_new_session=True)  # Ctrl-C is not for it
            here = contextvars.copy_context()  # in which Prefect's log knows the flow run
            self._ears = threading.Thread(target=here.run, args=(self._listen,), name="mlflow", daemon=True)
            self._ears.start()
            told = {"uri": tracking_uri(self.run), "config": self.run.config.model_dump(mode="json")}
            self._tell(json.dumps(told))  # not as an argument: an address may hold a password
        return self

    def push(self, state: TrainState) -> None:
        """Has the state mirrored, and whatever of the run MLflow does not have yet."""
        self._tell(str(state.iteration))

    def __exit__(self, *_: object) -> None:
        if self._process is None:
            return
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(None if self.in_earnest else PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._warn("it did not answer in time")
        self._ears.join()
        if self._process.wait() and not self.wrong:
            self._warn(f"the process that tells it ended with code {self._process.returncode}; "
                       "python -m flows.tracking.client says more")

    def _tell(self, line: str) -> None:
        if self._process is not None:
            with contextlib.suppress(BrokenPipeError):  # it has said why, and is gone
                print(line, file=self._process.stdin, flush=True)

    def _listen(self) -> None:
        """`page …` says where the run is, on a server; `wrong …` what went wrong."""
        for line in self._process.stdout:
            word, _, what = line.strip().partition(" ")
            if word == "page":
                page.link(self.run, what)
            else:
                self._warn(what)

    def _warn(self, what: str) -> None:
        self.wrong.append(without_user_info(what))
        if not self.in_earnest:
            log.warning("MLflow at %s: %s; training goes on without it, baton mlflow-sync %s completes it",
                        without_user_info(tracking_uri(self.run)), self.wrong[-1], self.run.name)

"""The mirror of a run in MLflow: a thread that is told of every committed state. Training never waits for it."""

from __future__ import annotations

import logging
import os
import queue
import threading

from flows.runs import Run
from schemas.artifacts import TrainState

log = logging.getLogger("baton")
PATIENCE = 20.0  # seconds that the end of a run waits for the mirror


def tracking_uri(run: Run) -> str:
    """Of the config, the environment, or sqlite beside the artifacts."""
    default = f"sqlite:///{(run.store.root / 'mlflow.db').resolve()}"
    return run.config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or default


def how_to_open(run: Run) -> str:
    """The command, or the address, where a person sees the runs."""
    uri = tracking_uri(run)
    return f"mlflow ui --backend-store-uri {uri}" if uri.startswith("sqlite:") else uri


class Mirror:
    """Takes states as they are committed and brings MLflow to them, in a thread of its own, best effort."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._states: queue.Queue[TrainState | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)

    def __enter__(self) -> Mirror:
        if self.run.config.tracking.enabled:
            self._thread.start()
        return self

    def push(self, state: TrainState) -> None:
        """Has the state mirrored, and whatever of the run MLflow does not have yet."""
        self._states.put(state)

    def __exit__(self, *_: object) -> None:
        if not self._thread.is_alive():
            return
        self._states.put(None)
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            log.warning("MLflow at %s did not answer in time; the next start of the run completes it",
                        tracking_uri(self.run))

    def _work(self) -> None:
        """Passes states on until the last; after a failure the rest is left to the next start."""
        try:
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # without these a call waits four minutes
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
            from flows.tracking import Client  # MLflow takes seconds to import; the training does not wait for that

            client = Client(self.run, tracking_uri(self.run))
            while (state := self._states.get()) is not None:
                client.bring_to(state)
        except Exception as error:  # whatever a tracking server does, the training goes on
            log.warning("MLflow at %s: %s; training goes on without it, the next start of the run completes it",
                        tracking_uri(self.run), _first_line(error))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]

"""How this machine is used while a run trains, as MLflow's system metrics: a thread of MLflow's, every ten seconds."""

from __future__ import annotations

import threading

import mlflow
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

THREAD = "SystemMetricsMonitor"  # as MLflow names it


class Machine:
    """Processors, memory, disk, network, and GPUs where nvidia-ml-py is installed."""

    def __init__(self, client: mlflow.MlflowClient, uri: str) -> None:
        self.client, self.uri = client, uri
        self._monitor: SystemMetricsMonitor | None = None

    def watch(self, run_id: str) -> None:
        """Begins, or begins again after an error, which ends MLflow's thread for good."""
        if any(thread.name == THREAD for thread in threading.enumerate()):
            return
        self.client.update_run(run_id, "RUNNING")  # of a finished run nothing is read
        self._monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=self.uri)
        self._monitor.start()

    def end(self) -> None:
        """Ends the thread. What it has read since the last ten seconds were over is left out, as MLflow does."""
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None

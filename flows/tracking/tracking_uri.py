"""Which MLflow a run is mirrored to, and how a person opens it."""

from __future__ import annotations

import os

from flows.runs.run import Run
from schemas.addresses import without_user_info


def tracking_uri(run: Run) -> str:
    """Of the config, the environment, or sqlite beside the artifacts."""
    default = f"sqlite:///{(run.store.files.beside / 'mlflow.db').resolve()}"
    return run.config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or default


def how_to_open(run: Run) -> str:
    """The command, or the address, where a person sees the runs."""
    uri = without_user_info(tracking_uri(run))
    return f"mlflow ui --backend-store-uri {uri}" if uri.startswith("sqlite:") else uri

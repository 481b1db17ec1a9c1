"""Which MLflow a run is mirrored to, and how a person opens it."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from urllib.parse import quote, unquote

from flows.runs.run import Run
from schemas.addresses import without_user_info


def tracking_uri(run: Run) -> str:
    """Of the config, the environment, or sqlite beside the artifacts."""
    return run.config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or _beside(run.store.files.beside / "mlflow.db")


def _beside(database: Path) -> str:
    """Its address; where a name holds `?`, at which a plain one would end, in the form that quotes it."""
    path = str(database.resolve())
    return f"sqlite:///file:{quote(path)}?uri=true" if "?" in path else f"sqlite:///{path}"


def folder_of(uri: str) -> Path:
    """Where the database of such an address lies."""
    path = uri.removeprefix("sqlite:///")
    path = unquote(path.removeprefix("file:").partition("?")[0]) if path.startswith("file:") else path
    return Path(path).resolve().parent


def how_to_open(run: Run) -> str | None:
    """The command, or the address, where a person sees the runs; none where they are not mirrored."""
    if not run.config.tracking.enabled:
        return None
    uri = without_user_info(tracking_uri(run))
    return f"mlflow ui --backend-store-uri {shlex.quote(uri)}" if uri.startswith("sqlite:") else uri

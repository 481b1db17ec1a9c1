"""Which MLflow a run is mirrored to, and how a person opens it."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from pathlib import Path
from typing import Any
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


def database_of(uri: str) -> Path:
    """The file of such an address."""
    path = uri.removeprefix("sqlite:///")
    path = unquote(path.removeprefix("file:").partition("?")[0]) if path.startswith("file:") else path
    return Path(path).resolve()


def note_mirrored(run: Run, iteration: int) -> None:
    """Keeps beside the store that MLflow has the run whole up to that iteration, so that a later command need not ask."""
    file = _note_of(run)
    file.parent.mkdir(exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    partial.write_text(json.dumps(_note(run, iteration)), encoding="utf-8")
    partial.replace(file)


def is_mirrored(run: Run, iteration: int) -> bool:
    """Whether that is known of the MLflow that is named now."""
    uri = tracking_uri(run)
    if uri.startswith("sqlite:") and not database_of(uri).is_file():
        return False
    try:
        return json.loads(_note_of(run).read_text(encoding="utf-8")) == _note(run, iteration)
    except (OSError, ValueError):
        return False


def _note_of(run: Run) -> Path:
    return run.store.files.beside / "mirrored" / f"{run.name}.json"


def _note(run: Run, iteration: int) -> dict[str, Any]:
    uri = tracking_uri(run)
    database = database_of(uri).stat().st_ino if uri.startswith("sqlite:") and database_of(uri).is_file() else None
    return {"database": database,
            "uri": hashlib.sha256(uri.encode()).hexdigest(), "experiment": run.config.tracking.experiment,
            "created": run.record.created, "iteration": iteration}


def how_to_open(run: Run) -> str | None:
    """The command, or the address, where a person sees the runs; none where they are not mirrored."""
    if not run.config.tracking.enabled:
        return None
    uri = without_user_info(tracking_uri(run))
    return f"mlflow ui --backend-store-uri {shlex.quote(uri)}" if uri.startswith("sqlite:") else uri

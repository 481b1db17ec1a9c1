"""Models and data sets on Hugging Face's hub: a snapshot of some of their files, at a commit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from schemas.errors import ConfigError

OTHERS = {"value.start": ", nor reward_model or actor,"}  # what else a setting may be


def download(
    setting: str, source: str, place: Path, patterns: Sequence[str], kind: Literal["model", "dataset"] = "model"
) -> Path:
    """The snapshot of `org/name` or `org/name@revision`, those files of it. Raises `ConfigError`.

    `place`: where it would be if it were a folder, for messages.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = source.partition("@")
    try:
        return Path(snapshot_download(name, repo_type=kind, revision=revision or None, allow_patterns=list(patterns)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"{setting}: {source!r} is no folder ({place}){OTHERS.get(setting, '')} and the hub gave: {reason}"
                          ) from None


def commit_of(path: Path) -> str | None:
    """The commit of the snapshot that a file is of, none if it is of none."""
    return next((place.name for place in (path, *path.parents) if place.parent.name == "snapshots"), None)

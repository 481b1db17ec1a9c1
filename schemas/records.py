"""Records: the JSON files of a store. How they are written, so that one wrong bit is noticed, and how they are read again.

    {"format_version": 3, "baton": "0.1.0", "sha256": "…", …the fields of the record…}

`sha256` is that of the file's own bytes with its 64 digits taken as zeros. Format 1 had neither it nor `baton`; it is read
as it is. Format 2 had manifests without outputs and calls, which schemas/artifacts.py fills in. The first three fields are
those of every format to come, so that a newer one can be told from a damaged one.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from datetime import UTC, datetime
from functools import cache
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from schemas.errors import DISTRIBUTION, DamageError

FORMAT_VERSION = 7
UNSIGNED = b"0" * 64
HINT = "baton verify names the remedy"
M = TypeVar("M", bound=BaseModel)


def encode(record: BaseModel) -> bytes:
    """The record as it is written."""
    header = f'{{\n "format_version": {FORMAT_VERSION},\n "baton": "{version()}",\n "sha256": "{UNSIGNED.decode()}",'
    text = (header + record.model_dump_json(indent=1)[1:] + "\n").encode()
    return text.replace(UNSIGNED, hashlib.sha256(text).hexdigest().encode(), 1)


def decode(data: bytes, where: str, kind: type[M]) -> M:
    """The inverse of `encode`. Raises `DamageError` naming file and field."""
    try:
        values = json.loads(data)
    except ValueError as error:
        raise DamageError(where, "content", "JSON", f"{len(data)} bytes that are not: {error}", HINT) from None
    if not isinstance(values, dict):
        raise DamageError(where, "content", "an object", type(values).__name__, HINT)
    header = {key: values.pop(key, None) for key in ("format_version", "baton", "sha256")}
    if header["format_version"] != 1 or header["sha256"] or header["baton"]:
        _check_digest(data, where, header["sha256"])
        _check_version(where, header)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        finding = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in finding["loc"]) or "content"
        raise DamageError(where, field, finding["msg"], repr(finding["input"])[:80], HINT) from None


def first_finding(error: ValidationError) -> str:
    """The first of pydantic's findings in a line: key and message."""
    finding = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in finding["loc"])
    return f"{key}: {finding['msg']}" if key else finding["msg"]


def _check_digest(data: bytes, where: str, signed: object) -> None:
    if not isinstance(signed, str) or not re.fullmatch(f"[0-9a-f]{{{len(UNSIGNED)}}}", signed):
        raise DamageError(where, "sha256", "the digest of the file", repr(signed)[:80], HINT)
    actual = hashlib.sha256(data.replace(signed.encode(), UNSIGNED, 1)).hexdigest()
    if actual != signed:
        raise DamageError(where, "sha256", f"{signed[:12]}…", f"{actual[:12]}…", HINT)


def _check_version(where: str, header: dict) -> None:
    found, writer = header["format_version"], header["baton"]
    if found not in range(2, FORMAT_VERSION + 1):
        raise DamageError(where, "format_version", f"at most {FORMAT_VERSION}, for Baton {version()}",
                          f"{found}, written by Baton {writer}", f"use Baton {writer} or a newer one")


@cache
def version() -> str:
    """Baton's own."""
    return importlib.metadata.version(DISTRIBUTION)


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")

"""Digests of files: SHA-256; of the weights that a stage writes BLAKE3, which takes a quarter of the time."""

from __future__ import annotations

import hashlib
from pathlib import Path

from blake3 import blake3

from schemas.artifacts import Algorithm, Manifest

HASHES = {"sha256": hashlib.sha256, "blake3": blake3}


class Hash:
    """Of bytes that are given piece by piece."""

    def __init__(self, algorithm: Algorithm) -> None:
        self._prefix = "" if algorithm == "sha256" else f"{algorithm}:"
        self._hash = HASHES[algorithm]()

    def update(self, piece: bytes | memoryview) -> None:
        self._hash.update(piece)

    def digest(self) -> str:
        """As it is written in a manifest."""
        return self._prefix + self._hash.hexdigest()


def sha256_file(path: Path) -> str:
    """Of a file's bytes, in hex."""
    return file_digest(path, "sha256")


def file_digest(path: Path, algorithm: Algorithm) -> str:
    """Of a file's bytes, as it is written in a manifest."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: Hash(algorithm)).digest()


def algorithm_of_weights(manifest: Manifest) -> Algorithm:
    """By which the weights of an artifact were hashed; before format 7 it was SHA-256."""
    return "blake3" if any(entry.algorithm == "blake3" for entry in manifest.files) else "sha256"

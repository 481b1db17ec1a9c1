"""A model's folder or GGUF file before anything is loaded from it: whole weights, and of a folder not quantised ones."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from schemas.errors import ConfigError, installed_by

POINTER = b"version https://git-lfs"
HEADER = 8  # bytes that hold the length of a safetensors header


def check_model_files(place: Path) -> None:
    """Raises `ConfigError` naming the file, what is wrong with it, and the way on."""
    config = _read_json(place / "config.json")
    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method", "?") if isinstance(quantized, dict) else "?"
        raise ConfigError(f"{place} is quantised ({method}, quantization_config in config.json), and "
                          "what is trained is float32: take the weights from before quantisation")
    for file in sorted(place.glob("*.safetensors")):
        _require_whole(file)
    index = place / "model.safetensors.index.json"
    if index.is_file():
        named = set(_read_json(index).get("weight_map", {}).values())
        if missing := sorted(name for name in named if not (place / name).is_file()):
            raise ConfigError(f"{index} names {len(missing)} files that are not there: {missing[0]}; "
                              "download the folder again")


def check_gguf(file: Path) -> None:
    """Raises `ConfigError` naming what is wrong with it, and the way on."""
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ConfigError(f"{file} is no GGUF file: it does not begin with GGUF; download it again")
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(f"{file}: reading GGUF needs the package gguf: {installed_by('gguf')}")
    from gguf import GGUFReader

    try:
        parts = GGUFReader(file).get_field("split.count")
    except Exception as error:  # whatever NumPy makes of a file that ends early
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"{file} was cut short or changed ({file.stat().st_size} bytes): {reason}; download it "
                          "again") from None
    if parts is not None and parts.contents() > 1:
        raise ConfigError(f"{file} is one of {parts.contents()} parts: llama-gguf-split --merge joins them")


def _require_whole(file: Path) -> None:
    """By its header alone, so that gigabytes are not read."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        begin = stream.read(len(POINTER))
        if begin == POINTER:
            raise ConfigError(f"{file} is a pointer of Git LFS, not the weights: run git lfs pull")
        stream.seek(0)
        length = int.from_bytes(stream.read(HEADER), "little")
        header = stream.read(length) if length <= size - HEADER else b""
    try:
        ends = [entry["data_offsets"][1] for name, entry in json.loads(header).items() if name != "__metadata__"]
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ConfigError(f"{file} is no safetensors file, or was cut short ({size} bytes): download it "
                          "again") from None
    expected = HEADER + length + max(ends, default=0)
    if size != expected:
        raise ConfigError(f"{file} has {size} bytes, its header says {expected}: it was cut short or "
                          "changed; download it again")


def _read_json(file: Path) -> dict:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: expected an object, found {type(values).__name__}")
    return values

"""Inputs from outside, at random: configs, rows, models, records, tables, replies, templates, arguments. `make fuzz`.

Each target is given an input and may refuse it, as a `BatonError` or by an exit code; other exceptions are faults. Half of
the inputs are documents that are right, changed in a few places. Faults are kept in tests/corpus, which tests/test_fuzz.py
runs on every change.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import hashlib
import io
import json
import logging
import os
import random
import shutil
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import yaml
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

CORPUS = Path(__file__).parent / "corpus"
DATA = Path(__file__).parents[1] / "data"
FORMATS = Path(__file__).parent / "formats"

# --- inputs ---

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=6)


TROUBLE = (b"\x00", b"\xff", b"{", b"]", b"\\ud800", b"1e999")


@st.composite
def changed(draw: st.DrawFn, valid: bytes) -> bytes:
    """The document with some bytes replaced, taken out or put in."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 8))
        data[at : at + length] = draw(st.binary(max_size=8) | st.sampled_from(TROUBLE))
    return bytes(data)


@st.composite
def changed_json(draw: st.DrawFn, valid: object) -> object:
    """The document with a value replaced, a key taken out or put in, somewhere."""
    if isinstance(valid, dict) and valid and draw(st.integers(0, 5)):
        key = draw(st.sampled_from(sorted(valid)))
        how = draw(st.integers(0, 5))
        if how == 0:
            return {name: value for name, value in valid.items() if name != key}
        if how == 1:
            return {**valid, draw(st.text(max_size=8)): draw(JSON)}
        return {**valid, key: draw(changed_json(valid[key]))}
    if isinstance(valid, list) and valid and draw(st.integers(0, 3)):
        at = draw(st.integers(0, len(valid) - 1))
        return [*valid[:at], draw(changed_json(valid[at])), *valid[at + 1 :]]
    return draw(JSON)


def as_bytes(value: object) -> bytes:
    return json.dumps(value).encode()


# --- what is right, to be changed ---

@cache
def folder() -> Path:
    """A place for files, gone with the process."""
    place = Path(tempfile.mkdtemp(prefix="baton-fuzz-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return place


@cache
def store() -> Path:
    """A store that an older version made."""
    shutil.unpack_archive(FORMATS / "3.tar.gz", folder() / "format")
    (found,) = (path.parent for path in (folder() / "format").rglob("runs"))
    return found


@cache
def manifest() -> Path:
    return sorted(store().glob("artifacts/gae/*/manifest.json"))[0]


@cache
def table() -> bytes:
    return sorted(store().glob("artifacts/gae/*/attempts/*/*.parquet"))[0].read_bytes()


@cache
def record() -> Path:
    return sorted(store().glob("runs/*/run.json"))[0]


@cache
def call() -> dict:
    from flows.runs.run import open_run
    from flows.store.store import Store

    run = open_run(Store(store()), record().parent.name)
    return run.call("gae", 1, {"gamma": 1.0}, rollouts=run.state(1).artifacts["rollout"]).model_dump(mode="json")


def signed(data: object) -> bytes:
    """A record as a bug would write it: with the right digest."""
    values = {**data, "sha256": "0" * 64} if isinstance(data, dict) else data
    text = json.dumps(values).encode()
    return text.replace(b"0" * 64, hashlib.sha256(text).hexdigest().encode(), 1)


# --- targets ---

def config(data: bytes) -> None:
    from flows.runs.inputs import read_config

    (folder() / "config.yaml").write_bytes(data)
    read_config(str(folder() / "config.yaml"))


def setting(data: bytes) -> None:
    from flows.runs.inputs import read_config

    read_config(str(DATA / "reviews"), [data.decode("utf-8", "replace")])


def rows(data: bytes) -> None:
    from flows.runs.layouts import Layout
    from flows.runs.rows import table_of
    from flows.runs.sources import source_rows
    from schemas.data import SourceConfig

    (folder() / "rows.jsonl").write_bytes(data)
    source = SourceConfig(source="rows.jsonl", turns={"user": "U:", "assistant": "A:"}, system="S", ties="drop")
    table_of(Layout("pairs", source, True).rows(source_rows("pairs", source, [folder() / "rows.jsonl"])))


def model(data: bytes) -> None:
    """Some of the files in a model's folder, as JSON by name."""
    from flows.language.check_model import check_model

    place = _model()
    with contextlib.suppress(ValueError, AttributeError):  # no such document: the folder is whole
        for name, values in json.loads(data).items():
            if name in MODEL_FILES:
                (place / name).write_text(json.dumps(_small(values)))
    check_model("base_model.source", place)


def weights(data: bytes) -> None:
    from flows.language.check_model import check_model

    place = _model()
    (place / "model.safetensors").write_bytes(data)
    check_model("base_model.source", place)


MODEL_FILES = ("config.json", "generation_config.json", "tokenizer_config.json")


def _model() -> Path:
    """A folder that is whole."""
    from brought import make_model

    place = folder() / "model"
    if not place.exists():
        make_model(hidden_size=8, intermediate_size=8, num_hidden_layers=1).save_pretrained(folder() / "whole")
        _tokenizer().save_pretrained(folder() / "whole")
    shutil.copytree(folder() / "whole", place, dirs_exist_ok=True)
    return place


def _small(value: object) -> object:
    """The same with no number that would only take memory."""
    if isinstance(value, dict):
        return {name: _small(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_small(inner) for inner in value]
    return value % 2048 if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 2048 else value


@cache
def model_files() -> dict:
    return {name: json.loads((_model() / name).read_text()) for name in MODEL_FILES}


def a_manifest(data: bytes) -> None:
    from schemas.artifacts import Manifest, call_of
    from schemas.records import decode

    call_of(decode(data, "manifest.json", Manifest), "store")


def a_record(data: bytes) -> None:
    from flows.runs.run import open_run
    from flows.store.store import Store

    place = folder() / "records" / "runs" / "x" / "run.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(data)
    open_run(Store(folder() / "records"), "x")


def a_table(data: bytes) -> None:
    from flows.store.store import read_table
    from schemas.artifacts import FileEntry, Manifest
    from schemas.records import decode
    from schemas.tables import Advantages

    rows = decode(manifest().read_bytes(), "manifest.json", Manifest).files[0].rows
    (folder() / "table.parquet").write_bytes(data)
    read_table(folder() / "table.parquet", FileEntry(path="x", bytes=1, digest="0" * 64, rows=rows), Advantages)


def a_call(data: bytes) -> None:
    from flows.perform import read_call

    (folder() / "call.json").write_bytes(data)
    read_call(folder() / "call.json")


def template(data: bytes) -> None:
    from stages.ops.prompts import render

    tokenizer = _tokenizer()
    tokenizer.chat_template = data.decode("utf-8", "replace")
    render(tokenizer, "The soup", True)


@cache
def _tokenizer():
    sys.path.insert(0, str(Path(__file__).parent))
    from brought import make_tokenizer

    return make_tokenizer()


def reply(data: bytes) -> None:
    """The first two bytes are the status."""
    from stages.ops.reward_server import RewardServer

    handler, url = _server()
    handler.status, handler.data = 100 + int.from_bytes(data[:2], "big") % 500, data[2:]
    RewardServer(url, tries=1, timeout=2)(_rollouts())


@cache
def _server():
    class Handler(BaseHTTPRequestHandler):
        status, data = 200, b""

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(self.status)
            self.send_header("Content-Length", str(len(self.data)))
            self.end_headers()
            with contextlib.suppress(BrokenPipeError):
                self.wfile.write(self.data)

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    return Handler, f"http://127.0.0.1:{http.server_port}/"


@cache
def _rollouts():
    import numpy as np

    from schemas.tables import Ragged
    from stages.ops.texts import Texts

    tokens = Ragged.from_rows([np.array([1])] * 2, np.int32)
    return Texts(np.arange(2), ("a", "b"), ("c", "d"), tokens, tokens)


def function(data: bytes) -> None:
    from flows.runs.functions import function_files

    function_files(data.decode("utf-8", "replace"), DATA / "reviews")


def tokens(data: bytes) -> None:
    from flows.language.server_access import server_token

    os.environ["BATON_REWARD_TOKEN"] = data.decode("utf-8", "replace").replace("\x00", "")
    try:
        server_token("https://a.org/score")
    finally:
        del os.environ["BATON_REWARD_TOKEN"]


def arguments(data: bytes) -> None:
    """Words separated by zero bytes."""
    from flows.cli.main import run_command

    words = data.decode("utf-8", "replace").split("\x00")
    words += NOTHING_RUNS.get(words[0], ())
    code = run_command([*words, "--store", str(store())])
    assert code in (0, 1, 2), code


@dataclass(frozen=True)
class Target:
    """Something that reads what comes from outside."""

    read: Callable[[bytes], None]
    valid: Callable[[], bytes | object]
    """What is right, as bytes, or as JSON whose values are changed."""
    more: st.SearchStrategy[bytes] = st.binary(max_size=60)

    def inputs(self) -> st.SearchStrategy[bytes]:
        valid = self.valid()
        if isinstance(valid, bytes):
            return changed(valid) | self.more
        write = signed if self.read in (a_manifest, a_record) else as_bytes
        return changed_json(valid).map(write) | changed(write(valid)) | self.more


NOTHING_RUNS = {"train": ("--set", "no_such_setting=1"), "iterate": ("--iteration", "no number"), "stage": ("--print-call",),
                "mlflow-sync": ("--no-such-option",), "perform": ("no-such-call.json",)}
"""What else such a command is given, so that it starts no server and trains nothing."""


WORD = st.text(max_size=8) | st.sampled_from([
    "show", "runs", "diff", "verify", "gc", "rm", "fork", "stage", "train", "perform", "--json",
    "--at", "--run", "--iteration", "0", "1", "-1", "x", "--set", "--dry-run", "--older-than", "nan", "--help", "gae"])
WORDS = st.lists(WORD, max_size=6).map(lambda words: "\x00".join(words).encode())
TEXT = st.text(max_size=40).map(str.encode)
TARGETS = {
    "config": Target(config, lambda: (DATA / "reviews" / "config.yaml").read_bytes(), JSON.map(as_bytes)),
    "values": Target(config, lambda: yaml.safe_load((DATA / "reviews" / "config.yaml").read_bytes())),
    "task": Target(config, lambda: yaml.safe_load((DATA / "pendulum" / "config.yaml").read_bytes())),
    "setting": Target(setting, lambda: b"ppo.learning_rate=1e-5", TEXT),
    "rows": Target(rows, lambda: as_bytes({"prompt": "a", "chosen": "b", "rejected": "c"}) + b"\n" + as_bytes(
        {"prompt": "d", "chosen": "e", "rejected": "f"})),
    "model": Target(model, model_files, st.just(b"{}")),
    "weights": Target(weights, lambda: (_model() / "model.safetensors").read_bytes()),
    "manifest": Target(a_manifest, lambda: json.loads(manifest().read_bytes())),
    "record": Target(a_record, lambda: json.loads(record().read_bytes())),
    "table": Target(a_table, table), "call": Target(a_call, call),
    "template": Target(template, lambda: b"{% for m in messages %}{{ m['content'] | trim }}{% endfor %}", TEXT),
    "reply": Target(reply, lambda: b"\x00\x64" + as_bytes({"scores": [1.0, 2.0]}), JSON.map(
        lambda value: b"\x00\x64" + as_bytes(value)) | JSON.map(lambda value: b"\x00\x64" + as_bytes({"scores": value}))),
    "function": Target(function, lambda: b"grammar.py:gold", TEXT),
    "tokens": Target(tokens, lambda: b"a.org=x,b.org=y", TEXT),
    "arguments": Target(arguments, lambda: b"show\x00tiny\x00--iteration\x001", WORDS),
}


def attempt(name: str, data: bytes) -> str | None:
    """What went wrong; none where the input was read or refused."""
    from schemas.errors import BatonError

    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            TARGETS[name].read(data)
    except BatonError:
        return None
    except (Exception, SystemExit):
        return traceback.format_exc()
    return None


def search(name: str, seconds: float) -> tuple[int, bytes | None, str]:
    """How many inputs were tried in that time; the smallest one that went wrong, and how."""
    tried, found = 0, [None, ""]
    deadline = time.monotonic() + seconds

    @settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=False)
    @given(TARGETS[name].inputs())
    def look(data: bytes) -> None:
        nonlocal tried
        tried += 1
        if (wrong := attempt(name, data)) is not None:
            found[:] = [data, wrong]
            raise AssertionError(wrong.splitlines()[-1])

    while time.monotonic() < deadline and found[0] is None:
        with contextlib.suppress(AssertionError):
            seed(random.getrandbits(64))(look)()
    return tried, *found


def main(minutes: float, *names: str) -> int:
    """Each target for its part of the time, in turn; faults go into the corpus."""
    logging.disable()
    warnings.simplefilter("ignore")
    chosen, faults = names or tuple(TARGETS), 0
    for name in chosen:
        tried, data, wrong = search(name, 60 * minutes / len(chosen))
        print(f"{name:<10} {tried:>8,} inputs {'' if data is None else 'FAULT'}", flush=True)
        if data is not None:
            faults += 1
            CORPUS.mkdir(exist_ok=True)
            file = CORPUS / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}.txt"
            file.write_text(base64.b64encode(data).decode() + "\n")
            print(f"  {data[:400]!r}\n  kept as {file}\n{wrong}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), *sys.argv[2:]))

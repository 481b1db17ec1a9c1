"""The store: commits whole or not at all, one writer wins, and nothing wrong is believed."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import rewrite
from pydantic import ValidationError

from flows.runs.produce import environment, now
from flows.runs.verify import Verifier
from flows.store.attempt import folder_of
from flows.store.store import Store
from schemas.artifacts import ArtifactRef, FileEntry, Manifest, Recipe, derive_seed, sha256_json
from schemas.errors import StoreError
from schemas.language import DataConfig, LanguageConfig
from schemas.records import FORMAT_VERSION
from schemas.tables import Ragged, ReferenceLogprobs

CONFIG = LanguageConfig(data=DataConfig(prompts="p", heldout_prompts="h"), base_model={"source": "m"},
                   reward={"components": {"a": {"source": "f.py:f"}}}, value={"start": "actor"}, execution={"threads": 1})


def recipe(**changes):
    return Recipe(**{"stage": "reference", "version": 1, "config": {"temperature": 1.0}, "inputs": {}, "seed": 1} | changes)


def table(value=-1.0):
    logprobs = Ragged.from_rows([np.full(n, value) for n in (1, 4, 2)], np.float32)
    return ReferenceLogprobs(row_id=np.arange(3), logprobs=logprobs)


def write(store, made_from, value=-1.0):
    """One sealed attempt with a table and a file in a folder."""
    attempt = store.attempt(made_from)
    attempt.table(table(value))
    attempt.path("model/config.json").write_text('{"a": 1}')
    return Manifest(identity=made_from.ref.identity, recipe=made_from, attempt=attempt.name, files=attempt.seal(),
                    metrics={}, input_contents={}, seconds=1.0, created=now(), environment=environment(CONFIG.execution))


def findings(store, ref):
    """What verify says of an artifact, by another process's eyes."""
    return [str(finding) for finding in Verifier(Store(store.uri)).artifact(ref)]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture
def committed(store):
    manifest = store.commit(write(store, recipe()))
    return store, manifest


def test_what_is_committed_is_read_back(committed):
    store, manifest = committed
    assert store.find(manifest.ref) == manifest
    assert store.table(manifest.ref, ReferenceLogprobs).logprobs.values.tolist() == [-1] * 7
    assert json.loads((store.folder(manifest.ref, "model") / "config.json").read_text()) == {"a": 1}
    assert findings(store, manifest.ref) == []
    assert store.artifacts() == [manifest.ref]


def test_nothing_exists_before_the_manifest(store):
    made = write(store, recipe())
    assert store.find(made.ref) is None and store.artifacts() == []
    with pytest.raises(StoreError, match="is not in"):
        store.manifest(made.ref)


def eight_writers(uri):
    """Each with other bytes, all at once: one wins, seven adopt, and nothing else is left."""
    barrier, results = threading.Barrier(8), []

    def commit(value):
        store = Store(uri)
        made = write(store, recipe(), float(value))
        barrier.wait()
        results.append((made.attempt, store.commit(made).attempt))

    threads = [threading.Thread(target=commit, args=(n,)) for n in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    winners = {adopted for _, adopted in results}
    assert len(results) == 8 and len(winners) == 1 and sum(mine == adopted for mine, adopted in results) == 1
    store = Store(uri)
    assert store.files.names(f"{folder_of(recipe().ref)}/attempts") == list(winners)
    assert findings(store, recipe().ref) == []


def test_of_eight_writers_one_wins_and_seven_adopt(tmp_path):
    eight_writers(tmp_path / "store")


def test_identity_is_all_that_decides_the_result():
    same = recipe(config={"temperature": 1.0})
    assert same.ref == recipe().ref
    others = [recipe(version=2), recipe(config={"temperature": 0.5}), recipe(seed=2), recipe(stage="rollout"),
              recipe(inputs={"rollouts": recipe().ref})]
    assert len({r.ref.identity for r in [*others, recipe()]}) == 6


def test_identity_by_hand():
    """sha256 of the canonical JSON, written out."""
    text = '{"config":{"temperature":1.0},"inputs":{},"seed":1,"stage":"reference","version":1}'
    assert recipe().ref.identity == hashlib.sha256(text.encode()).hexdigest()
    with pytest.raises(ValueError):
        sha256_json({"x": float("nan")})


def test_seeds_differ_by_run_iteration_and_stage():
    assert derive_seed(1, 2, "ppo") == derive_seed(1, 2, "ppo")
    assert len({derive_seed(*key) for key in ((1, 2, "ppo"), (2, 2, "ppo"), (1, 3, "ppo"), (1, 2, "rollout"))}) == 4
    assert 0 <= derive_seed(1, 2, "ppo") < 2**63


def damage_flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage, message", [
    (damage_flip, "sha256: expected"),
    (lambda path: path.write_bytes(path.read_bytes()[:-1]), "size: expected"),
    (lambda path: path.write_bytes(b""), "size: expected"),
    (lambda path: path.unlink(), "found no such file"),
])
@pytest.mark.parametrize("inner", ["reference.parquet", "model/config.json"])
def test_damage_is_noticed_on_read_and_by_verify(committed, inner, damage, message):
    store, manifest = committed
    path = Path(store.place(manifest.ref, inner))
    damage(path)
    with pytest.raises(StoreError) as error:
        store.table(manifest.ref, ReferenceLogprobs) if inner.endswith("parquet") else store.folder(manifest.ref, "model")
    assert str(path) in str(error.value) and message in str(error.value)
    assert [message in finding for finding in findings(store, manifest.ref)] == [True]


def edit(store, manifest, change):
    """Rewrites the manifest as an attacker or a bug would, digest and all; the store as another process opens it."""
    rewrite(Path(store.uri, folder_of(manifest.ref), "manifest.json"), change)
    return Store(store.uri)


@pytest.mark.parametrize("change, message", [
    (lambda d: d.update(format_version=FORMAT_VERSION + 1, baton="9.1"),
     f"expected at most {FORMAT_VERSION}, for .*, found {FORMAT_VERSION + 1}, written by Baton 9.1; use"),
    (lambda d: d.update(format_version=None), "found None, written by"),
    (lambda d: d["files"][0].update(path="../../../../secret"), "leaves the artifact"),
    (lambda d: d["files"][0].update(path="/etc/passwd"), "leaves the artifact"),
    (lambda d: d["recipe"]["config"].update(temperature=2.0), "recipe: expected identity"),
    (lambda d: d.update(identity="0" * 64), "identity: expected identity"),
    (lambda d: d.update(surprise=1), "surprise"),
    (lambda d: d["files"][0].update(bytes=-1), "files.0.bytes"),
])
def test_a_manifest_that_cannot_be_believed_is_refused(committed, change, message):
    store, manifest = committed
    store = edit(store, manifest, change)
    with pytest.raises(StoreError, match=message):
        store.manifest(manifest.ref)


def test_wrong_row_count_is_refused(committed):
    store, manifest = committed
    entry = next(i for i, e in enumerate(manifest.files) if e.path == "reference.parquet")
    store = edit(store, manifest, lambda d: d["files"][entry].update(rows=99))
    with pytest.raises(StoreError, match="rows: expected 99, found 3"):
        store.table(manifest.ref, ReferenceLogprobs)


def test_a_link_out_of_the_artifact_is_refused(committed, tmp_path):
    store, manifest = committed
    path = Path(store.place(manifest.ref, "model/config.json"))
    (tmp_path / "outside.json").write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(tmp_path / "outside.json")
    with pytest.raises(StoreError, match="leaves the artifact through a link"):
        store.folder(manifest.ref, "model")


def test_a_pickle_is_never_read(store):
    """Whoever has put it into a manifest."""
    made = write(store, recipe())
    attempt = store.attempt(recipe())
    attempt.write("actor/config.json", b"{}")
    attempt.write("actor/pytorch_model.bin", b"cos\nsystem\n(S'true'\ntR.")
    store.commit(made.model_copy(update={"attempt": attempt.name, "files": attempt.seal()}))
    with pytest.raises(StoreError, match=r"actor/pytorch_model.bin may hold a pickle, which can run anything"):
        store.folder(made.ref, "actor")


def test_a_changed_input_is_found_by_verify(committed):
    store, source = committed
    child = recipe(stage="value", inputs={"rollouts": source.ref})
    made = write(store, child)
    store.commit(made.model_copy(update={"input_contents": {"rollouts": source.content}}))
    assert findings(store, child.ref) == []
    edit(store, source, lambda d: d["files"][0].update(digest="1" * 64))
    assert ["input_contents.rollouts: expected" in finding for finding in findings(store, child.ref)] == [True]


def test_a_record_is_written_once(tmp_path):
    store, ref = Store(tmp_path), [ArtifactRef(stage=stage, identity="0" * 64) for stage in ("one", "two")]
    assert store.put("r.json", ref[0])
    assert not store.put("r.json", ref[1])
    assert store.get("r.json", ArtifactRef) == ref[0]
    assert os.listdir(tmp_path) == ["r.json"]


@pytest.mark.parametrize("path", ["../x", "/x", "a/../../x", "", "a\\..\\x"])
def test_paths_that_leave_the_artifact_are_no_entries(path):
    with pytest.raises(ValidationError):
        FileEntry(path=path, bytes=1, digest="0" * 64)


def test_a_file_that_cannot_be_written_whole_is_an_error(tmp_path):
    """Where files may not grow beyond 1,000 bytes: an error, and neither a short file nor a short record is published."""
    code = """
import resource, signal, sys
from pathlib import Path
from flows.store.store import Store
from schemas.artifacts import Recipe
from schemas.errors import StoreError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
recipe = Recipe(stage="test", version=1, config={"long": "x" * 2000}, inputs={})
store, failed = Store(sys.argv[1]), 0
small, large = store.attempt(recipe), store.attempt(recipe)
small.write("file", b"x" * 2000)
large.weights("file", lambda: [memoryview(b"x" * 2000)])
for write in (small.seal, large.seal, lambda: store.put("record.json", recipe)):
    try:
        write()
    except (OSError, StoreError):
        failed += 1
assert failed == 3 and not store.artifacts() and not Path(sys.argv[1], "record.json").exists()
"""
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == 0

"""Commits beside the next stages: in order; what fails is told; and what another process has committed first is used."""

import os
import shutil
import subprocess
import sys
import threading

import pytest
from conftest import assert_same_bytes
from control import write_control
from safetensors.torch import load_file, save_file

from flows.cli.main import run_command
from flows.control import control_tasks
from flows.runs.produce import StageOutput, _commit_ours, compute
from flows.runs.run import open_run
from flows.runs.verify import verify
from flows.store import writer as writer_module
from flows.store.attempt import Attempt, folder_of
from flows.store.digests import file_digest
from flows.store.store import Store
from flows.store.writer import Writer
from schemas.artifacts import Recipe
from schemas.errors import StoreError, UnreachableStoreError
from schemas.settings import ExecutionConfig


def test_one_after_another_until_one_fails():
    done, held = [], threading.Event()
    with pytest.raises(KeyError, match="third"), Writer() as writer:
        writer.later(lambda: (held.wait(10), done.append(1)))
        second = writer.later(lambda: done.append(2))
        assert not second.done()
        held.set()
        second.result(10)

        def third():
            raise KeyError("third")

        writer.later(third)
        fourth = writer.later(lambda: done.append(4))
        with pytest.raises(KeyError):
            writer.wait()
        assert isinstance(fourth.exception(), KeyError)
        with pytest.raises(KeyError):
            writer.later(lambda: done.append(5))
        writer.wait()
    assert done == [1, 2]


def test_what_was_computed_before_an_error_is_committed_and_a_signal_leaves_it():
    done = []
    with pytest.raises(ValueError), Writer() as writer:
        writer.later(lambda: done.append(1))
        raise ValueError
    assert done == [1]
    begun = threading.Event()
    with pytest.raises(KeyboardInterrupt), Writer() as writer:
        writer.later(lambda: (begun.set(), writer.stop.wait(10), done.append(2)))
        left = writer.later(lambda: done.append(3))
        begun.wait(10)
        raise KeyboardInterrupt
    assert done == [1, 2] and left.cancelled()


def test_a_server_that_fails_for_a_while(monkeypatch, caplog):
    monkeypatch.setattr(writer_module, "RETRY_DELAYS", (0, 0))
    tries = []

    def job(failures):
        tries.append(1)
        if len(tries) <= failures:
            raise UnreachableStoreError("s3://bucket: no answer")
        return "committed"

    with Writer() as writer:
        assert writer.later(lambda: job(2)).result(10) == "committed" and len(tries) == 3
    assert "s3://bucket: no answer; tried again after 0 s" in caplog.text
    tries.clear()
    with pytest.raises(StoreError, match="no answer") as error, Writer() as writer:
        writer.later(lambda: job(9))
        writer.wait()
    assert len(tries) == 3 and not isinstance(error.value, UnreachableStoreError)  # so that no task is tried again for it


@pytest.fixture
def example(tmp_path):
    return write_control(tmp_path / "small", iterations=3, tracking={"enabled": False})


def train(folder, store):
    return run_command(["train", str(folder), "--store", str(store), "--quiet"])


def test_the_next_rollout_does_not_wait_for_the_update_before_it(example, tmp_path, prefect_server, monkeypatch):
    """Whose commit here takes until that rollout is computed; the bytes are those of commits at once."""
    assert train(example, tmp_path / "plain") == 0
    computed, seal, rollout = threading.Event(), Attempt.seal, control_tasks.TASKS["rollout"]

    def slow(attempt):
        if attempt.ref.stage == "ppo" and not computed.is_set():
            assert computed.wait(60)
        return seal(attempt)

    def seen(work):
        output = rollout(work)
        if work.call.iteration == 2:
            computed.set()
        return output

    monkeypatch.setattr(Attempt, "seal", slow)
    monkeypatch.setitem(control_tasks.TASKS, "rollout", seen)
    assert train(example, tmp_path / "store") == 0 and computed.is_set()
    assert_same_bytes(open_run(Store(tmp_path / "store"), "small"), open_run(Store(tmp_path / "plain"), "small"))
    assert verify(Store(tmp_path / "store"), None)[1] == []


@pytest.mark.parametrize("stage", ["rollout", "ppo"])
def test_another_process_that_committed_other_bytes_first(example, tmp_path, prefect_server, monkeypatch, caplog, stage):
    """What was computed from ours since is left, and the run goes on from theirs."""
    commit, forged = Store.commit, []

    def second(store, manifest, tables=None):
        if manifest.ref.stage == stage and not forged and manifest.iteration == 2:
            forged.append(manifest.ref)
            commit(store, theirs(store, manifest))
            store._known.clear()  # it was another process
        return commit(store, manifest, tables)

    def theirs(store, manifest):
        folder = store.files.root / folder_of(manifest.ref) / "attempts"
        shutil.copytree(folder / manifest.attempt, folder / "theirs")
        changed = next(entry for entry in manifest.files if entry.path.endswith((".safetensors", ".parquet")))
        path = folder / "theirs" / changed.path
        if path.suffix == ".safetensors":
            save_file({name: tensor + (tensor.dtype.is_floating_point and 0.01) for name, tensor in load_file(path).items()},
                      path)
        else:
            import pyarrow.parquet as pq
            pq.write_table(pq.read_table(path), path, compression="gzip")
        entry = changed.model_copy(update={"digest": file_digest(path, changed.algorithm), "bytes": path.stat().st_size})
        files = tuple(entry if each.path == entry.path else each for each in manifest.files)
        return manifest.model_copy(update={"attempt": "theirs", "files": files})

    monkeypatch.setattr(Store, "commit", second)
    assert train(example, tmp_path / "store") == 0 and len(forged) == 1
    assert "was committed by another writer meanwhile, with OTHER BYTES than ours; going on from what is committed" in (
        caplog.text)
    run = open_run(Store(tmp_path / "store"), "small")
    assert run.last().iteration == 3 and run.state(2).artifacts[stage] == forged[0]
    assert run.store.manifest(forged[0]).attempt == "theirs" and verify(run.store, None)[1] == []


def test_a_stage_that_runs_no_model_needs_neither_a_server_nor_a_library_of_models(trained):
    code = """
import sys
from flows.cli.main import run_command
code = run_command(sys.argv[1:])
loaded = [name for name in ("prefect.server", "transformers", "trl", "mlflow", "datasets") if name in sys.modules]
sys.exit(f"imported {loaded}" if loaded else code)
"""
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    command = [sys.executable, "-c", code, "stage", "gae", "tiny", "--iteration", "2", "--store", str(trained[1])]
    done = subprocess.run(command, env=environment, text=True, capture_output=True)
    assert done.returncode == 0 and "reproduced, 1 file, the same bytes" in done.stdout, done.stderr


def test_a_commit_whose_reply_was_lost_is_found_when_it_is_tried_again(tmp_path, monkeypatch):
    """And what was written of a try that was not committed is written anew, under another name."""
    monkeypatch.setattr(writer_module, "RETRY_DELAYS", (0, 0, 0))
    recipe, put, store = Recipe(stage="test", version=1, config={}, inputs={}), Store.put, Store(tmp_path / "store")
    tries = []

    def make(attempt):
        attempt.write("file", b"1")
        return StageOutput()

    made = compute(store, recipe, ExecutionConfig(threads=1), make)

    def lost(store, key, record):
        tries.append(record.attempt)
        if len(tries) == 1:
            raise UnreachableStoreError("nothing arrived")
        put(store, key, record)
        raise UnreachableStoreError("no reply")

    monkeypatch.setattr(Store, "put", lost)
    with Writer() as writer:
        store.commit_later(made.attempt, recipe, lambda: _commit_ours(store, made), writer)
        manifest = store.find(recipe.ref)
    assert len(tries) == 2 and tries[0] != tries[1] == manifest.attempt
    assert store.file(recipe.ref, "file").read_bytes() == b"1" and verify(Store(tmp_path / "store"), None)[1] == []

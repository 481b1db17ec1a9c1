"""Several at once on one run, signals, servers that are away: one run's worth of work, and nothing lost."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest
from conftest import TRACKED
from control import write_control
from s3 import free_port
from test_tracking import only_run, points

from flows.chains import check_inputs
from flows.cli.main import run_command
from flows.runs.gc import collect
from flows.runs.run import lease_key, open_run, remove_run, require_there
from flows.runs.start import Request, start
from flows.runs.verify import verify
from flows.store.lease import GC, holder_of, lease, working_on
from flows.store.store import Store
from schemas.errors import ConfigError, StoreError


def started(*arguments, **environment):
    """A command in a process of its own."""
    return subprocess.Popen([sys.executable, "-m", "flows.cli.main", *map(str, arguments)], env=os.environ | environment,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_two_trains_of_one_run_and_one_from_another_view_of_the_store(trained, tmp_path, prefect_server):
    """The others wait, and find everything: each artifact was attempted once, and its bytes are those of one alone."""
    example, reference = trained
    (tmp_path / "store").mkdir()
    (tmp_path / "view").symlink_to(tmp_path / "store", target_is_directory=True)
    commands = [started("train", example, "--store", tmp_path / place, "--set", "tracking.enabled=false")
                for place in ("store", "store", "view")]
    said = [command.communicate(timeout=300) for command in commands]
    assert [command.returncode for command in commands] == [0, 0, 0], said
    assert sum("is in use by process" in out for out, _ in said) >= 2
    ours, theirs = open_run(Store(tmp_path / "store"), "tiny"), open_run(Store(reference), "tiny")
    for mine, other in zip(ours.states(), theirs.states(), strict=True):
        assert mine.model_copy(update={"seconds": 0}) == other.model_copy(update={"seconds": 0})
        for ref in mine.artifacts.values():
            assert ours.store.manifest(ref).digests() == theirs.store.manifest(ref).digests()
    made = {*ours.store.artifacts()} - {*ours.inputs.values()}
    for ref in made:
        assert len(ours.store.files.names(f"artifacts/{ref.stage}/{ref.identity}/attempts")) == 1
    assert verify(Store(tmp_path / "store"), None)[1] == []


def test_two_that_work_all_the_same_end_well(trained, tmp_path, prefect_server):
    """Without the lease, as where a network's disk knows no locks: whoever commits second adopts."""
    code = ("import contextlib, sys\nfrom flows.store import local\n"
            "local.LocalFiles.exclusive = lambda *_: contextlib.nullcontext()\n"
            "from flows.cli.main import run_command\nsys.exit(run_command(sys.argv[1:]))\n")
    arguments = ["train", str(trained[0]), "--store", str(tmp_path / "store"), "--set", "tracking.enabled=false"]
    both = [subprocess.Popen([sys.executable, "-c", code, *arguments], env=os.environ, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [one.communicate(timeout=300) for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    assert not any("OTHER BYTES" in out for out, _ in said)
    ours, theirs = Store(tmp_path / "store"), Store(trained[1])
    assert verify(ours, None)[1] == [] and open_run(ours, "tiny").last().actor == open_run(theirs, "tiny").last().actor
    actor = open_run(ours, "tiny").last().actor.artifact
    assert ours.manifest(actor).digests() == theirs.manifest(actor).digests()


def test_sigterm_takes_what_the_stage_has_written_with_it(tmp_path, prefect_server):
    """In the middle of a rollout: no attempt, no record half written; then the same command goes on."""
    example = write_control(tmp_path / "small", environment={"id": "Pendulum-v1"}, iterations=1, tracking={"enabled": False},
                            rollout={"num_envs": 1, "num_steps": 50_000}, ppo={"minibatches": 1, "epochs": 1})
    store = tmp_path / "store"
    training = started("train", example, "--store", store)
    deadline = time.monotonic() + 120
    while not (store / "runs/small/iterations/000000.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    training.send_signal(signal.SIGTERM)
    _, error = training.communicate(timeout=60)
    assert training.returncode == 143 and "Traceback" not in error
    assert "terminated; what was committed is whole, the same command goes on from here" in error
    assert not list(store.glob("artifacts/rollout/*/attempts/*")) and not list(store.rglob("*.tmp"))
    assert open_run(Store(store), "small").last().iteration == 0 and verify(Store(store), None)[1] == []
    assert run_command(["train", str(example), "--store", str(store), "--quiet"]) == 0


def test_prefects_server_that_is_away_is_said_in_one_line(trained, tmp_path):
    """Nothing is computed, nothing is lost; with a server the same command trains."""
    command = started("train", trained[0], "--store", tmp_path / "store", PREFECT_API_URL="http://127.0.0.1:9/api")
    _, error = command.communicate(timeout=120)
    assert command.returncode == 1 and "Traceback" not in error
    assert "Prefect at http://127.0.0.1:9/api: " in error
    assert "or set PREFECT_API_URL to another or to none; what was committed is whole, the same command goes on" in error
    assert {ref.stage.partition(".")[0] for ref in Store(tmp_path / "store").artifacts()} == {"input"}


# --- MLflow ---

@pytest.fixture
def mlflow_server(tmp_path):
    """A way to start MLflow's own server; and its address."""
    port, servers = free_port(), []
    uri = f"http://127.0.0.1:{port}"

    def start():
        with (tmp_path / "mlflow.log").open("w") as log:
            servers.append(subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1", "--backend-store-uri",
                 f"sqlite:///{tmp_path / 'served.db'}", "--artifacts-destination", str(tmp_path / "served")], stdout=log,
                stderr=log, start_new_session=True))
        deadline = time.monotonic() + 120
        while True:
            try:
                if httpx.get(f"{uri}/health", timeout=2).is_success:
                    return
            except httpx.HTTPError:
                time.sleep(0.3)
            assert time.monotonic() < deadline, (tmp_path / "mlflow.log").read_text()

    yield uri, start
    for server in servers:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(120)


def test_mlflow_sync_brings_a_server_that_was_away_to_what_the_store_says(copied, mlflow_server, capsys):
    """Away: the error, by its name. Back again: every point once, however often it is asked for."""
    import mlflow

    example, root = copied
    uri, start = mlflow_server
    there = [f"--set=tracking.uri={uri}", "--store", str(root)]
    assert run_command(["train", str(example), "--iterations", "3", *TRACKED, "--set", "iterations=3", *there]) == 0
    out = capsys.readouterr().out
    assert "training goes on without it, and it is tried again; baton mlflow-sync tiny completes it afterwards" in out
    assert run_command(["mlflow-sync", "tiny", *there]) == 1
    assert f"MLflow at {uri}: " in (error := capsys.readouterr().err) and error.count("\n") == 1
    start()
    for _ in range(2):
        assert run_command(["mlflow-sync", "tiny", *there]) == 0
        assert "MLflow has its 4 states" in capsys.readouterr().out
        client = mlflow.MlflowClient(uri)
        found = points(client, only_run(client))
        assert [step for step, _ in found["gae/kl"]] == [1, 2, 3] and [step for step, _ in found["evaluate/gold"]][:1] == [0]
    assert all(len({step for step, _ in of}) == len(of) for of in found.values())


def test_a_tracking_server_that_never_answers_is_waited_for_no_longer_than_said(copied, monkeypatch, capsys):
    """It takes the connection and says nothing: training ends, and says so."""
    import socket

    from flows.tracking import mirror

    monkeypatch.setattr(mirror, "PATIENCE", 2.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert run_command(["train", "--run", "tiny", "--iterations", "3", *TRACKED, f"--set=tracking.uri={uri}", "--store",
                            str(copied[1])]) == 0
    assert "it did not answer in time" in (out := capsys.readouterr().out) or "timed out" in out
    assert open_run(Store(copied[1]), "tiny").last().iteration == 3


# --- gc, rm and file systems without locks ---

def in_a_thread(function):
    """Begun; `join` waits for it, and `alive` says whether it still waits."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def test_a_start_waits_for_gc_and_gc_spares_what_a_start_has_found(trained, tmp_path):
    """Inputs that an earlier, removed run has left, a year old, and found by a new run whose record is not there yet."""
    example, root = trained[0], tmp_path / "store"
    request = Request(str(root), source=str(example))
    start(request, check_inputs)
    assert run_command(["rm", "tiny", "--store", str(root)]) == 0
    for path in root.rglob("*"):
        os.utime(path, (time.time() - 365 * 86400,) * 2)
    there = {*Store(root).artifacts()}

    with lease(Store(root), GC, "the store"):  # a gc is at work
        starting = in_a_thread(lambda: start(request, check_inputs))
        starting.join(3)
        assert starting.is_alive() and not (root / "runs" / "tiny" / "run.json").exists()
    starting.join(60)
    assert not starting.is_alive() and open_run(Store(root), "tiny").inputs
    assert run_command(["rm", "tiny", "--store", str(root)]) == 0

    with working_on(Store(root), lease_key("tiny"), "run 'tiny'"):  # a start has found them, and has not written its record
        assert [one.kind for one in collect(Store(root), 0, dry_run=False)[0]] == []
        assert {*Store(root).artifacts()} == there
    assert {one.kind for one in collect(Store(root), 0, dry_run=False)[0]} == {"artifact"}
    assert not Store(root).artifacts()


def test_rm_holds_the_lease_and_a_lease_on_a_removed_file_is_taken_anew(copied, capsys):
    root = copied[1]
    held = []
    with lease(Store(root), lease_key("tiny"), "run 'tiny'"):
        assert run_command(["rm", "tiny", "--store", str(root)]) == 2
        assert f"run 'tiny' is in use by process {os.getpid()}" in capsys.readouterr().err
        assert open_run(Store(root), "tiny").last().iteration == 2

        def wait():
            with lease(Store(root), lease_key("tiny"), "run 'tiny'"):
                held.append(holder_of(Store(root), lease_key("tiny")))  # of the file that is there, not of the removed one

        waiting = in_a_thread(wait)
        waiting.join(1)
        assert waiting.is_alive()
        shutil.rmtree(root / "runs" / "tiny")
    waiting.join(30)
    assert held and held[0].startswith("process")


def test_a_file_system_without_locks_is_said_once_and_all_goes_on(copied, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    store = Store(copied[1])
    with caplog.at_level("WARNING", logger="baton"), working_on(store, lease_key("tiny"), "run 'tiny'"):
        assert holder_of(store, lease_key("tiny")) is None
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"{copied[1]}: its file system has no locks (No locks available)" in line and "start one at a time" in line


def test_another_error_of_a_lock_is_raised(copied, monkeypatch):
    def flock(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(StoreError, match="Input/output error"), working_on(Store(copied[1]), lease_key("tiny"), "x"):
        pass


def test_rm_leaves_nothing_to_a_process_that_waits(copied):
    """It gets the lease of a new file once the run is gone, and keeps it."""
    store, seen = Store(copied[1]), []
    remove = store.files.remove

    def waits_then_removed(key):
        if key == "runs/tiny":
            waiting.start()
            time.sleep(1)
        remove(key)

    def wait():
        with lease(Store(copied[1]), lease_key("tiny"), "run 'tiny'"):
            time.sleep(0.5)
            seen.append(holder_of(Store(copied[1]), lease_key("tiny")))

    waiting = threading.Thread(target=wait, daemon=True)
    store.files.remove = waits_then_removed
    remove_run(store, "tiny")
    waiting.join(30)
    assert seen and seen[0] and seen[0].startswith("process")


def test_a_run_that_was_removed_while_its_lease_was_waited_for_is_not_gone_on_with(copied, capsys):
    run = open_run(Store(copied[1]), "tiny")
    remove_run(run.store, "tiny")
    with pytest.raises(ConfigError, match="run 'tiny' was removed meanwhile"):
        require_there(run)
    with lease(run.store, lease_key("tiny"), "run 'tiny'"):
        pass
    assert run_command(["verify", "--store", str(copied[1])]) == 0 and run_command(["runs", "--store", str(copied[1])]) == 0

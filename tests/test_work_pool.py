"""Baton on a work pool, with real processes on loopback: what deployments do, what the page shows, what is refused."""

import json
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from itertools import pairwise

import psutil
import pytest
from conftest import assert_same_bytes, free_port
from pool import Pool, holding_example
from prefect import flow
from prefect.context import FlowRunContext
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling

from flows.orchestration import page
from flows.orchestration.automations import automations
from flows.orchestration.pool import deploy
from flows.runs.run import open_run
from flows.runs.verify import verify
from flows.store.store import Store
from stages.ops.progress import progress_bar

POOL = "flows.orchestration.pool"
HEARTBEATS_MISSED = 40  # seconds until a flow run without a heartbeat is ended; they come every 30


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """A server with everything deployed, and a worker."""
    pool = Pool(tmp_path_factory.mktemp("pool"), free_port())
    try:
        pool.start_server()
        deploy(pool.environment, "--patience", str(HEARTBEATS_MISSED))
        pool.start_worker()
        yield pool
    finally:
        pool.processes.end()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """The environment of a server with a password."""
    pool = Pool(tmp_path_factory.mktemp("guarded"), free_port())
    pool.processes.environment |= {"PREFECT_SERVER_API_AUTH_STRING": "admin:right"}
    try:
        pool.start_server()
        yield pool.environment
    finally:
        pool.processes.end()


@contextmanager
def made(pool):
    """`make pool`, up; and a function for the processes that it has by then."""
    ports = ("--port", str(pool.port), "--mlflow-port", str(free_port()))
    command = subprocess.Popen([sys.executable, "-m", POOL, *ports], env=pool.environment, stdout=subprocess.PIPE,
                               text=True)
    try:
        while "The worker's log" not in command.stdout.readline():
            assert command.poll() is None
        yield command, lambda: psutil.Process(command.pid).children(recursive=True)
    finally:
        command.terminate()
        command.wait(120)


def train(pool, example, *more, **environment):
    """A local run, begun and not waited for, that Prefect's server is told of."""
    command = [sys.executable, "-m", "flows.cli.main", "train", str(example), "--quiet", *more]
    return subprocess.Popen(command, env=pool.environment | environment, stderr=subprocess.PIPE, text=True)


def test_make_pool_ends_all_that_it_started_and_what_its_death_left(tmp_path):
    pool = Pool(tmp_path / "made", free_port())  # nothing of it is started but by make pool
    example = holding_example(tmp_path / "begun", iterations=1, seed=61)
    with pool.held(), made(pool) as (command, family):
        left = pool.run("iterate", run="begun", config=str(example))
        pool.wait(lambda: pool.committed("input.prompts"), "a flow run to be at work")
        names = " ".join(word for process in family() for word in process.cmdline())
        assert all(name in names for name in ("prefect server", "mlflow server", "prefect worker", "prefect.engine"))
        for process in family():
            process.kill()
        command.kill()
    with pool.held(), made(pool) as (command, family):
        ended = pool.finished(left)
        assert ended.state.is_crashed() and "its worker was ended" in ended.state.message
        evaluates = pool.run("iterate", run="begun")
        pool.wait(lambda: pool.read(evaluates).state.is_running(), "the next flow run, which the dead one does not block")
        there = family()
        command.send_signal(signal.SIGINT)
        command.send_signal(signal.SIGINT)  # of somebody who is in a hurry
        command.communicate(timeout=120)
        assert command.returncode == 0
        assert not [process for process in there if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def test_stage_with_another_lambda_leaves_the_run_alone(pool, copied):
    store = copied[1]
    records = {path: path.read_bytes() for path in (store / "runs").rglob("*.json")}
    recorded = open_run(Store(store), "tiny").recorded("gae", 1)
    there = set(Store(store).artifacts())
    done = pool.finished(pool.run("stage", run="tiny", stage="gae", iteration=1, settings=["gae.gae_lambda=0.5"],
                                  store=str(store)))
    assert done.state.is_completed(), done.state.message
    assert done.name == "tiny-gae-1"
    (made,) = set(Store(store).artifacts()) - there
    assert made.stage == "gae" and Store(store).manifest(made).recipe.config["gae_lambda"] == 0.5
    assert made != recorded
    assert {path: path.read_bytes() for path in (store / "runs").rglob("*.json")} == records
    with pool.client() as client:
        (table,) = [one for one in client.read_artifacts() if one.flow_run_id == done.id and one.type == "table"]
    assert "a new artifact" in table.description


def test_what_is_cancelled_goes_on_from_inside(pool, tmp_path):
    example = holding_example(tmp_path / "halted", iterations=1, seed=14)
    assert pool.finished(pool.run("iterate", run="halted", config=str(example))).state.is_completed()
    with pool.held():
        begun = pool.in_the_middle(lambda: pool.run("iterate", run="halted"))
        with pool.client() as client:
            client.set_flow_run_state(begun.id, Cancelling())
        assert pool.finished(begun).state.is_cancelled()
    assert pool.states("halted") == ["000000.json"] and not verify(Store(pool.store), "halted")[1]
    again = pool.finished(pool.run("iterate", run="halted"))
    assert {"Found", "Completed"} == {one.state.name for one in pool.task_runs(again)}
    assert again.state.is_completed() and pool.states("halted") == ["000000.json", "000001.json"]
    said = pool.wait(lambda: [line for line in pool.log(again) if "iteration 1/1" in line], "its line in the log")
    assert "(found rollout, reference)" in said[0]


def test_what_a_person_reads_on_the_page(pool, tmp_path):
    example = holding_example(tmp_path / "shown", iterations=2, seed=11)
    assert pool.finished(pool.run("train", run="shown", config=str(example))).state.is_completed()
    with pool.client() as client:
        written = sorted(client.read_artifacts(), key=lambda one: one.created)
    artifacts = {one.key: one for one in written if one.key and one.key.startswith("shown")}  # the latest of each
    row = next(row for row in json.loads(artifacts["shown-metrics"].data) if row["metric"] == "reward/score")
    assert float(row["iteration 2"]) != float(row["iteration 1"])
    assert re.search(r"^- `gold -?\d\.\d{3}  win \d\.\d{3}` \*\*.+\*\* ", artifacts["shown-samples"].data, re.MULTILINE)


def test_worker_and_flow_killed_in_the_second_iteration(pool, tmp_path):
    example = holding_example(tmp_path / "vanishing", iterations=3, seed=21)
    schedule = pool.schedule(10, run="vanishing", config=str(example))
    pool.wait(lambda: len(pool.states("vanishing")) == 2, "iteration 1")
    with pool.held():  # the flow run of iteration 2 has yet to import torch
        pool.in_the_middle()
        pool.kill("worker")
    assert len(pool.states("vanishing")) == 2 and not verify(Store(pool.store), "vanishing")[1]
    pool.start_worker()
    pool.wait(lambda: not pool.scheduled(schedule), "the schedule's end")

    begun = [pool.finished(one) for one in pool.flow_runs("vanishing")]
    assert [one.name for one in begun] == [f"vanishing-iterate-{iteration:06d}" for iteration in (0, 1, 2, 2, 3)]
    assert [one.state.name for one in begun] == ["Completed", "Completed", "Crashed", "Completed", "Completed"]
    assert f"no heartbeat for {HEARTBEATS_MISSED} s" in begun[2].state.message

    local = tmp_path / "local"
    assert train(pool, example, "--store", str(local)).wait(300) == 0
    assert_same_bytes(open_run(Store(pool.store), "vanishing"), open_run(Store(local), "vanishing"))


def test_a_schedule_that_fires_while_an_iteration_takes_long(pool, tmp_path):
    example = holding_example(tmp_path / "slow", iterations=3, seed=31)
    schedule = pool.schedule(6, run="slow", config=str(example))
    pool.wait(lambda: pool.states("slow"), "iteration 0")
    with pool.held():
        pool.in_the_middle()
        pool.wait(lambda: pool.queued("slow") >= 3, "three more in the queue")
        assert pool.states("slow") == ["000000.json"]
    pool.wait(lambda: not pool.scheduled(schedule), "the schedule's end")
    begun = [pool.finished(one) for one in pool.flow_runs("slow")]
    assert [one.name for one in begun] == [f"slow-iterate-{iteration:06d}" for iteration in range(4)]
    assert all(one.state.is_completed() for one in begun)
    assert all(before.end_time <= after.start_time for before, after in pairwise(begun))
    assert open_run(Store(pool.store), "slow").iterations() == [0, 1, 2, 3]
    assert pool.wait(lambda: not pool.queued("slow"), "an empty queue")


def test_progress_of_what_takes_long(pool, monkeypatch):
    monkeypatch.setattr(page, "EVERY", 0)

    @flow
    def long():
        with page.progress("rollout of iteration 1"):
            for _ in progress_bar(range(4), desc="responses"):
                time.sleep(0.2)
        return FlowRunContext.get().flow_run.id

    with temporary_settings({PREFECT_API_URL: pool.api}):
        begun = long()
    with pool.client() as client:
        (artifact,) = [one for one in client.read_artifacts() if one.flow_run_id == begun]
    assert artifact.type == "progress" and artifact.description == "rollout of iteration 1: responses"
    assert artifact.data == 100


@pytest.mark.parametrize("deployment, parameters, message", [
    ("iterate", {"run": "No Name"}, "Validation failed for field 'run'"),
    ("iterate", {"run": "x", "overrides": {"iterations": "many"}}, "Validation failed for field 'overrides.iterations'"),
    ("stage", {"run": "x", "stage": "gea", "iteration": 1}, "Validation failed for field 'stage'"),
    ("stage", {"run": "x", "stage": "gae", "iteration": "one"}, "Validation failed for field 'iteration'"),
    ("train", {"run": "x", "config": {"environment": {"id": 3}}}, "Validation failed for field 'config.environment.id'"),
    ("train", {"name": "x"}, "'run' is a required property"),
])
def test_parameters_of_the_wrong_type(pool, deployment, parameters, message):
    with pytest.raises(PrefectHTTPStatusError, match=r"409|422") as error:
        pool.run(deployment, **parameters)
    assert message in str(error.value)


@pytest.mark.parametrize("parameters, message", [
    ({"run": "nobody"}, "no run 'nobody' in"),
    ({"run": "x", "store": "/nowhere/store"}, "store /nowhere/store: no such folder on"),
    ({"run": "x", "config": "no/such"}, "no/such: no such folder or file"),
])
def test_what_only_the_worker_can_know(pool, parameters, message):
    failed = pool.finished(pool.run("iterate", **parameters))
    assert failed.state.is_failed() and message in failed.state.message


@pytest.mark.parametrize("settings, message", [
    ({"PREFECT_API_AUTH_STRING": "admin:wrong"}, "PREFECT_API_AUTH_STRING is not the server's PREFECT_SERVER_API_AUTH"),
    ({"PREFECT_API_URL": "http://127.0.0.1:9/api"}, "Prefect at http://127.0.0.1:9/api: "),
    ({"PREFECT_API_URL": ""}, "PREFECT_API_URL is not set"),
])
def test_a_server_that_cannot_be_reached(guarded, settings, message):
    refused = subprocess.run([sys.executable, "-m", "flows.orchestration.automations"], env=guarded | settings | {
        "PREFECT_CLIENT_MAX_RETRIES": "0"}, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 1 and message in refused.stderr and "Traceback" not in refused.stderr


def test_a_port_that_is_taken(pool):
    refused = subprocess.run([sys.executable, "-m", POOL, "--port", str(pool.port)], env=pool.environment,
                             capture_output=True, text=True, timeout=120)
    assert refused.returncode == 1 and f"make pool: port {pool.port} is taken" in refused.stderr


def test_automations_are_there_once(pool):
    with pool.client() as client:
        assert sorted(one.name for one in client.read_automations()) == [
            "baton-missed-heartbeats", "baton-never-started", "baton-overdue", "baton-stuck-cancelling"]
        (old,) = (one for one in automations() if one.name == "baton-stuck-cancelling")
        client.create_automation(old.model_copy(update={"name": "baton-undead"}))  # as an older version had it
    again = [sys.executable, "-m", "flows.orchestration.automations"]
    subprocess.run([*again, "--patience", "90"], env=pool.environment, check=True, timeout=120)
    with pool.client() as client:
        there = {one.name: one for one in client.read_automations()}
    assert len(there) == 4 and there["baton-missed-heartbeats"].trigger.within.total_seconds() == 90
    subprocess.run(again, env=pool.environment, check=True, timeout=120)  # other tests wait for it


def test_server_killed_in_the_middle_of_a_local_run(pool, tmp_path):
    example = holding_example(tmp_path / "alone", iterations=4, seed=41)
    assert train(pool, example, "--iterations", "1").wait(300) == 0
    with pool.without_server(lambda: train(pool, example, "--iterations", "3", PREFECT_CLIENT_MAX_RETRIES="1")) as begun:
        _, said = begun.communicate(timeout=300)
    assert begun.returncode == 1
    assert f"baton: Prefect at {pool.api}: " in said and "what was committed is whole" in said
    assert open_run(Store(pool.store), "alone").iterations() == [0, 1, 2, 3]  # it trained on
    assert not verify(Store(pool.store), "alone")[1]
    assert train(pool, example).wait(300) == 0
    assert open_run(Store(pool.store), "alone").iterations() == [0, 1, 2, 3, 4]


def test_server_killed_in_the_middle_of_a_pooled_run(pool, tmp_path):
    example = holding_example(tmp_path / "pooled", iterations=2, seed=51)
    assert pool.finished(pool.run("iterate", run="pooled", config=str(example))).state.is_completed()
    with pool.without_server(lambda: pool.run("iterate", run="pooled")) as begun:
        pool.wait(lambda: len(pool.states("pooled")) == 2, "iteration 1, without a server")
        assert not verify(Store(pool.store), "pooled")[1]
    assert pool.finished(begun).state.is_completed()
    assert pool.finished(pool.run("iterate", run="pooled")).state.is_completed()
    assert open_run(Store(pool.store), "pooled").iterations() == [0, 1, 2]

"""Baton on a work pool, with real processes on loopback: what deployments do, what the page shows, what is refused."""

import json
import re
import subprocess
import sys
import time
from itertools import pairwise

import pytest
from conftest import free_port
from pool import Pool, holding_example, language_example
from prefect import flow
from prefect.context import FlowRunContext
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling

from flows.orchestration import page
from flows.orchestration.automations import automations
from flows.runs.run import open_run
from flows.runs.verify import verify
from flows.store.store import Store
from stages.ops.progress import progress_bar

POOL = "flows.orchestration.pool"


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
    assert "(found rollout, gae, ppo)" in said[0]


def test_what_a_person_reads_on_the_page(pool, tmp_path):
    example = language_example(tmp_path / "shown", iterations=2, seed=11)
    assert pool.finished(pool.run("train", run="shown", config=str(example))).state.is_completed()
    with pool.client() as client:
        written = sorted(client.read_artifacts(), key=lambda one: one.created)
    artifacts = {one.key: one for one in written if one.key and one.key.startswith("shown")}  # the latest of each
    row = next(row for row in json.loads(artifacts["shown-metrics"].data) if row["metric"] == "reward/score")
    assert float(row["iteration 2"]) != float(row["iteration 1"])
    assert "### shown: nothing could be checked, it takes 6 iterations" in artifacts["shown-doctor"].data
    assert re.search(r"^\| evaluate/gold \| -?\d.*\| -?\d.*\|$", artifacts["shown-doctor"].data, re.MULTILINE)
    trained = pool.wait(lambda: made if len(made := pool.assets("shown").get("ppo", [])) == 2 else None, "its asset events")
    assert [payload["iteration"] for payload, _ in trained] == [1, 2]
    ppo, sources = open_run(Store(pool.store), "shown").state(2).artifacts["ppo"], {"gae", "rollout", "value"}
    assert trained[-1][0]["artifact"] == str(ppo) and trained[-1][1] == sources
    assert re.search(r"^- `gold -?\d\.\d{3}  win \d\.\d{3}` \*\*.+\*\* ", artifacts["shown-samples"].data, re.MULTILINE)


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


def test_without_a_page_nothing_is_done_for_it(monkeypatch):
    """Settings of Prefect take 30 ms of the interpreter to make, in every iteration."""
    monkeypatch.setattr(page, "temporary_settings", lambda settings: pytest.fail("settings were made"))
    page.report(None, None, None)
    page.materialized(None, None, ())


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

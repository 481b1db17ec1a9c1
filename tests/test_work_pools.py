"""Stages and shards on work pools: real workers, the bytes of a run in one process, and what is said when there is none."""

import subprocess
import sys

import pytest
from conftest import assert_same_bytes
from pool import Pool, language_example, train

from flows.runs.run import open_run
from flows.runs.verify import verify
from flows.store.store import Store

PLACED = "execution.placement={rollout: sampling, reference: baton, reward: baton, value: baton, gae: baton, ppo: baton}"


@pytest.fixture(scope="module")
def pools(pool):
    """The pool `baton`, and another one beside it, `sampling`, each with a worker."""
    create = [sys.executable, "-m", "prefect", "work-pool", "create", "sampling", "--type", "process"]
    subprocess.run(create, env=pool.environment, check=True, capture_output=True)
    pool.processes.start("sampler", "prefect", "worker", "start", "--pool", "sampling", "--limit", "2")
    return pool


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    return language_example(tmp_path_factory.mktemp("examples") / "placed", iterations=1, seed=5)


@pytest.fixture(scope="module")
def alone(example, tmp_path_factory, pool):
    """Settings → the run of the example in one process with them."""
    made = {}

    def of(*settings: str):
        if settings not in made:
            store = tmp_path_factory.mktemp("alone") / "store"
            assert finished(pool, example, *settings, store=store)[0] == 0
            made[settings] = open_run(Store(str(store)), "placed")
        return made[settings]

    return of


def finished(pool: Pool, example, *settings: str, store, **environment: str) -> tuple[int, str]:
    """Exit code of a training, and what it prints."""
    more = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "flows.cli.main", "train", str(example), "--quiet", "--store", str(store), *more]
    environment = {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL"} | environment  # as the command has it by itself
    done = subprocess.run(command, env=pool.environment | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, timeout=600)
    return done.returncode, done.stdout


def placed_on(pool: Pool, work_pool: str) -> list[str]:
    """Names of the flow runs that its workers have made."""
    with pool.client() as client:
        return sorted(run.name for run in client.read_flow_runs()
                      if run.work_pool_name == work_pool and run.state.is_completed())


def test_stages_on_two_pools_give_the_bytes_of_a_local_run(pools, example, alone, tmp_path):
    code, error = finished(pools, example, PLACED, store=tmp_path / "store")
    assert code == 0, error
    assert_same_bytes(open_run(Store(str(tmp_path / "store")), "placed"), alone())
    assert placed_on(pools, "sampling") == ["rollout-000001"]
    assert placed_on(pools, "baton") == ["gae-000001", "ppo-000001", "reference-000001", "reward-000001", "value-000001"]


def test_shards_on_a_pool(pools, example, alone, tmp_path):
    settings = ("execution.shards=2", "gae.estimator=rloo", "rollout.responses_per_prompt=2", "value=null")
    code, error = finished(pools, example, *settings, "execution.runner=prefect", "execution.work_pool=sampling",
                           store=tmp_path / "store")
    assert code == 0, error
    assert_same_bytes(open_run(Store(str(tmp_path / "store")), "placed"), alone(*settings))
    assert {"rollout-000001-1of2", "rollout-000001-2of2", "reward-000001-2of2"} <= set(placed_on(pools, "sampling"))


KILLER = '''
import os, pathlib, signal


def score(prompts, responses):
    """Kills its process the first time that it is a worker's."""
    flag = pathlib.Path("{flag}")
    if "PREFECT__FLOW_RUN_ID" in os.environ and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(len(response)) for response in responses]
'''


def test_a_flow_run_that_is_killed_is_made_again_alone(pools, tmp_path):
    example = language_example(tmp_path / "killed", iterations=1, seed=6)
    (example / "killer.py").write_text(KILLER.format(flag=tmp_path / "flag"))
    settings = ("reward.components={length: {source: 'killer.py:score'}}", "iterations=1")
    code, error = finished(pools, example, *settings, "execution.placement={reward: sampling}", store=tmp_path / "store")
    assert code == 0 and (tmp_path / "flag").exists(), error
    assert "reward: its flow run on work pool 'sampling' has crashed" in error
    assert not verify(Store(str(tmp_path / "store")), "killed")[1]
    assert sorted(run.state.type.value for run in flow_runs_of(pools, tmp_path / "store")) == ["COMPLETED", "CRASHED"]


SLEEPER = '''
import os, pathlib, time


def score(prompts, responses):
    """Sleeps in a worker's process until the flag is gone."""
    flag = pathlib.Path("{flag}")
    while "PREFECT__FLOW_RUN_ID" in os.environ and flag.exists():
        flag.write_text("asleep")
        time.sleep(0.1)
    return [float(len(response)) for response in responses]
'''


def test_a_run_that_is_terminated_ends_its_flow_run(pools, tmp_path):
    """And the same command goes on."""
    example, flag = language_example(tmp_path / "ended", iterations=1, seed=7), tmp_path / "flag"
    (example / "sleeper.py").write_text(SLEEPER.format(flag=flag))
    settings = ("reward.components={length: {source: 'sleeper.py:score'}}", "execution.placement={reward: sampling}")
    flag.touch()
    process = train(pools, example, "--store", str(tmp_path / "store"), *(w for one in settings for w in ("--set", one)))
    pools.wait(lambda: flag.read_text(), "the reward function")
    process.terminate()
    assert process.wait(120) == 143, process.stderr.read()
    (begun,) = flow_runs_of(pools, tmp_path / "store")
    assert pools.finished(begun).state.is_cancelled()
    flag.unlink()
    code, error = finished(pools, example, *settings, store=tmp_path / "store")
    assert code == 0, error
    assert open_run(Store(str(tmp_path / "store")), "ended").last().iteration == 1


def flow_runs_of(pool: Pool, store) -> list:
    """Of the flow `perform`, about that store."""
    with pool.client() as client:
        return [run for run in client.read_flow_runs() if run.parameters.get("call", {}).get("store") == str(store)]


@pytest.mark.parametrize("environment, settings, code, words", [
    ({"PREFECT_API_URL": ""}, ["execution.placement={rollout: sampling}"], 2,
     "work pool 'sampling': PREFECT_API_URL is not set, and the server of this command alone has no pools"),
    ({}, ["execution.runner=prefect", "execution.shards=2", "execution.work_pool=gpu"], 2,
     "no work pool 'gpu' at"),
])
def test_no_such_pool(pools, example, tmp_path, environment, settings, code, words):
    found, error = finished(pools, example, *settings, store=tmp_path / "store", **environment)
    assert found == code and words in error and "Traceback" not in error


def test_no_worker(pools, example, tmp_path):
    """It says what it waits for, gives up in time, and leaves no flow run behind."""
    create = [sys.executable, "-m", "prefect", "work-pool", "create", "empty", "--type", "process"]
    subprocess.run(create, env=pools.environment, check=True, capture_output=True)
    code, error = finished(pools, example, "execution.placement={rollout: empty}", "execution.worker_timeout=40",
                           store=tmp_path / "store")
    assert code == 1 and "Traceback" not in error
    assert "rollout-000001 waits for a worker of work pool 'empty'" in error
    assert "none is online: prefect worker start --pool empty" in error
    assert "work pool 'empty' has had no worker online for 40 s (execution.worker_timeout)" in error
    with pools.client() as client:
        (left,) = [run for run in client.read_flow_runs() if run.work_pool_name == "empty"]
    assert left.state.is_cancelled()


@pytest.mark.parametrize("change, name, words", [
    ({"version": 99}, "ConfigError", "call of gae, version 99: this Baton has version"),
    ({"store": "/nowhere/store"}, "ConfigError", "store /nowhere/store: no such folder on"),
    ({"colour": "red"}, "ConfigError", "not a call of a stage: colour"),
])
def test_a_worker_that_cannot_make_it(pools, alone, change, name, words):
    from flows.again import call_again

    call = call_again(alone(), "gae", 1, ()).model_dump(mode="json")
    failed = pools.finished(pools.run("perform", call=call | change))
    assert failed.state.name == name and words in failed.state.message

"""Servers, workers and flow runs that are killed on a work pool, with real processes on loopback: nothing is lost."""

import signal
import subprocess
import sys
from contextlib import contextmanager

import psutil
from conftest import assert_same_bytes, free_port
from pool import HEARTBEATS_MISSED, Pool, holding_example, train

from flows.runs.run import open_run
from flows.runs.verify import verify
from flows.store.store import Store

POOL = "flows.orchestration.pool"


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


def test_make_pool_ends_all_that_it_started_and_what_its_death_left(tmp_path):
    pool = Pool(tmp_path / "made", free_port())  # nothing of it is started but by make pool
    example = holding_example(tmp_path / "begun", iterations=1, seed=61)
    with pool.held(), made(pool) as (command, family):
        left = pool.run("iterate", run="begun", config=str(example))
        pool.wait(lambda: pool.committed("input.function"), "a flow run to be at work")
        names = " ".join(word for process in family() for word in process.cmdline())
        assert all(name in names for name in ("prefect server", "mlflow server", "prefect worker", "prefect.engine"))
        for process in family():
            process.kill()
        command.kill()
    with pool.held(), made(pool) as (command, family):
        ended = pool.finished(left)
        said = ("its worker was ended", "no heartbeat for 60 s")  # the latter first where the pool takes a minute to come up
        assert ended.state.is_crashed() and any(words in ended.state.message for words in said)
        evaluates = pool.run("iterate", run="begun")
        pool.wait(lambda: pool.read(evaluates).state.is_running(), "the next flow run, which the dead one does not block")
        there = family()
        command.send_signal(signal.SIGINT)
        command.send_signal(signal.SIGINT)  # of somebody who is in a hurry
        command.communicate(timeout=120)
        assert command.returncode == 0
        assert not [process for process in there if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


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

"""MLflow as a mirror: one run, every metric once, samples, the registered actor; and nobody waits for it."""

import json
import shlex
import shutil
import sqlite3
import subprocess
import threading
import time
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import mlflow
import pytest
from conftest import TRACKED
from mlflow.entities import NoOpSpan
from mlflow.exceptions import MlflowException
from test_inspect import HOSTILE

from flows.cli.main import run_command
from flows.runs.run import changed, open_run
from flows.store.store import Store
from flows.tracking.client import Client, _Retried, timings
from flows.tracking.logged_models import LoggedModels
from flows.tracking.machine import THREAD, Machine
from flows.tracking.tracking_uri import how_to_open, is_mirrored
from flows.views.report import report
from flows.views.samples import Sample
from flows.views.visible import visible
from schemas.errors import TrackingError
from schemas.tables import Rewards, Rollouts, Samples


def manifests(run, state):
    return {stage: run.store.manifest(ref) for stage, ref in state.artifacts.items()}


def client_of(store):
    return mlflow.MlflowClient(f"sqlite:///{store / 'mlflow.db'}")


def only_run(client):
    (found,) = client.search_runs([client.get_experiment_by_name("baton").experiment_id])
    return found


def points(client, run):
    """Those of the run, without what its machine was used for."""
    return {key: [(p.step, p.value) for p in client.get_metric_history(run.info.run_id, key)] for key in run.data.metrics
            if not key.startswith("system/")}


def test_every_metric_of_every_stage_is_there_once(trained):
    store = trained[1]
    run, client = open_run(Store(store), "tiny"), client_of(store)
    mirrored = only_run(client)
    expected: dict = {}
    for state in run.states():
        for key, value in (state.metrics | timings(state, manifests(run, state))).items():
            expected.setdefault(key, {})[state.iteration] = value
    found = points(client, mirrored)
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert len(found[key]) == len(values) and dict(found[key]) == pytest.approx(values), key
    assert mirrored.data.params["ppo.learning_rate"] == "0.001"
    assert mirrored.info.run_name == "tiny" and mirrored.info.status == "FINISHED"


def test_samples_and_the_best_actor(trained, tmp_path):
    store = trained[1]
    run, client = open_run(Store(store), "tiny"), client_of(store)
    paths = [item.path for item in client.list_artifacts(only_run(client).info.run_id, "samples")]
    assert paths == ["samples/iteration-000000.json", "samples/iteration-000002.json"]
    file = client.download_artifacts(only_run(client).info.run_id, paths[1], str(tmp_path))
    table = json.loads(Path(file).read_text())
    assert "response" in table["columns"] and len(table["data"]) == 6
    version = client.get_model_version_by_alias("baton-tiny", "last")
    assert version.tags["baton.artifact"] == str(run.last().actor.artifact)
    assert version.tags["baton.folder"].endswith("/actor")
    best = max((run.state(i) for i in (0, 2)), key=lambda state: (state.metrics["evaluate/gold"], state.iteration))
    version = client.get_model_version_by_alias("baton-tiny", "best")
    assert version.tags["baton.artifact"] == str(best.actor.artifact)
    assert version.tags["baton.iteration"] == str(best.iteration)


def test_an_evaluated_actor_is_a_logged_model_that_can_be_ranked(trained):
    """By MLflow's own search; what was measured of other things than the actor is the run's alone."""
    store = trained[1]
    run, client = open_run(Store(store), "tiny"), client_of(store)
    mirrored = only_run(client)
    best_first = client.search_logged_models([mirrored.info.experiment_id],
                                             order_by=[{"field_name": "metrics.evaluate/kl", "ascending": False}])
    states = sorted((run.state(i) for i in (0, 2)), key=lambda state: -state.metrics["evaluate/kl"])
    assert [model.tags["baton.artifact"] for model in best_first] == [str(state.actor.artifact) for state in states]
    for model, state in zip(best_first, states, strict=True):
        measured = {key: value for key, value in state.metrics.items() if key.startswith("evaluate/")}
        assert {metric.key: metric.value for metric in model.metrics} == pytest.approx(measured)
        assert {(metric.dataset_name, metric.dataset_digest) for metric in model.metrics} == {
            ("heldout_prompts", run.inputs["heldout_prompts"].identity[:36])}
    outputs = {(output.model_id, output.step) for output in mirrored.outputs.model_outputs}
    assert outputs == {(model.model_id, state.iteration) for model, state in zip(best_first, states, strict=True)}


def test_a_sample_is_a_trace_with_its_rewards(trained):
    store = trained[1]
    run, client = open_run(Store(store), "tiny"), client_of(store)
    mirrored = only_run(client)
    traces = client.search_traces(locations=[mirrored.info.experiment_id], run_id=mirrored.info.run_id)
    found = {(trace.info.tags["baton.stage"], trace.info.tags["baton.iteration"], root.attributes["row_id"]): (
        root.inputs["prompt"], root.outputs["response"], {each.name: each.value for each in trace.info.assessments})
        for trace in traces for root in [trace.data.spans[0]]}
    expected = {}
    for state in (run.state(0), run.state(2)):
        rows = run.store.table(state.artifacts["evaluate"], Samples)
        for i in range(len(rows)):
            given = {name: float(getattr(rows, name)[i]) for name in ("gold", "score", "kl", "win")}
            expected["evaluate", str(state.iteration), i] = (rows.prompt[i], rows.response[i], given)
    rows, rewards = (run.store.table(run.state(2).artifacts[stage], kind)
                     for stage, kind in (("rollout", Rollouts), ("reward", Rewards)))
    for i in range(len(rows)):
        given = {"reward": float(rewards.score[i])} | {
            f"reward.{name}": float(values[i]) for name, values in rewards.components.items()}
        expected["rollout", "2", i] = (rows.prompt[i], rows.response[i], given)
    assert found.keys() == expected.keys() and len(traces) == len(expected)
    for key, (prompt, response, given) in expected.items():
        assert found[key][:2] == (visible(prompt, newlines=True), visible(response, newlines=True))
        assert found[key][2] == pytest.approx(given), key


def test_an_evaluation_that_was_begun_is_logged_once(trained, tmp_path):
    """A mirror that ended between traces and table."""
    run, uri = open_run(Store(trained[1]), "tiny"), f"sqlite:///{tmp_path / 'mlflow.db'}"
    first = Client(run, uri)
    first.bring_to(run.last())
    client, place = first.client, [first.experiment_id]
    before = client.search_traces(locations=place, run_id=first.run_id, include_spans=False)
    client.set_tag(first.run_id, "baton.shown", "0")
    (table,) = tmp_path.glob("mlflow-artifacts/**/samples/iteration-000002.json")
    table.unlink()
    Client(run, uri).bring_to(run.last())
    after = client.search_traces(locations=place, run_id=first.run_id, include_spans=False)
    assert table.is_file() and len(after) == len(before) > 0
    assert len({trace.info.trace_id for trace in [*before, *after]}) > len(before)  # those of the table were made again
    assert len(client.search_logged_models(place)) == 2


def test_metrics_do_not_wait_for_models_and_samples(trained, tmp_path):
    """While a newer state waits, what takes MLflow longer is left for later."""
    run, uri = open_run(Store(trained[1]), "tiny"), f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = Client(run, uri)
    assert not client.bring_to(run.last(), newer=lambda: True)
    mirrored = client.client.get_run(client.run_id)
    assert mirrored.info.status == "FINISHED" and "baton.doctor" in mirrored.data.tags
    assert mirrored.data.metrics["evaluate/gold"] == run.last().metrics["evaluate/gold"]
    assert not client.client.search_logged_models([client.experiment_id])
    again = Client(run, uri)
    assert again.bring_to(run.last()) and len(again.client.search_logged_models([client.experiment_id])) == 2


def test_a_server_that_refuses_models_has_every_metric(trained, tmp_path, monkeypatch):
    run, uri, said = open_run(Store(trained[1]), "tiny"), f"sqlite:///{tmp_path / 'mlflow.db'}", []

    def refused(*_):
        raise MlflowException("no such endpoint")

    monkeypatch.setattr(LoggedModels, "of", refused)
    mirror = _Retried(run, uri, live=True, answer=said.append)
    for iteration in (0, 1, 1):
        mirror.bring_to(iteration)
    threads = [thread for thread in threading.enumerate() if thread.name == THREAD]
    mirror.close()
    assert said == ["at 0", "error no such endpoint", "at 1"] and mirror.failed and len(threads) == 1
    found = only_run(mlflow.MlflowClient(uri)).data.metrics
    assert found["reward/score"] == run.state(1).metrics["reward/score"]


def test_text_of_a_model_in_traces_and_tables(trained, tmp_path, monkeypatch):
    run, uri = open_run(Store(trained[1]), "tiny"), f"sqlite:///{tmp_path / 'mlflow.db'}"
    hostile = [Sample(text, text, {"row_id": i}, {"gold": float(i)}) for i, text in enumerate(HOSTILE)]
    monkeypatch.setattr("flows.tracking.traces.evaluated", lambda *_: hostile)
    client = Client(run, uri)
    client.bring_to(run.state(0))
    traces = client.client.search_traces(locations=[client.experiment_id], run_id=client.run_id)
    found = {trace.info.assessments[0].value: trace.data.spans[0] for trace in traces}
    for i, text in enumerate(HOSTILE):
        shown = visible(text, newlines=True)
        assert (found[i].inputs, found[i].outputs) == ({"prompt": shown}, {"response": shown})


def test_traces_that_do_not_arrive_are_an_error(trained, tmp_path, monkeypatch):
    """MLflow logs it, and raises nothing."""
    run, uri = open_run(Store(trained[1]), "tiny"), f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = Client(run, uri)
    monkeypatch.setattr("flows.tracking.traces.mlflow.start_span", no_span)
    with pytest.raises(TrackingError, match="0 of 6 traces of iteration 0 have arrived"):
        client.bring_to(run.last())
    assert not list(tmp_path.glob("mlflow-artifacts/**/samples/*"))


@contextmanager
def no_span(*_, **__):
    yield NoOpSpan()


def test_the_machines_use_is_logged_while_a_run_trains(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    run, uri = open_run(Store(trained[1]), "tiny"), f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = Client(run, uri)
    machine = Machine(client.client, uri)
    machine.watch(client.run_id)
    deadline = time.monotonic() + 60
    while not (keys := client.client.get_run(client.run_id).data.metrics.keys()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    machine.end()
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= keys
    assert THREAD not in {thread.name for thread in threading.enumerate()}


def test_the_data_the_report_and_what_is_wrong(trained, tmp_path):
    store = trained[1]
    run, client = open_run(Store(store), "tiny"), client_of(store)
    mirrored = only_run(client)
    given = {entry.dataset.name: (entry.dataset.digest, entry.tags[0].value) for entry in mirrored.inputs.dataset_inputs}
    roles = ("demonstrations", "pairs", "heldout_pairs", "prompts", "heldout_prompts")
    assert given == {role: (run.inputs[role].identity[:36], role) for role in roles}
    assert mirrored.data.tags["baton.doctor"] == "nothing could be checked, it takes 6 iterations, there are 2"
    page = Path(client.download_artifacts(mirrored.info.run_id, "report.html", str(tmp_path))).read_text(encoding="utf-8")
    assert page == report(run)


def test_a_run_whose_report_cannot_be_made_is_finished_all_the_same(copied, capsys):
    store = copied[1]
    run = open_run(Store(store), "tiny")
    damaged = Path(run.store.place(run.state(1).artifacts["gae"], "advantages.parquet"))
    damaged.write_bytes(b"x" * damaged.stat().st_size)
    (store / "mlflow.db").unlink()
    assert run_command(["mlflow-sync", "tiny", "--store", str(store)]) == 0
    mirrored = only_run(client_of(store))
    assert mirrored.info.status == "FINISHED" and "advantages.parquet" in mirrored.data.tags["baton.doctor"]
    assert client_of(store).get_model_version_by_alias("baton-tiny", "last")


@pytest.mark.parametrize("name, iteration", [("evaluate/kl", 2), ("rollout/logprob", None), ("nothing/there", "none")])
def test_the_best_is_by_the_metric_that_is_named(copied, capsys, name, iteration):
    store = copied[1]
    code = run_command(["mlflow-sync", "tiny", "--store", str(store), "--set", f"tracking.best={name}"])
    if iteration == "none":
        assert code == 2 and "tracking.best='nothing/there': no stage of this run measures it" in (
            capsys.readouterr().err)
        return
    run = open_run(Store(store), "tiny")
    expected = max((state for state in run.states() if name in state.metrics),
                   key=lambda state: (state.metrics[name], state.iteration))
    version = client_of(store).get_model_version_by_alias("baton-tiny", "best")
    assert code == 0 and version.tags["baton.iteration"] == str(expected.iteration)
    assert iteration in (None, expected.iteration)


def test_the_runs_page_says_what_it_was_made_of_and_when(trained):
    store = trained[1]
    run, client = open_run(Store(store), "tiny"), client_of(store)
    mirrored = only_run(client)
    created = datetime.fromisoformat(run.record.created).timestamp() * 1000
    last = max(datetime.fromisoformat(run.store.manifest(ref).created) for ref in run.last().artifacts.values())
    assert (mirrored.info.start_time, mirrored.info.end_time) == (created, last.timestamp() * 1000)
    note = mirrored.data.tags["mlflow.note.content"]
    assert f"in `{store}`" in note and f"- prompts: `{run.inputs['prompts'].short}`" in note
    assert mirrored.data.tags["baton.store"] == str(store)
    experiment = client.get_experiment(mirrored.info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def test_a_deleted_experiment_is_said_with_what_brings_it_back(copied, capsys):
    store = copied[1]
    client = client_of(store)
    experiment = only_run(client).info.experiment_id
    client.delete_experiment(experiment)
    assert run_command(["mlflow-sync", "tiny", "--store", str(store)]) == 1
    error = capsys.readouterr().err
    assert f"mlflow experiments restore --experiment-id {experiment} brings it back, --set tracking.experiment=NAME" in error
    assert run_command(["mlflow-sync", "tiny", "--store", str(store), "--set", "tracking.experiment=another"]) == 0
    client.restore_experiment(experiment)
    assert run_command(["mlflow-sync", "tiny", "--store", str(store)]) == 0


def test_a_store_of_any_name_and_a_command_that_can_be_pasted(trained, tmp_path):
    store = tmp_path / "a?b 'c' #d%20"
    shutil.copytree(trained[1], store, ignore=shutil.ignore_patterns("mlflow*"))
    assert run_command(["mlflow-sync", "tiny", "--store", str(store)]) == 0
    with sqlite3.connect(store / "mlflow.db") as database:
        assert database.execute("select count(*) from runs").fetchone() == (1,)
    assert sorted(path.name for path in tmp_path.iterdir()) == [store.name] and (store / "mlflow-artifacts").is_dir()
    uri = shlex.split(how_to_open(open_run(Store(store), "tiny")))[-1]
    client = mlflow.MlflowClient(uri)
    assert only_run(client).info.run_name == "tiny"


def test_a_second_start_doubles_nothing(copied):
    folder, store = copied
    client = client_of(store)
    before = points(client, only_run(client))
    (store / "runs" / "tiny" / "iterations" / "000002.json").unlink()
    assert run_command(["train", str(folder), "--store", str(store), "--quiet", *TRACKED]) == 0
    after = points(client, only_run(client))
    assert {k: len(v) for k, v in after.items()} == {k: len(v) for k, v in before.items()}
    aliases = {client.get_model_version_by_alias("baton-tiny", alias).version for alias in ("best", "last")}
    assert len(client.search_model_versions("name = 'baton-tiny'")) == len(aliases)


def test_a_server_that_is_away_stops_nothing_and_is_completed_later(example, prefect_server, tmp_path, capsys):
    store = tmp_path / "store"
    arguments = ["train", str(example), "--store", str(store), *TRACKED]
    away = [*arguments, "--set", "tracking.uri=http://127.0.0.1:9", "--iterations", "1"]
    assert run_command(away) == 0
    assert "training goes on without it" in capsys.readouterr().out
    assert not (store / "mlflow.db").exists()
    assert run_command(arguments) == 0
    found = points(client_of(store), only_run(client_of(store)))
    assert [step for step, _ in found["rollout/logprob"]] == [1, 2]
    assert [step for step, _ in found["evaluate/gold"]] == [0, 1, 2]


def test_a_mirror_that_cannot_begin_is_said(copied, tmp_path, monkeypatch, capsys):
    (tmp_path / "mlflow.py").write_text("raise RuntimeError('broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert run_command(["train", str(copied[0]), "--store", str(copied[1]), *TRACKED]) == 0
    assert "its process ended with code 1" in capsys.readouterr().out


def test_a_finished_run_completes_its_mirror(copied):
    """A database that has nothing of it yet: the next start brings everything."""
    folder, store = copied
    before = points(client_of(store), only_run(client_of(store)))
    uri = f"sqlite:///{store / 'other.db'}"
    elsewhere = [*TRACKED, "--set", f"tracking.uri={uri}"]
    assert run_command(["train", str(folder), "--store", str(store), "--quiet", *elsewhere]) == 0
    client = mlflow.MlflowClient(uri)
    assert points(client, only_run(client)) == before
    assert client.get_model_version_by_alias("baton-tiny", "best").version


def test_a_finished_run_whose_mirror_is_whole_asks_no_mlflow(copied, monkeypatch):
    """It is asked again where the database is gone, or the run is another of that name."""
    folder, store = copied
    command = ["train", str(folder), "--store", str(store), "--quiet", *TRACKED]
    assert run_command(command) == 0
    begun, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda arguments, **more: begun.append(arguments) or popen(arguments, **more))
    assert run_command(command) == 0 and not begun
    run = open_run(Store(store), "tiny")
    assert is_mirrored(changed(run, {"tracking": {"enabled": True}}), 2)
    assert not is_mirrored(changed(run, {"tracking": {"enabled": True}}), 3)
    (store / "mlflow.db").unlink()
    assert run_command(command) == 0 and len(begun) == 1 and (store / "mlflow.db").is_file()


def test_how_to_open_names_the_store(trained):
    command = f"mlflow ui --backend-store-uri sqlite:///{trained[1] / 'mlflow.db'}"
    run = changed(open_run(Store(trained[1]), "tiny"), {"tracking": {"enabled": True}})
    assert how_to_open(run) == command
    assert how_to_open(changed(run, {"tracking": {"enabled": False}})) is None

"""One stage's call, saved by a run, gives the run's bytes wherever it is performed; a chain makes the recorded calls."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
from conftest import VARIANTS, assert_same_bytes

from flows.chains import chain_of, warm_of
from flows.cli.command import TerminatedError, terminate
from flows.cli.main import run_command
from flows.orchestration.tasks import StageTasks
from flows.perform import perform
from flows.runs.run import open_run
from flows.store.attempt import folder_of
from flows.store.store import Store
from schemas.artifacts import Outputs, Produced, StageCall, call_of
from schemas.errors import StoreError
from schemas.settings import ExecutionConfig
from stages.ops.progress import progress_bar


def saved_calls(run):
    """(artifact, its call) of all that the run's stages wrote."""
    refs = dict.fromkeys(ref for state in run.states() for ref in state.artifacts.values())
    return [(ref, call_of(run.store.manifest(ref), run.store.uri)) for ref in refs]


def test_every_saved_call_is_json_and_gives_the_same_bytes(variants):
    for name in ("tiny", *VARIANTS):
        run = open_run(Store(variants[1]), name)
        for ref, saved in saved_calls(run):
            call = StageCall.model_validate_json(saved.model_dump_json())
            assert call == saved and call.recipe.ref == ref
            with closing(warm_of(call.kind, run.store, call.execution)) as warm:  # nothing of another call is warm
                produced = perform(call, run.store, warm, again=True)
            assert (produced.how, produced.different, produced.ref) == ("reproduced", {}, ref)
            recorded = run.store.manifest(ref)
            assert produced.metrics == recorded.metrics and produced.outputs == recorded.outputs
            assert Produced.model_validate_json(produced.model_dump_json()) == produced


def test_a_fresh_process_makes_what_the_run_made(copied):
    """The checkpoint of iteration 2 is gone; a process that is given its call alone makes it again."""
    root, run = copied[1], open_run(Store(copied[1]), "tiny")
    ref = run.state(2).actor.artifact
    manifest = run.store.manifest(ref)
    path = root.parent / "call.json"
    path.write_text(call_of(manifest, str(root)).model_dump_json())
    shutil.rmtree(root / folder_of(ref))
    out = subprocess.run([sys.executable, "-m", "flows.cli.main", "perform", str(path), "--json"], capture_output=True,
                         text=True, timeout=300, env={**os.environ, "PREFECT_API_URL": "http://127.0.0.1:9"})
    assert out.returncode == 0, out.stderr
    assert Produced.model_validate_json(out.stdout).how == "made"
    assert Store(root).manifest(ref).digests() == manifest.digests()


def test_the_call_that_a_command_prints_is_the_saved_one(variants, capsys):
    run = open_run(Store(variants[1]), "every_choice")
    for state in run.states():
        for stage, ref in state.artifacts.items():
            assert run_command(["stage", stage, "every_choice", "--iteration", str(state.iteration), "--print-call",
                                "--store", str(variants[1])]) == 0
            assert StageCall.model_validate_json(capsys.readouterr().out) == call_of(run.store.manifest(ref), run.store.uri)


@pytest.mark.parametrize("change, message", [
    (lambda call: call.update(version=99), "call of gae, version 99: this Baton has version 3"),
    (lambda call: call.update(stage="gea"), "this Baton has the stages base_model, sft"),
    (lambda call: call.pop("inputs"), "not a stage's call: inputs: Field required"),
    (lambda call: call.update(store="gs://b/x"), "gs:// is not supported"),
    (lambda call: call.update(store="no/such/folder"), "store no/such/folder: no such folder"),
    (lambda call: call.update(settings={}), "call of gae: settings.kl_coef: missing; baton stage gae RUN"),
    (lambda call: call["settings"].update(gamma=2), "call of gae: settings: gamma: Input should be less than"),
    (lambda call: call["inputs"].pop("rollouts"), "call of gae: inputs.rollouts: missing"),
    (lambda call: call["execution"].update(device="tpu"), "not a stage's call: execution.device")])
def test_a_call_that_cannot_be_performed(copied, tmp_path, capsys, change, message):
    run = open_run(Store(copied[1]), "tiny")
    call = call_of(run.store.manifest(run.state(1).artifacts["gae"]), run.store.uri).model_dump(mode="json")
    change(call)
    (tmp_path / "call.json").write_text(json.dumps(call))
    there = set(tmp_path.rglob("*"))
    assert run_command(["perform", str(tmp_path / "call.json")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert {path for path in tmp_path.rglob("*") if path.is_file()} <= there and not Path("no").exists()


def test_no_call_and_none_that_is_json(tmp_path, capsys):
    (tmp_path / "call.json").write_text("{")
    for name, message in (("call.json", "not a stage's call: Invalid JSON"), ("none.json", "No such file"),
                          ("", "Is a directory; expected a file with a stage's call")):
        assert run_command(["perform", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err


def test_a_call_names_its_store_for_a_process_in_another_folder(copied, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(copied[1].parent)
    monkeypatch.delenv("BATON_STORE", raising=False)
    printed = ["stage", "gae", "tiny", "--iteration", "1", "--print-call", "--store", copied[1].name]
    assert run_command(printed) == 0
    (tmp_path / "call.json").write_text(capsys.readouterr().out)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run_command(["perform", str(tmp_path / "call.json")]) == 0
    assert "found, it was committed before, 1 file" in capsys.readouterr().out
    assert run_command(["perform", str(tmp_path / "call.json"), "--again"]) == 0
    assert "reproduced, the same bytes, 1 file" in capsys.readouterr().out
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_what_a_function_prints_is_not_in_the_json(copied, tmp_path, capsys):
    """A judge that prints: the JSON on stdout is whole, its words are on stderr."""
    root = copied[1]
    (tmp_path / "loud.py").write_text("def gold(prompts, responses):\n    print('seen')\n    return [0.0] * len(prompts)\n")
    run_command(["stage", "evaluate", "tiny", "--iteration", "0", "--set", f"evaluate.judge={tmp_path / 'loud.py'}:gold",
                 "--print-call", "--store", str(root)])
    (tmp_path / "call.json").write_text(capsys.readouterr().out)
    assert run_command(["perform", str(tmp_path / "call.json"), "--json"]) == 0
    out, error = capsys.readouterr()
    assert json.loads(out)["how"] == "made" and "seen" in error


def test_an_input_has_no_call(trained):
    run = open_run(Store(trained[1]), "tiny")
    with pytest.raises(StoreError, match="holds no call"):
        call_of(run.store.manifest(run.inputs["prompts"]), run.store.uri)


def test_stages_side_by_side_give_the_same_bytes(trained, tmp_path, prefect_server):
    """`reference`, `reward` and `value`, each in a thread of its own."""
    arguments = ["train", str(trained[0]), "--store", str(tmp_path / "store"), "--quiet", "--set",
                 "execution.concurrent_stages=3", "--set", "tracking.enabled=false"]
    assert run_command(arguments) == 0
    assert_same_bytes(open_run(Store(tmp_path / "store"), "tiny"), open_run(Store(trained[1]), "tiny"))


# --- side by side ---

def side_by_side(perform_one, at_once, after=lambda: None):
    """What comes of three calls in a flow run of their own; `after` is called as soon as the flow goes on."""
    from prefect import flow

    calls = [StageCall(kind="language", stage=stage, version=1, settings={}, inputs={}, iteration=1, store="none",
                       execution=ExecutionConfig()) for stage in ("reference", "reward", "value")]

    @flow(name="three")
    def three():
        try:
            return StageTasks("three", perform_one, at_once)(*calls)
        finally:
            after()

    return three()


def produced_of(call):
    return Produced(ref=call.recipe.ref, how="made", outputs=Outputs(), metrics={}, seconds=0, files=1)


def test_as_many_run_at_once_as_are_allowed(prefect_server):
    """Three that wait for each other end; of three by two never more than two are at work."""
    together = threading.Barrier(3)

    def meets_the_others(call):
        together.wait(timeout=60)
        return produced_of(call)

    assert list(side_by_side(meets_the_others, 3)) == ["reference", "reward", "value"]
    at_work, most, lock = 0, 0, threading.Lock()

    def counted(call):
        nonlocal at_work, most
        with lock:
            at_work, most = at_work + 1, max(most, at_work + 1)
        time.sleep(0.2)
        with lock:
            at_work -= 1
        return produced_of(call)

    side_by_side(counted, 2)
    assert most == 2


def test_one_that_fails_lets_the_others_end_first(prefect_server):
    ended, failed = [], threading.Event()

    def fails(call):
        if call.stage == "reward":
            failed.set()
            raise StoreError("reward: of no use")
        assert failed.wait(60)
        time.sleep(0.2)
        ended.append(call.stage)
        return produced_of(call)

    with pytest.raises(StoreError, match="of no use"):
        side_by_side(fails, 3)
    assert sorted(ended) == ["reference", "value"]


def test_a_signal_ends_all_of_them_before_the_flow(prefect_server):
    """SIGTERM reaches the main thread alone; when it goes on none of the stages is at work."""
    at_work, begun = set(), threading.Barrier(3, action=lambda: os.kill(os.getpid(), signal.SIGTERM))

    def long(call):
        at_work.add(call.stage)
        try:
            begun.wait(60)
            for _ in progress_bar(range(100_000), call.stage):
                time.sleep(0.01)
        finally:
            time.sleep(0.2)
            at_work.remove(call.stage)
        return produced_of(call)

    left, before = [], signal.signal(signal.SIGTERM, terminate)
    try:
        with pytest.raises(TerminatedError):
            side_by_side(long, 3, after=lambda: left.append(set(at_work)))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert left == [set()]


# --- what the next iteration needs ---

class Recorded:
    """Performs calls by finding what a run has recorded; `changed` outputs replace those of a stage."""

    def __init__(self, run, **changed):
        self.run, self.changed = run, changed

    def __call__(self, *calls):
        return {call.stage: self._found(call) for call in calls}

    def _found(self, call):
        outputs = self.changed.get(call.stage, self.run.store.manifest(call.recipe.ref).outputs)
        return Produced(ref=call.recipe.ref, how="found", outputs=outputs, metrics={}, seconds=0, files=1)


@pytest.mark.parametrize("name", ["tiny", *VARIANTS])
def test_metrics_decide_nothing_of_the_next_iteration(variants, name):
    """Without a single metric the chain makes the recorded calls, and the recorded states but for their metrics."""
    run = open_run(Store(variants[1]), name)
    states, chain = run.states(), chain_of(run)
    plain = [state.model_copy(update={"metrics": {}, "seconds": 0, "best": None}) for state in states]
    assert chain.prepare(Recorded(run)) == plain[0]
    for before, after in zip(states, plain[1:], strict=False):
        before = before.model_copy(update={"best": None})  # of metrics, too
        assert chain.iteration(before, Recorded(run), "evaluate" in after.artifacts) == after


@pytest.mark.parametrize("stage, iteration", [("reward_bias", 0), ("reward", 1), ("gae", 2)])
def test_an_output_that_is_missing_stops_the_run(variants, stage, iteration):
    run = open_run(Store(variants[1]), "every_choice")
    perform_without, chain = Recorded(run, **{stage: Outputs()}), chain_of(run)
    with pytest.raises(StoreError, match=f"{stage}: its manifest holds no output"):
        if iteration:
            chain.iteration(run.state(iteration - 1), perform_without, "evaluate" in run.state(iteration).artifacts)
        else:
            chain.prepare(perform_without)

"""One stage's call, saved by a run, gives the run's bytes wherever it is performed; a chain makes the recorded calls."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import closing

import pytest
from click.testing import CliRunner
from conftest import VARIANTS, assert_same_bytes

from flows.chains import chain_of, warm_of
from flows.cli.main import run_command
from flows.perform import main, perform
from flows.runs.run import open_run
from flows.store.store import Store, folder_of
from schemas.artifacts import Outputs, Produced, StageCall, call_of
from schemas.errors import StoreError


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
    out = subprocess.run([sys.executable, "-m", "flows.perform", str(path)], capture_output=True, text=True, timeout=300,
                         env={**os.environ, "PREFECT_API_URL": "http://127.0.0.1:9"})
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
    (lambda call: call.update(store="gs://b/x"), "gs:// is not supported")])
def test_a_call_that_cannot_be_performed(copied, tmp_path, change, message):
    run = open_run(Store(copied[1]), "tiny")
    call = call_of(run.store.manifest(run.state(1).artifacts["gae"]), run.store.uri).model_dump(mode="json")
    change(call)
    (tmp_path / "call.json").write_text(json.dumps(call))
    result = CliRunner().invoke(main, [str(tmp_path / "call.json")])
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1


def test_no_call_and_none_that_is_json(tmp_path):
    (tmp_path / "call.json").write_text("{")
    for name, message in (("call.json", "not a stage's call: Invalid JSON"), ("none.json", "no such file")):
        result = CliRunner().invoke(main, [str(tmp_path / name)])
        assert result.exit_code == 2 and message in result.stderr


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
    plain = [state.model_copy(update={"metrics": {}, "seconds": 0}) for state in states]
    assert chain.prepare(Recorded(run)) == plain[0]
    for before, after in zip(states, plain[1:], strict=False):
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

"""What an iteration and a command cost, counted: as many calls at iteration 50 as at 5, no import that is not needed."""

import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import Future
from pathlib import Path

import pytest
from conftest import write_example
from control import write_control

from flows.cli.main import run_command
from flows.language import language_tasks
from flows.runs import rows
from flows.runs.run import Run, open_run
from flows.store import store as store_module
from flows.store.local import LocalFiles
from flows.store.store import Store
from flows.store.writer import Writer
from flows.tracking.client import Client
from schemas.config import parse_config

VERBS = ("read", "exists", "names", "walk", "local", "forget", "put_once", "begin", "sync", "publish", "remove", "holder")


@pytest.fixture
def calls(monkeypatch):
    """Every call that a process makes to a store on a disk: (verb, key)."""
    made = []

    def counted(verb, call):
        return lambda files, *arguments: made.append((verb, str(*arguments[:1]))) or call(files, *arguments)

    for verb in VERBS:
        monkeypatch.setattr(LocalFiles, verb, counted(verb, getattr(LocalFiles, verb)))
    return made


def per_iteration(calls, monkeypatch):
    """Counter of the verbs between one saved state and the next, by iteration; filled while something trains."""
    counts, save = {}, Run.save

    def saved(run, state):
        save(run, state)
        counts[state.iteration] = Counter(verb for verb, _ in calls)
        calls.clear()

    monkeypatch.setattr(Run, "save", saved)
    return counts


def at_once(writer, job):
    """Commits in the flow's own thread, so that calls are those of an iteration."""
    future = Future()
    future.set_result(job())
    return future


def test_an_iteration_asks_the_store_as_often_at_50_as_at_5(tmp_path, calls, monkeypatch, prefect_server):
    """With ten other runs in the store, MLflow and retention on; the store forgets most of what it has read meanwhile."""
    monkeypatch.setattr(store_module, "KNOWN", 24)
    monkeypatch.setattr(Writer, "later", at_once)
    example, store = write_control(tmp_path / "small", evaluate={"every": 0}, retention={"keep_last": 1}), tmp_path / "store"
    arguments = ["train", str(example), "--store", str(store), "--quiet"]
    assert run_command([*arguments, "--run", "other", "--iterations", "1"]) == 0
    for number in range(9):  # with the same checkpoints
        assert run_command(["fork", "other", "--at", "1", "--run", f"other{number}", "--store", str(store), "--quiet"]) == 0
    counts = per_iteration(calls, monkeypatch)
    assert run_command([*arguments, "--set", "tracking.enabled=true", "--iterations", "52"]) == 0
    assert counts[5] == counts[50] and counts[5].total() > 10
    assert counts[50]["walk"] == 0


def test_a_train_reads_the_record_of_its_run_once(tmp_path, calls, prefect_server):
    """The command line checks it and the flow works on what was checked."""
    example, store = write_control(tmp_path / "small", evaluate={"every": 0}), tmp_path / "store"
    for arguments, reads in (([str(example), "--iterations", "1"], 1), (["--run", "small", "--iterations", "2"], 1)):
        calls.clear()
        assert run_command(["train", *arguments, "--store", str(store), "--quiet"]) == 0
        assert [call for call in calls if call[1] == "runs/small/run.json" and call[0] == "read"] == [
            ("read", "runs/small/run.json")] * reads


def test_the_mirror_asks_mlflow_as_often_at_50_as_at_5(tmp_path, monkeypatch, prefect_server):
    """Each iteration in a process of its own, as on a work pool: it begins where the one before has ended."""
    example, store = write_control(tmp_path / "small", evaluate={"every": 0}), tmp_path / "store"
    assert run_command(["train", str(example), "--store", str(store), "--quiet", "--iterations", "60"]) == 0
    run = open_run(Store(store), "small")
    config = parse_config(run.config.model_dump(mode="json") | {"iterations": 60}, "small")
    run, uri = Run(run.store, run.record, config), f"sqlite:///{tmp_path / 'mlflow.db'}"

    def mirrored(iteration):
        client, asked = Client(run, uri), Counter()
        inner, client.client = client.client, Counted(client.client, asked)
        reading, run.store.files.read = run.store.files.read, lambda key: asked.update(["read"]) or reading(key)
        client.bring_to(run.state(iteration))
        run.store.files.read = reading
        assert inner.get_run(client.run_id).data.tags["baton.mirrored"] == str(iteration)
        return asked

    def begin():
        begun = Client(run, uri)
        begun.client = Counted(begun.client, asked := Counter())
        begun._end(begun.client.get_run(begun.run_id))
        return asked

    mirrored(4)
    at_5, begin_5 = mirrored(5), begin()
    mirrored(49)
    assert (mirrored(50), begin()) == (at_5, begin_5) and at_5.total() > 2


class Counted:
    """Counts the calls to an object by name."""

    def __init__(self, inner, counts):
        self._inner, self._counts = inner, counts

    def __getattr__(self, name):
        self._counts[name] += 1
        return getattr(self._inner, name)


def test_prompts_are_parsed_by_need(tmp_path, monkeypatch, prefect_server):
    """Of 2,000 prompts a rollout of 8 parses 8."""
    example, store = write_example(tmp_path / "tiny"), tmp_path / "store"
    (example / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Film {n}"}) + "\n" for n in range(2000)))
    parsed, rows_of = [], rows.rows_of
    monkeypatch.setattr(rows, "rows_of", lambda table: parsed.extend(rows_of(table)) or parsed[-len(table) :])
    rollout, during = language_tasks.TASKS["rollout"], []

    def counted(work):
        parsed.clear()
        made = rollout(work)
        during.append(len(parsed))
        return made

    monkeypatch.setitem(language_tasks.TASKS, "rollout", counted)
    assert run_command(["train", str(example), "--store", str(store), "--quiet", "--iterations", "2"]) == 0
    assert during == [8, 8]


COMMANDS = """
import sys
from flows.cli.main import run_command
store = ["--store", sys.argv[1]]
for arguments in (["runs"], ["show", "tiny"], ["show", "tiny", "--iteration", "1"], ["diff", "tiny", "tiny"],
                  ["gc", "--dry-run"], ["verify", "tiny"], ["show", "nobody"], ["rm", "nobody"]):
    run_command([*arguments, *store])
    heavy = {"torch", "prefect", "mlflow", "transformers", "datasets", "gymnasium"} & set(sys.modules)
    assert not heavy, (arguments, heavy)
run_command(["fork", "tiny", "--at", "1", "--run", "other", *store])
assert not {"prefect", "mlflow"} & set(sys.modules), "fork"
"""


def test_commands_that_print_import_neither_torch_nor_prefect(copied):
    out = subprocess.run([sys.executable, "-c", COMMANDS, str(copied[1])], capture_output=True, text=True, timeout=120,
                         cwd=Path(__file__).parents[1], env=os.environ)
    assert out.returncode == 0, out.stdout + out.stderr

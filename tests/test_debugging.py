"""Runs of the documents: the three of docs/debugging.md go wrong as the page says, and the commands of the walk work."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_document_commands import in_blocks

from flows.cli.main import run_command
from flows.runs.run import open_run
from flows.store.store import Store
from flows.views import open_run as open_view
from flows.views.doctor import examine

ROOT = Path(__file__).parents[1]
BROKEN = ROOT / "docs" / "examples" / "broken"
PAGE = ROOT / "docs" / "debugging.md"


@pytest.fixture(scope="module")
def broken(tmp_path_factory, prefect_server):
    """The store with the three."""
    store = tmp_path_factory.mktemp("broken") / "store"
    for name in ("first", "second", "third"):
        assert run_command(["train", str(BROKEN / f"{name}.yaml"), "--run", name, "--store", str(store), "--quiet", "--set",
                            "execution.threads=1", "--set", "tracking.enabled=false"]) == 0
    return store


def verdicts(store, name):
    run = open_run(Store(str(store)), name)
    return {verdict.name for verdict in examine(run, run.states()).verdicts}


def answers(store, name):
    """What the page's queries of that run answer."""
    queries = [words[2] for words in in_blocks(PAGE) if words[:2] == ["sql", name]]
    return [open_view(str(store), name).sql(query).to_arrow_table().to_pylist() for query in queries]


def test_the_first_has_a_reward_that_never_pays(broken, capsys):
    assert {"component-never-varies"} <= verdicts(broken, "first") <= {"component-never-varies", "critic-explains-nothing"}
    ((*rows,),) = answers(broken, "first")
    assert {row["score"] for row in rows} == {0.0} and "a" in {row["response"] for row in rows}  # the goal, and not paid
    (words,) = [words for words in in_blocks(PAGE) if words[0] == "rescore"]
    capsys.readouterr()
    assert run_command([*words, "--store", str(broken), "--json"]) == 0
    agreed = json.loads(capsys.readouterr().out)
    assert len(agreed) == 12 and all(row["before"] == 0 and row["after"] > 0.3 for row in agreed)


def test_the_second_takes_steps_that_are_too_long(broken):
    assert "kl-runs-away" in verdicts(broken, "second")
    first, second = (open_run(Store(str(broken)), "second").state(i).metrics for i in (1, 2))
    assert first["ppo/clip_fraction"] > 0.5 and first["ppo/approx_kl"] > 1
    assert second["reward/score"] < 0.5 * first["reward/score"]


def test_the_third_is_paid_for_what_nobody_wanted(broken):
    assert "gold-falls-while-reward-rises" in verdicts(broken, "third")
    last = open_run(Store(str(broken)), "third").last().metrics
    assert last["evaluate/score"] > 0.95 and last["evaluate/gold"] < 0.3
    ((*rows,),) = answers(broken, "third")
    assert [row["response"] for row in rows] == ["a"] * 4 and sum(row["judged"] == 0 for row in rows) == 3


def test_a_stage_again_prints_what_the_readme_shows(trained, tmp_path, capsys):
    store = shutil.copytree(trained[1], tmp_path / "store")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\$ (baton stage .+)\n(.+)$", text, re.M)
    assert len(shown) == 2
    for command, expected in shown:
        words = shlex.split(command.replace("reviews --iteration 3", "tiny --iteration 2"))[1:]
        assert run_command([*words, "--store", str(store)]) == 0
        pattern = re.escape(expected.replace("iteration 3", "iteration 2")).replace("gae/…", r"gae/\w+")
        assert re.match(pattern, " ".join(capsys.readouterr().out.split())), expected


def test_every_command_of_the_walk_works(trained, tmp_path, monkeypatch, capsys):
    """On a smaller run of the same name; but for what sets up the checkout, and the view that has no end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BATON_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    shutil.copytree(trained[0], tmp_path / "reviews")
    assert run_command(["train", "reviews", "--iterations", "3", "--quiet", "--set", "execution.threads=1", "--set",
                        "kl.coef=0.05"]) == 0
    page = ROOT / "docs" / "en" / "7-walk.md"
    commands = [words for words in in_blocks(page) if "--live" not in words]
    assert len(commands) > 12
    for words in commands:
        assert run_command(words) == 0, (words, capsys.readouterr().err)
    (check,) = [words for words in commands if words[0] == "sql" and "abs(" in words[2]]
    ((off,),) = open_view(str(tmp_path / "store"), "reviews").sql(check[2]).fetchall()
    assert off < 1e-6  # as the page says
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("python -c")]
    for line in lines:
        done = subprocess.run([sys.executable, *shlex.split(line)[1:]], capture_output=True, text=True)
        assert done.returncode == 0 and "generated_text" in done.stdout, done.stderr
    assert open_run(Store(str(tmp_path / "store")), "broken").last().iteration == 9

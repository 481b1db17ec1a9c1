"""`baton report`: its points are the metrics, its samples the tables', and the page stands alone."""

import json
import math
import re
import shutil

import pytest
from test_inspect import HOSTILE, Script

from flows.cli.main import run_command
from flows.runs.run import open_run
from flows.store.store import Store
from flows.views.charts import CURVES, POINTS, Line, _thinned, charts
from flows.views.html_page import page
from flows.views.report import SHOWN, TEXT, _within, report
from flows.views.visible import visible
from schemas.stages import STAGES
from schemas.tables import Returns, Samples


def read(text):
    """The data of a page."""
    return json.loads(Script(text).scripts["application/json"])


@pytest.fixture(scope="module")
def language(trained):
    return open_run(Store(trained[1]), "tiny")


def test_points_are_the_metrics(language):
    states = language.states()
    found = {chart.title: chart for chart in charts([language], [states])}
    for title, _, metrics in CURVES:
        for metric, name in metrics.items():
            there = [(s.iteration, s.metrics[metric]) for s in states if metric in s.metrics]
            if there and not metric.endswith("*"):
                (line,) = (line for line in found[title].lines if line.name == name)
                assert list(zip(line.iterations, line.y, strict=True)) == there
    gold = found["Gold"].lines[0]
    assert gold.low == [s.metrics["evaluate/gold_low"] for s in states if "evaluate/gold" in s.metrics]
    frontier = found["Gold against KL"].lines[0]
    assert frontier.x == [math.sqrt(max(0, s.metrics["evaluate/kl"])) for s in states if "evaluate/kl" in s.metrics]
    seconds = {line.name: line for line in found["Seconds"].lines}
    assert seconds["ppo"].y == [language.store.manifest(s.artifacts["ppo"]).seconds for s in states[1:]]
    bytes_ = {line.name: line for line in found["Bytes"].lines}
    assert bytes_["rollout"].y == [language.store.manifest(s.artifacts["rollout"]).bytes for s in states[1:]]


def test_every_metric_that_is_drawn_exists():
    known = {f"{name}/{field}" for stages in STAGES.values() for name, stage in stages.items()
             for field in stage.metrics.model_fields}
    for _, _, curves in CURVES:
        for metric in curves:
            assert metric in known or any(metric.startswith(f"{each}_") for each in known), metric


def test_samples_are_those_of_the_tables(language):
    data = read(report(language))
    assert data["runs"] == ["tiny"] and set(data["samples"]) == {"0", "1", "2"}
    for iteration in (0, 2):
        table = language.store.table(language.state(iteration).artifacts["evaluate"], Samples)
        for row, i in zip(data["samples"][str(iteration)], range(SHOWN), strict=False):
            assert row["source"] == "held-out" and row["response"] == visible(table.response[i], newlines=True)
            assert row["gold"] == pytest.approx(table.gold[i], rel=1e-4)
    assert {row["source"] for row in data["samples"]["1"]} == {"rollout"}


def test_a_control_run(controlled):
    run = open_run(Store(controlled[1]), "cartpole")
    text = report(run)
    data = read(text)
    last = run.states()[-1]
    evaluated = max(i for i in data["samples"])
    table = run.store.table(run.state(int(evaluated)).artifacts["evaluate"], Returns)
    assert [row["episode_return"] for row in data["samples"][evaluated]] == pytest.approx(list(table.episode_return[:SHOWN]))
    assert any(chart["title"] == "Return of an episode" for chart in data["charts"])
    assert f"{last.iteration} of {run.config.iterations} iterations of a" in text


def test_the_page_says_what_the_run_was_made_from(language):
    text = report(language)
    for ref in (*language.inputs.values(), *language.state(2).artifacts.values()):
        assert ref.short in text
    made = language.store.manifest(language.state(2).artifacts["ppo"]).environment
    assert made.device_name in text and f"torch {made.packages['torch']}" in text and "width: 16" in text


def test_two_runs_beside_each_other(copied, tmp_path, capsys):
    store = str(copied[1])
    fork = ["fork", "tiny", "--at", "1", "--run", "other", "--set", "kl.coef=0.3", "--store", store, "--quiet"]
    assert run_command(fork) == 0
    file = tmp_path / "two.html"
    assert run_command(["report", "tiny", "--compare", "other", "--html", str(file), "--png", str(tmp_path / "png"),
                        "--store", store]) == 0
    text = file.read_text(encoding="utf-8")
    data = read(text)
    assert {line["run"] for chart in data["charts"] for line in chart["lines"]} == {"tiny", "other"}
    assert data["beside"] == {i: rows for i, rows in data["samples"].items() if i in ("0", "1")}  # it is a fork
    assert "kl.coef: 0.05 → 0.3" in text
    pictures = sorted(path.name for path in (tmp_path / "png").iterdir())
    assert len(pictures) == len(data["charts"]) and all((tmp_path / "png" / name).stat().st_size > 5000 for name in pictures)
    assert f"{file}: " in capsys.readouterr().out


def test_the_page_stands_alone(language):
    found = Script(report(language))
    outside = [value for _, attributes in found.elements for name, value in attributes.items()
               if name in ("src", "href") and not value.startswith("data:")]
    assert not outside
    assert "default-src 'none'" in next(given["content"] for _, given in found.elements if given.get("http-equiv"))


def test_text_of_a_model_is_no_markup():
    def filled(text):
        shown = visible(text, newlines=True)
        sample = {"prompt": shown, "response": shown, "score": 1.0, "gold": 1.0, "kl": 0.1, "source": "rollout"}
        row = {"prompt": shown, "iterations": [0, 1, 2], "samples": [sample] * 3, "change": 0.0}
        fact = dict.fromkeys(("created", "parent", "store", "device", "config"), shown) | {
            "name": "r", "kind": "language", "done": 1, "iterations": 1, "seconds": 1.0, "total": 1.0, "packages": {},
            "python": "3", "inputs": {}, "best": None, "artifacts": {}, "lacking": [shown]}
        data = {"runs": ["r"], "charts": [], "samples": {"1": [sample]}, "kept": "", "kind": "language",
                "beside": {"1": [sample]}}
        more = {"facts": [fact, fact], "examinations": {}, "extremes": {"Best": [row]}, "changed": [shown]}
        return page("report.html", "report.js", data, **more)

    plain = Script(filled("plain"))
    for text in HOSTILE:
        found = Script(filled(text))
        assert [tag for tag, _ in found.elements] == [tag for tag, _ in plain.elements]
        assert found.scripts["script"] == plain.scripts["script"]
        assert not re.search("[\x00-\x08\x0b-\x1f\u202e\u2066]", filled(text))


def test_long_runs_are_thinned_and_that_is_said():
    line = _thinned(Line("a", "r", list(range(5000)), [float(i) for i in range(5000)], [float(i) for i in range(5000)]))
    assert len(line.y) <= POINTS and line.y[0] == 0 and line.y[-1] == 4999 and line.iterations == [int(x) for x in line.x]
    row = {"prompt": "p" * 400, "response": "r" * 400}
    kept, said = _within({i: [row] * SHOWN for i in range(1000)})
    assert sum(len(rows) * 880 for rows in kept.values()) <= TEXT + 2 * 880 * SHOWN and "0" in kept and "999" in kept
    assert re.match(r"Samples of every \d+th iteration", said)


def test_a_run_that_is_not_prepared(copied, capsys):
    store, config = str(copied[1]), copied[0] / "config.yaml"
    assert run_command(["train", str(config), "--run", "new", "--iterations", "0", "--store", store, "--set", "seed=9",
                        "--quiet"]) == 0
    assert run_command(["report", "new", "--store", store]) == 2
    assert "run 'new' is not prepared yet; baton train --run new goes on" in capsys.readouterr().err


def test_a_page_that_cannot_be_written(language, capsys, tmp_path):
    for command in ("report", "inspect"):
        place = str(tmp_path / "no" / "x.html")
        assert run_command([command, "tiny", "--html", place, "--store", language.store.uri]) == 2
        assert f"{place}: No such file or directory" in capsys.readouterr().err


# --- a run of which something is missing ---

COMMANDS = (["show"], ["doctor"], ["report", "--html", "{page}"], ["sql", "SELECT count(*) FROM rollouts"],
            ["sql", "SELECT count(*) FROM responses"], ["sql", "SELECT count(*) FROM rewards"],
            ["inspect", "--iteration", "2"], ["inspect", "--iteration", "1"])


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command))
def test_what_is_there_is_shown_and_what_is_missing_said(copied, tmp_path, capsys, command):
    run, page = open_run(Store(copied[1]), "tiny"), tmp_path / "page.html"
    ref = run.state(1).artifacts["reward"]
    shutil.rmtree(copied[1] / "artifacts" / "reward" / ref.identity)
    name, *more = (word.replace("{page}", str(page)) for word in command)
    assert run_command([name, "tiny", *more, "--store", str(copied[1])]) == 0
    line = "reward of iteration 1 is not in the store, and left out; baton stage reward tiny --iteration 1 makes it again"
    assert f"run tiny: {line}" in capsys.readouterr().err
    assert not page.exists() or line in page.read_text(encoding="utf-8")
    assert run_command(["stage", "reward", "tiny", "--iteration", "1", "--store", str(copied[1])]) == 0
    capsys.readouterr()
    assert run_command([name, "tiny", *more, "--store", str(copied[1])]) == 0
    assert capsys.readouterr().err == ""

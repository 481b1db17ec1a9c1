"""`baton sql` and the Python side of it: the numbers are those of the tables, computed anew here."""

import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import rewrite
from control import RUNS

from flows.cli.main import run_command
from flows.runs.run import open_run
from flows.store.store import Store
from flows.views import open_run as open_view
from flows.views.sql import Database, catalog
from flows.views.token_texts import tokenizer_of
from flows.views.visible import visible
from schemas.errors import ConfigError, StoreError
from schemas.tables import Advantages, ReferenceLogprobs, Rewards, Rollouts, Trajectories, Values
from stages.ops.advantages import gae_advantages

PAGE = Path(__file__).parents[1] / "docs" / "tables.md"
QUESTIONS = re.findall(r"```sql\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)


@pytest.fixture
def view(trained):
    return open_view(str(trained[1]), "tiny")


def numbers(view, query):
    """The answer's columns, (n,) each."""
    return [column.to_numpy(zero_copy_only=False) for column in view.sql(query).to_arrow_table().columns]


# --- numbers ---

def test_tokens_are_those_of_the_tables_joined(view):
    run = view.run
    for iteration in (1, 2):
        artifacts = run.state(iteration).artifacts
        rollouts, values, gae, reference = (run.store.table(artifacts[stage], kind) for stage, kind in (
            ("rollout", Rollouts), ("value", Values), ("gae", Advantages), ("reference", ReferenceLogprobs)))
        found = view.sql(f"SELECT * FROM tokens WHERE iteration = {iteration} ORDER BY row_id, position").to_arrow_table()
        for name, rows in {
            "token": rollouts.response_tokens, "logprob": rollouts.logprobs, "reference": reference.logprobs,
            "value": values.values, "kl": gae.kl, "reward": gae.rewards, "raw_advantage": gae.raw_advantages,
            "advantage": gae.advantages, "return": gae.returns}.items():
            np.testing.assert_array_equal(found[name].to_numpy(), rows.values, err_msg=name)
        rows = rollouts.response_tokens.row_of_value
        np.testing.assert_array_equal(found["row_id"].to_numpy(), rows)
        np.testing.assert_array_equal(found["prompt_id"].to_numpy(), rollouts.prompt_id[rows])
        np.testing.assert_array_equal(found["position"].to_numpy(), np.concatenate([np.arange(n) for n in
                                                                                   rollouts.response_tokens.lengths]))
        assert set(found["identity"].to_pylist()) == {artifacts["rollout"].identity}
        assert found["sampled"].null_count == len(found)
        tokenizer = tokenizer_of(run, run.state(0).actor)
        assert found["text"].to_pylist() == [tokenizer.decode([i], skip_special_tokens=False)
                                             for i in rollouts.response_tokens.values]


def test_delta_is_what_advantages_are_summed_from(view):
    """A_t = δ_t + γλ·A_{t+1}: of λ = 0 it is δ itself."""
    run = view.run
    artifacts = run.state(2).artifacts
    rollouts, values, gae = (run.store.table(artifacts[stage], kind) for stage, kind in (
        ("rollout", Rollouts), ("value", Values), ("gae", Advantages)))
    expected = gae_advantages(gae.rewards, values.values, np.zeros(len(rollouts)), run.config.gae.gamma, 0.0)
    found, = numbers(view, "SELECT delta FROM tokens WHERE iteration = 2 ORDER BY row_id, position")
    np.testing.assert_allclose(found, expected.values, atol=1e-6)


def test_delta_of_steps_bootstraps_what_is_not_over(controlled):
    for name in RUNS:
        view = open_view(str(controlled[1]), name)
        run, c = view.run, view.run.config.gae
        batch, gae = (run.store.table(run.state(1).artifacts[stage], kind) for stage, kind in (
            ("rollout", Trajectories), ("gae", Advantages)))
        over = batch.terminated | (batch.truncated & (c.truncation == "terminal"))
        expected = gae_advantages(gae.rewards, batch.values, np.where(over, 0, batch.bootstrap), c.gamma, 0.0)
        found, action = numbers(view, "SELECT delta, action[1] FROM steps WHERE iteration = 1 ORDER BY row_id, position")
        np.testing.assert_allclose(found, expected.values, atol=1e-5)
        np.testing.assert_array_equal(action, batch.actions.values[:, 0])


def test_responses_have_their_rewards_and_sums(view):
    run, found = view.run, view.sql("SELECT * FROM responses WHERE iteration = 1 ORDER BY row_id").to_arrow_table()
    artifacts = run.state(1).artifacts
    rollouts, rewards, gae = (run.store.table(artifacts[stage], kind) for stage, kind in (
        ("rollout", Rollouts), ("reward", Rewards), ("gae", Advantages)))
    np.testing.assert_array_equal(found["score"].to_numpy(), rewards.score)
    np.testing.assert_allclose(found["kl"].to_numpy(), gae.kl.sums(), rtol=1e-5, atol=1e-7)
    assert found["response"].to_pylist() == list(rollouts.response)
    assert [dict(row) for row in found["components"].to_pylist()] == [
        {name: pytest.approx(values[i]) for name, values in rewards.components.items()} for i in range(len(rewards))]


def test_what_is_said_of_runs_and_iterations(view):
    run = view.run
    assert view.sql("SELECT iteration, value FROM metrics WHERE stage = 'gae' AND metric = 'kl' ORDER BY 1").fetchall() == [
        (i, run.state(i).metrics["gae/kl"]) for i in (1, 2)]
    assert view.sql("SELECT kind, iterations, config ->> '$.seed' FROM runs").fetchall() == [("language", 2, "3")]
    found = dict(view.sql("SELECT stage, identity FROM artifacts WHERE iteration = 2").fetchall())
    assert found == {stage: ref.identity for stage, ref in run.state(2).artifacts.items()}
    assert view.sql("SELECT count(*), max(prompt_id) FROM prompts").fetchall() == [(12, 11)]


@pytest.mark.parametrize("query", QUESTIONS)
def test_the_pages_questions_have_answers(query, trained, controlled):
    language, control = open_run(Store(trained[1]), "tiny"), open_run(Store(controlled[1]), "cartpole")
    found = Database([language, control]).sql(query).fetchall()
    assert found or re.search("HAVING|WHERE prompt_id", query)  # that not each of so few rows meets


def test_the_page_lists_every_column():
    page = PAGE.read_text(encoding="utf-8")
    for row in catalog():
        if row["column"] == "…":
            assert f"`{row['view']}`" in page
        elif row["column"] not in ("run", "iteration", "identity"):
            section = page.split(f"### `{row['view']}`\n")[1].split("\n### ")[0]
            assert f"| `{row['column']}` | {row['type']} | {row['doc'].replace('|', chr(92) + '|')} |" in section
    assert len(QUESTIONS) >= 20


def test_a_run_without_critic_and_reference_has_the_same_rows_whatever_is_asked(copied):
    folder, store = copied
    settings = ("gae.estimator=rloo", "rollout.responses_per_prompt=4", "kl.coef=0", "kl.measure=false", "iterations=1")
    assert run_command(["train", str(folder), "--run", "bare", "--store", str(store), "--quiet",
                        *(f"--set={one}" for one in settings)]) == 0
    view = open_view(str(store), "bare")
    (rows, advantages), = view.sql("SELECT count(*), count(advantage) FROM tokens").fetchall()
    assert rows == advantages > 0
    (again, values, references, positions), = view.sql(
        "SELECT count(advantage), count(value), count(reference), count(position) FROM tokens").fetchall()
    assert (again, values, references, positions) == (rows, 0, 0, rows)
    assert view.sql("SELECT value, reference, delta FROM tokens").fetchall() == [(None, None, None)] * rows


@pytest.mark.parametrize("query", ["FROM tokens", "TABLE tokens", "(FROM tokens LIMIT 9)", "WITH x AS (FROM tokens) FROM x"])
def test_all_columns_without_a_star(view, query):
    assert {"kl", "delta", "text", "return"} <= set(view.sql(query).columns)


# --- what is read ---

def test_what_is_not_named_is_not_read(copied):
    """So that a damaged table stops no question that is not about it."""
    view = open_view(str(copied[1]), "tiny")
    values = view.run.store.place(view.run.state(1).artifacts["value"], "values.parquet")
    Path(values).write_bytes(b"x" * Path(values).stat().st_size)
    view = open_view(str(copied[1]), "tiny")
    assert view.sql("SELECT avg(kl), count(*) FROM tokens").fetchall()[0][1] > 0
    for query in ("SELECT avg(value) FROM tokens", "SELECT delta FROM tokens", "SELECT * FROM tokens", "FROM values"):
        with pytest.raises(StoreError, match=r"values\.parquet.*sha256"):
            view.sql(query)


def test_tables_that_a_run_lacks_are_empty_and_have_their_columns(view):
    for name in ("dropped", "scored_texts", "trajectories", "returns"):
        assert view.sql(f"SELECT * FROM {name}").fetchall() == []
    assert view.sql("SELECT turns, sampled FROM rollouts WHERE turns IS NOT NULL").fetchall() == []
    assert view.sql("SELECT delta FROM steps").fetchall() == []


def test_iterations_with_and_without_an_optional_column_are_one_view(copied):
    view = open_view(str(copied[1]), "tiny")
    manifest = view.run.store.manifest(view.run.state(2).artifacts["evaluate"])
    file = Path(view.run.store.place(manifest.ref, "samples.parquet"))
    table = pq.read_table(file)
    table = table.append_column("prompt_id", table["row_id"])
    pq.write_table(table, file)
    import hashlib

    def grown(data):
        entry = next(entry for entry in data["files"] if entry["path"] == "samples.parquet")
        entry |= {"bytes": file.stat().st_size, "digest": hashlib.sha256(file.read_bytes()).hexdigest()}
        entry["columns"]["prompt_id"] = "int64"

    rewrite(file.parents[2] / "manifest.json", grown)
    view = open_view(str(copied[1]), "tiny")
    found = dict(view.sql("SELECT iteration, count(prompt_id) FROM samples GROUP BY iteration").fetchall())
    assert found == {0: 0, 2: len(table)}


def test_a_store_of_several_runs(trained, copied):
    assert run_command(["fork", "tiny", "--at", "1", "--run", "other", "--store", str(copied[1]), "--quiet",
                        "--set", "kl.coef=0.3"]) == 0
    store = Store(copied[1])
    both = Database([open_run(store, name) for name in ("other", "tiny")])
    found = both.sql("SELECT run, count(*), min(parent) FROM rollouts JOIN runs USING (run) GROUP BY run ORDER BY run")
    assert found.fetchall() == [("other", 8, "tiny@1"), ("tiny", 16, None)]  # whose first iteration is one artifact
    for view in ("responses", "rewards", "advantages"):
        found = both.sql(f"SELECT run, count(*) FROM {view} GROUP BY run ORDER BY run").fetchall()
        assert found == [("other", 8), ("tiny", 16)]
    alone = Database([open_run(store, "tiny")]).sql("SELECT count(*), sum(kl), sum(delta) FROM tokens").fetchall()[0]
    of_both = both.sql("SELECT count(*), sum(kl), sum(delta) FROM tokens WHERE run = 'tiny'").fetchall()[0]
    assert of_both == pytest.approx(alone)


def test_a_question_about_one_column_reads_no_other(view):
    plan = view.sql("EXPLAIN SELECT iteration, position, avg(kl) FROM tokens GROUP BY ALL").fetchall()[0][1]
    read = set(re.findall(r"\w+", plan))
    assert "kl" in read and not {"raw_advantages", "response_tokens", "returns", "rewards"} & read


# --- Python ---

def test_answers_and_tables_as_the_libraries_have_them(view):
    import datasets
    import polars

    rollouts = view.table("rollouts", 1)
    assert rollouts.column_names[:3] == ["row_id", "prompt_id", "prompt"]
    assert datasets.Dataset(rollouts)["response"][:] == polars.from_arrow(rollouts)["response"].to_list()
    ours = view.run.store.table(view.run.state(1).artifacts["rollout"], Rollouts)
    np.testing.assert_array_equal(rollouts["logprobs"].combine_chunks().flatten().to_numpy(), ours.logprobs.values)
    answer = view.sql("SELECT iteration, avg(kl) AS kl FROM tokens GROUP BY ALL ORDER BY ALL")
    assert answer.df()["kl"].tolist() == answer.pl()["kl"].to_list() == answer.to_arrow_table()["kl"].to_pylist()


@pytest.mark.parametrize("name, iteration, words", [
    ("rollout", 1, "no table 'rollout'; it has demonstration_rewards, rollouts"),
    ("rollouts", 0, "no rollouts of iteration 0; it has it of 2, 1 to 2"),
    ("dropped", 1, "no dropped of iteration 1; it has it of none"),
    ("rollouts", 9, "no iteration 9; it has 0…2"),
])
def test_a_table_that_is_not_there(view, name, iteration, words):
    with pytest.raises(ConfigError, match=words):
        view.table(name, iteration)


def test_a_run_or_store_that_is_not_there(trained, tmp_path):
    with pytest.raises(ConfigError, match=r"no run 'nope'.*runs there: tiny"):
        open_view(str(trained[1]), "nope")
    with pytest.raises(ConfigError, match="no such folder"):
        open_view(str(tmp_path / "nowhere"), "tiny")


# --- the command ---

def sql(capsys, store, *arguments):
    """Exit code, stdout and stderr of `baton sql`."""
    code = run_command(["sql", *arguments, "--store", str(store)])
    return code, *capsys.readouterr()


def test_a_table_csv_json_and_a_file(trained, capsys, tmp_path):
    query = "SELECT iteration, row_id, response, score, components FROM responses ORDER BY 1, 2"
    code, out, _ = sql(capsys, trained[1], "tiny", query)
    assert code == 0 and "response" in out and "┃" in out
    table = open_view(str(trained[1]), "tiny").sql(query).fetchall()
    _, out, _ = sql(capsys, trained[1], "tiny", query, "--csv")
    rows = list(csv.reader(io.StringIO(out)))
    assert rows[0] == ["iteration", "row_id", "response", "score", "components"] and len(rows) == len(table) + 1
    assert [row[2] for row in rows[1:]] == [row[2] for row in table]
    assert json.loads(rows[1][4]) == pytest.approx(table[0][4])
    _, out, _ = sql(capsys, trained[1], "tiny", query, "--json")
    assert [row["score"] for row in json.loads(out)] == pytest.approx([row[3] for row in table])
    _, out, _ = sql(capsys, trained[1], "tiny", query, "--parquet", str(tmp_path / "all.parquet"))
    assert f"{len(table)} rows" in out and pq.read_table(tmp_path / "all.parquet")["response"].to_pylist() == [
        row[2] for row in table]
    _, out, _ = sql(capsys, trained[1], "tiny", "SELECT 'nan'::DOUBLE AS a, sum(1) AS b, [1, 2] AS c", "--json")
    assert json.loads(out) == [{"a": None, "b": 1, "c": [1, 2]}]


def test_columns_that_are_called_the_same(trained, capsys):
    _, out, _ = sql(capsys, trained[1], "tiny", "SELECT 1 AS a, 2 AS a, 3 AS b", "--json")
    assert json.loads(out) == [{"a": 1, "a_1": 2, "b": 3}]
    _, out, _ = sql(capsys, trained[1], "tiny", "SELECT 1 AS a, 2 AS a, 3 AS b", "--csv")
    assert out == '"a","a_1","b"\n1,2,3\n'


def test_many_rows_and_many_columns_are_cut_and_said(trained, capsys):
    _, out, _ = sql(capsys, trained[1], "tiny", "SELECT i FROM range(100) t(i)")
    assert "the first 40 rows; --csv, --json or --parquet FILE gives all" in out and "41" not in out
    _, out, _ = sql(capsys, trained[1], "tiny", "SELECT * FROM tokens")
    assert "row 1" in out and "the first 5 rows" in out


def test_without_a_query_what_there_is(trained, capsys):
    _, out, _ = sql(capsys, trained[1])
    assert "tokens" in out and "log π_ref" in out
    _, out, _ = sql(capsys, trained[1], "tiny", "--json")
    assert {"view": "tokens", "column": "kl", "type": "FLOAT", "doc": "nats: the KL estimate"} in json.loads(out)


def test_a_query_over_all_runs_needs_no_name(trained, capsys):
    _, out, _ = sql(capsys, trained[1], "SELECT run FROM runs", "--csv")
    assert out.split() == ['"run"', '"tiny"']


@pytest.mark.parametrize("arguments, words", [
    (["nope", "SELECT 1"], "no run 'nope'"),
    (["tiny", "SELECT nope FROM tokens"], 'column "nope" not found.*Candidate bindings'),
    (["tiny", "SELECT * FROM nope"], "nope does not exist.*there are .*rollouts, reference.*prompts"),
    (["tiny", "SELEC 1"], "syntax error at or near"),
    (["tiny", "SELECT 'x'::INT"], "Could not convert string 'x'"),
    (["tiny", "SELECT 'x'::INT", "--csv"], "Could not convert string 'x'"),
    (["tiny", "SELECT 1", "--parquet", "/no/such/folder.parquet"], "No such file or directory"),
    (["tiny", "SELECT", "1"], "put the query in quotes"),
])
def test_what_cannot_be_answered_is_a_line(trained, capsys, arguments, words):
    code, out, error = sql(capsys, trained[1], *arguments)
    assert code == 2 and out == "" and re.search(words, error) and error.startswith("baton: ") and error.count("\n") == 1


HOSTILE = ("\x1b[2J\x1b[31mred", "a\u202eb", "<script>alert(1)</script>", "x" * 100_000, "bell\x07 back\x08\r", "[bold]x[/]",
           "line\nbreak", '=cmd|" /C calc"!A0', "\ud83d".encode("utf-16", "surrogatepass").decode("utf-16", "replace"))


def test_text_of_a_model_acts_on_no_terminal(trained, capsys):
    for text in HOSTILE:
        quoted = text.replace("'", "''")
        code, out, _ = sql(capsys, trained[1], "tiny", f"SELECT '{quoted}' AS \"{visible(text, 20).replace(chr(34), '')}\"")
        assert code == 0 and not set("\x1b\x07\x08\r\u202e") & set(out) and len(out) < 5000
        _, out, _ = sql(capsys, trained[1], "tiny", f"SELECT '{quoted}' AS t, 1 AS n", "--csv")
        assert list(csv.reader(io.StringIO(out, newline="")))[1] == [text, "1"]
        _, out, _ = sql(capsys, trained[1], "tiny", f"SELECT '{quoted}' AS t", "--json")
        assert json.loads(out) == [{"t": text}]
        code, _, error = sql(capsys, trained[1], "tiny", f"SELECT '{quoted}'::INT")
        assert code == 2 and not set("\x1b\x07\x08\u202e") & set(error)


def test_what_is_visible():
    assert visible("a\x1bb\u202ec\td") == "a\\x1bb\\u202ec\\td"
    assert visible("naïve 漢字 👩‍🚀 é") == "naïve 漢字 👩‍🚀 é"
    assert visible("x" * 100, 11) == "xxxxx…xxxxx" and visible("a\nb", newlines=True) == "a\nb"

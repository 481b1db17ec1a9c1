"""Reward functions are given what their parameters name: texts, tokens, reasons, and any column of the prompt file."""

import asyncio
import functools
import json
import time

import numpy as np
import pytest
from brought import PROMPTS, write_brought

from flows.cli.main import run_command
from flows.runs.functions import function_files, load_function
from flows.runs.run import open_run
from flows.store.store import Store
from schemas.errors import ConfigError, RewardError
from schemas.tables import Ragged, Rewards, Rollouts
from stages.ops.guest import Patience
from stages.ops.reward_function import asked
from stages.ops.rewards import function_scorer

TOKENS = Ragged.from_rows([np.array([5, 6]), np.array([7])], np.int32)
ROLLOUTS = Rollouts(row_id=np.arange(2), prompt_id=np.array([1, 0]), prompt=("a", "b"), response=("cc", "ddd"),
                    prompt_tokens=TOKENS, response_tokens=TOKENS, logprobs=TOKENS.with_values(np.zeros(3, np.float32)),
                    finish_reason=("eos", "length"))
TEXTS = (["a", "b"], ["cc", "ddd"])


class File:
    """Two prompts with an answer and a difficulty."""

    def of(self, rollouts, names):
        rows = [{"answer": "x", "difficulty": 1}, {"answer": "y"}]
        return {name: [rows[i].get(name) for i in rollouts.prompt_id] for name in names}


def keeps(calls, form, one=False):
    """A function of that form which keeps what it is called with."""
    there = {"calls": calls, "score": 1.0 if one else [1.0, 1.0], "rest": ()}
    exec(form, there)
    return there["f"]


def seen_by(form, one=False, wrap=lambda function: function):
    calls = []
    function_scorer("f.py:f", wrap(keeps(calls, form, one)), Patience(limit=20), File())(ROLLOUTS)
    return calls


def decorated(function):
    @functools.wraps(function)
    def wrapper(*arguments):
        return function(*arguments)
    return wrapper


@pytest.mark.parametrize("form", [
    "def f(prompts, responses): calls.append((prompts, responses)); return score",
    "def f(prompts, completions): calls.append((prompts, completions)); return score",
    "def f(question, answer): calls.append((question, answer)); return score",
    "def f(prompt, response): calls.append((prompt, response)); return score",
    "def f(texts, responses): calls.append((texts, responses)); return score",
    "def f(prompts, responses, /): calls.append((prompts, responses)); return score",
    "def f(prompts, responses, answer=None, **more): calls.append((prompts, responses)); assert not answer; return score",
    "def f(prompts, *rest): calls.append((prompts, *rest)); return score",
    "def f(*rest): calls.append(rest); return score",
    "def f(a, b=None): calls.append((a, b)); return score",
    "async def f(prompts, responses): calls.append((prompts, responses)); return score",
    "class F:\n    def __call__(self, prompts, responses): calls.append((prompts, responses)); return score\nf = F()",
])
@pytest.mark.parametrize("wrap", [lambda function: function, decorated])
def test_two_texts_by_position_whatever_they_are_called(form, wrap):
    if form.startswith("class") and wrap is decorated:
        wrap = functools.partial
    assert seen_by(form, wrap=wrap) == [TEXTS]


@pytest.mark.parametrize(("form", "expected"), [
    ("def f(responses, answer): calls.append((responses, answer)); return score", [(TEXTS[1], ["y", "x"])]),
    ("def f(responses, difficulty): calls.append(difficulty); return score", [[None, 1]]),
    ("def f(prompts, responses, finish_reasons, response_tokens):\n    calls.append((finish_reasons, response_tokens))\n"
     "    return score", [(["eos", "length"], [[5, 6], [7]])]),
    ("def f(*, responses, answer, finish_reasons=None): calls.append((responses, answer, finish_reasons)); return score",
     [(TEXTS[1], ["y", "x"], ["eos", "length"])]),
    ("def f(responses, answer, scale=2.0): calls.append((answer, scale)); return score", [(["y", "x"], 2.0)]),
])
def test_more_by_name(form, expected):
    assert seen_by(form) == expected
    assert seen_by(form, wrap=decorated) == expected if "*" not in form else True


@pytest.mark.parametrize(("form", "expected"), [
    ("def f(response): calls.append(response); return score", ["cc", "ddd"]),
    ("def f(response, answer, finish_reason, response_tokens):\n"
     "    calls.append((response, answer, finish_reason, response_tokens)); return score",
     [("cc", "y", "eos", [5, 6]), ("ddd", "x", "length", [7])]),
    ("def f(*, prompt, response): calls.append((prompt, response)); return score", [("a", "cc"), ("b", "ddd")]),
    ("async def f(prompt, response): calls.append((prompt, response)); return score", [("a", "cc"), ("b", "ddd")]),
    ("class F:\n    async def __call__(self, response): calls.append(response); return score\nf = F()", ["cc", "ddd"]),
])
def test_one_response_after_another(form, expected):
    assert seen_by(form, one=True) == expected


def test_all_and_one_at_once_are_refused():
    with pytest.raises(ConfigError, match="'responses' and 'prompt' are of all responses and of one; take either"):
        asked(lambda responses, prompt, answer: [])
    with pytest.raises(RewardError, match=r"reward f.py:f: its parameter 'answer' is a column of a prompt file"):
        function_scorer("f.py:f", lambda responses, answer: [])(ROLLOUTS)


def test_a_score_of_one_response_that_is_no_number():
    with pytest.raises(RewardError, match="expected 2 numbers"):
        function_scorer("f.py:f", lambda response: "good")(ROLLOUTS)


# --- async ---

def test_those_for_one_response_run_side_by_side():
    waiting = []

    async def score(response):
        waiting.append(asyncio.get_running_loop().create_future())
        if len(waiting) == 2:
            for one in waiting:
                one.set_result(1.0)
        return await waiting[-1]  # the first waits for the second

    assert function_scorer("f.py:f", score, Patience(limit=20))(ROLLOUTS).tolist() == [1, 1]


def test_a_limit_or_a_client_made_once_serves_all_calls():
    """It belongs to the loop that it was first waited for in."""
    limit = asyncio.Semaphore(1)

    async def score(response):
        async with limit:
            await asyncio.sleep(0.001)
        return 1.0

    scorer = function_scorer("f.py:f", score)
    assert [scorer(ROLLOUTS).tolist() for _ in range(2)] == [[1, 1]] * 2
    asyncio.new_event_loop().close()


def test_what_is_awaited_too_long_is_ended():
    async def score(response):
        await asyncio.sleep(60)

    began = time.monotonic()
    with pytest.raises(RewardError, match=r"has not returned for 0.3 s"):
        function_scorer("f.py:f", score, Patience(limit=0.3))(ROLLOUTS)
    assert time.monotonic() - began < 30


def test_what_is_awaited_and_raises_is_told_with_its_line(tmp_path):
    (tmp_path / "rewards.py").write_text("async def score(response):\n    raise KeyError('no')\n")
    function = load_function("rewards.py:score", [tmp_path / "rewards.py"])
    with pytest.raises(RewardError, match=r"KeyError.*rewards.py, line 2"):
        function_scorer("rewards.py:score", function)(ROLLOUTS)


def test_modules_beside_a_file_are_imported_while_it_is_awaited(tmp_path):
    (tmp_path / "later.py").write_text("value = 3.0\n")
    (tmp_path / "rewards.py").write_text("import asyncio\n\nasync def score(response):\n    await asyncio.sleep(0.01)\n"
                                         "    from later import value\n    return value\n")
    function = load_function("rewards.py:score", function_files("rewards.py:score", tmp_path))
    assert function_scorer("rewards.py:score", function)(ROLLOUTS).tolist() == [3, 3]
    with pytest.raises(ModuleNotFoundError):
        import later  # noqa: F401


# --- runs ---

REWARDS = '''
def weighed(responses, weight):
    return [float(w) for w in weight]

def length(prompts, responses):
    return [float(len(text)) for text in responses]

async def judge(response, answer):
    return float(len(answer))
'''


def write_rows(folder, **changes):
    for name, count in (("p", len(PROMPTS)), ("h", 3)):
        rows = [{"prompt": prompt, "answer": "x" * (i + 1), "weight": 10 * i} for i, prompt in enumerate(PROMPTS[:count])]
        for row in rows[2:] if name in changes else ():
            del row[changes[name]]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, prefect_server):
    place = tmp_path_factory.mktemp("columns")
    folder = write_brought(place / "case", rewards_py=REWARDS, evaluate={"judge": "rewards.py:judge"}, reward={
        "components": {"weighed": {"source": "rewards.py:weighed"}, "length": {"source": "rewards.py:length"}}})
    write_rows(folder)
    assert run_command(["train", str(folder), "--store", str(place / "store"), "--quiet"]) == 0
    return folder, open_run(Store(str(place / "store")), "case")


def test_columns_of_the_prompt_file_reach_rewards_and_judge(trained):
    _, run = trained
    made = run.state(1).artifacts
    rollouts, rewards = run.store.table(made["rollout"], Rollouts), run.store.table(made["reward"], Rewards)
    assert rewards.components["weighed"].tolist() == (10 * rollouts.prompt_id).tolist() != sorted(10 * rollouts.prompt_id)
    assert run.state(1).metrics["evaluate/gold"] == pytest.approx(np.mean([1, 2, 3]))
    assert run.store.manifest(made["reward"]).recipe.inputs["prompts"] == run.inputs["prompts"]


def test_the_prompt_file_is_an_input_only_where_a_column_is_named(trained, capsys):
    folder, run = trained
    arguments = ["stage", "reward", "case", "--iteration", "1", "--store", run.store.uri]
    assert run_command([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "same"
    only = f"reward.components={{length: {{source: '{folder}/rewards.py:length'}}}}"
    assert run_command([*arguments, "--print-call", "--set", only]) == 0
    assert "prompts" not in json.loads(capsys.readouterr().out)["inputs"]
    assert run_command([*arguments, "--print-call"]) == 0
    assert "prompts" in json.loads(capsys.readouterr().out)["inputs"]


@pytest.mark.parametrize(("form", "said"), [
    ("weighed(responses, wight)", "its parameter 'wight' is none of prompts, responses, finish_reasons, prompt, response, "
                                  "finish_reason, response_tokens, messages, and data.prompts has no such column ("),
    ("weighed(prompts, answer)", "its parameters prompts and answer are prompts and responses, by position, and 'answer' is "
                                 "a column of data.prompts too"),
    ("weighed(answer, responses)", "name the response first, as in f(responses, answer)"),
])
def test_what_a_file_does_not_have_is_refused_at_the_start_and_for_a_fork(trained, tmp_path, capsys, form, said):
    folder, run = trained
    (tmp_path / "mine.py").write_text(f"def {form}: return [0.0] * len(responses)\n")
    source = f"reward.components={{x: {{source: '{tmp_path}/mine.py:weighed'}}}}"
    assert run_command(["train", str(folder), "--run", "new", "--store", str(tmp_path / "store"), "--set", source]) == 2
    assert said in capsys.readouterr().err
    assert run_command(["fork", "case", "--at", "1", "--run", "new", "--store", run.store.uri, "--set", source]) == 2
    assert said.split("data.prompts")[0] in capsys.readouterr().err


def test_a_line_without_the_column_is_named(trained, tmp_path, capsys):
    folder, _ = trained
    write_rows(folder, h="weight")
    assert run_command(["train", str(folder), "--store", str(tmp_path / "store")]) == 2
    write_rows(folder)
    error = capsys.readouterr().err
    assert "function 'rewards.py:weighed': its parameter 'weight' is none of" in error
    assert "data.heldout_prompts has no such column (" in error and "h.jsonl, line 3; there are prompt, answer" in error

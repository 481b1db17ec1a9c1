"""Built-in rewards: each by hand, what they refuse, and a run with a function, a server and built-ins side by side."""

import json
import sys
import time

import numpy as np
import pytest
import torch
from brought import make_model, make_tokenizer, write_brought
from test_reward_server import _Handler, server  # noqa: F401

from flows.cli.main import run_command
from flows.runs.run import open_run
from flows.store.store import Store
from schemas.errors import RewardError
from schemas.reward_settings import ComponentConfig, RewardConfig
from schemas.tables import Ragged, Rewards, Rollouts
from stages.ops import math_answers
from stages.ops.builtin_rewards import builtin_scorer
from stages.ops.rewards import normalized_components


def given(responses, prompt_id=None):
    """Rollouts with these responses, a token a word and one for EOS."""
    n = len(responses)
    tokens = Ragged.from_rows([np.ones(len(text.split()) + 1) for text in responses], np.int32)
    return Rollouts(row_id=np.arange(n), prompt_id=np.arange(n) if prompt_id is None else prompt_id, prompt=("p",) * n,
                    response=tuple(responses), prompt_tokens=Ragged.from_rows([np.ones(1)] * n, np.int32),
                    response_tokens=tokens, logprobs=tokens.with_values(np.zeros(len(tokens.values), np.float32)),
                    finish_reason=("eos",) * n)


class Answers:
    def __init__(self, values):
        self.values = values

    def of(self, rollouts, names):
        return {name: self.values for name in names}


def scores(source, responses, answers=None, **options):
    part = ComponentConfig(source=source, options=options)
    return builtin_scorer(source, part.builtin, columns=Answers(answers))(given(responses)).tolist()


@pytest.mark.parametrize("source, options, response, answer, expected", [
    ("length", {}, "a b c", None, 4), ("length", {"unit": "words"}, "a b c", None, 3),
    ("length", {"unit": "characters", "target": 4}, "a b c d", None, -0.75), ("length", {"target": 4}, "a b c", None, 0),
    ("regex", {"pattern": r"<b>\d+</b>"}, "so <b>12</b>", None, 1),
    ("regex", {"pattern": r"\d+", "whole": True}, "1 2", None, 0),
    ("exact_match", {}, " Oslo\n", "Oslo", 1), ("exact_match", {}, "oslo", "Oslo", 0), ("exact_match", {}, "7", 7, 1),
    ("exact_match", {"ignore_case": True}, "oslo", ["Bergen", "Oslo"], 1),
    ("exact_match", {"extract": r"= (\d+)"}, "1 + 1 = 3, no, = 2", 2, 1),
    ("exact_match", {"extract": r"= (\d+)"}, "2", 2, 0),
    ("numeric", {}, "70 + 2, so it is 72.", "9 * 8 = <<9*8=72>>72\n#### 72", 1), ("numeric", {}, "it is 71", 72, 0),
    ("numeric", {}, r"\boxed{\frac{1}{2}}", 0.5, 1), ("numeric", {}, "1,234", "1234", 1), ("numeric", {}, "none", 3, 0),
    ("repetition", {"n": 2}, "a b A B a b", None, -(1 - 2 / 5)), ("repetition", {}, "a b", None, 0),
    ("json", {}, '{"a": [1, 2]}', None, 1), ("json", {}, '```json\n{"a": 1}\n```', None, 1),
    ("json", {}, "{'a': 1}", None, 0),
    ("json", {"schema": {"required": ["b"]}}, '{"a": 1}', None, 0),
    ("json", {"schema": {"required": ["a"]}}, '{"a": 1}', None, 1),
    ("json", {}, "[" * 100_000, None, 0), ("json", {}, "[NaN]", None, 0),
])
def test_each_by_hand(source, options, response, answer, expected):
    assert scores(source, [response], [answer], **options) == pytest.approx([expected], abs=1e-6)


def test_sentiment_is_vaders():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    texts = ["a warm and lovely soup", "the worst soup"]
    expected = [SentimentIntensityAnalyzer().polarity_scores(text)["compound"] for text in texts]
    assert scores("sentiment", texts) == pytest.approx(expected) and expected[0] > 0.5 > -0.5 > expected[1]


@pytest.mark.parametrize("source, answer, words", [
    ("exact_match", {"a": 1}, "column 'answer' of the prompt of row 0: expected a number or a text, found {'a': 1}"),
    ("numeric", None, "expected a number or a text, found None"), ("numeric", True, "found True"),
    ("numeric", "none of it", "expected a number or a formula, found 'none of it'"),
])
def test_an_answer_of_another_kind_is_named(source, answer, words):
    with pytest.raises(RewardError, match=words):
        scores(source, ["x"], [answer])


@pytest.mark.parametrize("part, words", [
    ({"source": "regex", "options": {}}, "options.pattern: Field required"),
    ({"source": "regex", "options": {"pattern": "("}}, "options.pattern: no regular expression: missing )"),
    ({"source": "length", "options": {"taget": 3}},
     "options.taget: Extra inputs are not permitted; length has unit, target"),
    ({"source": "exact_match", "options": {"extract": "x"}}, "options.extract: has no group; put what is compared into"),
    ({"source": "json", "options": {"schema": {"type": "thing"}}}, "schema: no JSON schema: 'thing' is not valid"),
    ({"source": "x.py:f", "options": {"a": 1}},
     "options is about a built-in reward, and source='x.py:f' is none; remove it"),
    ({"source": "length", "max_tokens": 3}, "max_tokens is about a model that is brought"),
    ({"source": "length", "columns": ["a"]}, "columns is about a reward server"),
    ({"source": "http://a/b", "columns": ["responses"]}, "a server is sent 'responses' anyway; take it out"),
])
def test_options_that_mean_nothing(part, words):
    with pytest.raises(ValueError) as error:
        ComponentConfig.model_validate(part)
    assert words in str(error.value)


def test_a_built_in_has_no_part_in_the_identity_of_other_components():
    assert ComponentConfig(source="x.py:f").model_dump() == {"source": "x.py:f", "weight": 1.0}
    assert ComponentConfig(source="length").model_dump() == {"source": "length", "weight": 1.0, "options": {}}


def test_what_cannot_be_worked_out_is_wrong_and_the_next_is_right(monkeypatch):
    """9^(9^9) is one call of C code that nothing interrupts: its process is killed."""
    monkeypatch.setattr(math_answers, "LIMIT", 1.0)
    assert scores("numeric", ["it is $9^{9^{9}}$", "it is 72"], [72, 72]) == [0, 1]


# --- normalised components ---

def test_components_by_their_own_statistics_by_hand():
    """Two prompts of three responses: a 0-1 component and one in the hundreds count the same."""
    right, size = np.array([1, 0, 0, 1, 1, 1], np.float32), np.array([300, 100, 200, 50, 70, 60], np.float32)
    found = normalized_components({"right": right, "size": size}, np.array([4, 4, 4, 9, 9, 9]), "group")
    root = np.sqrt(1 / 3)
    expected = np.array([2 / 3, -1 / 3, -1 / 3]) / root
    np.testing.assert_allclose(found["right"], [*expected, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(found["size"], [1, -1, 0, -1, 1, 0], atol=1e-6)
    batch = normalized_components({"size": size}, np.zeros(6), "batch")["size"]
    np.testing.assert_allclose([batch.mean(), batch.std(ddof=1)], [0, 1], atol=1e-6)


@pytest.mark.parametrize("setting", [{"normalize": "scale"}, {"center_on_demonstrations": True}])
def test_normalising_twice_is_refused(setting):
    with pytest.raises(ValueError, match="normalize_components"):
        RewardConfig(normalize_components="batch", **setting)


# --- runs ---

REWARDS = '''
import asyncio

def right(responses, answer):
    return [float(len(response) % 2 == a % 2) for response, a in zip(responses, answer)]

async def judged(*, prompt, response):
    await asyncio.sleep(1)
    return float(len(response))
'''


def write_case(folder, components, **sections):
    prompts = ("The soup", "it", "warm", "is it")
    rows = [{"prompt": prompt, "answer": i, "topic": f"t{i}"} for i, prompt in enumerate(prompts)]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return write_brought(folder, prompts=data, rewards_py=REWARDS, data={"heldout_prompts": "p.jsonl"},
                         **{"reward": {"components": components}} | sections)


def test_a_function_a_server_and_built_ins_in_one_run(tmp_path, server, monkeypatch, prefect_server):  # noqa: F811
    bodies = []

    def answer(body):
        bodies.append(body)
        return {"rewards": [float(topic[1:]) for topic in body["topic"]]}

    url, _ = server((200, {}, answer))
    components = {
        "right": {"source": "rewards.py:right"}, "topic": {"source": url, "columns": ["topic"]},
        "numeric": {"source": "numeric"}, "short": {"source": "length", "options": {"target": 4}, "weight": 2.0}}
    folder = write_case(tmp_path / "case", components, reward={"components": components, "normalize_components": "group"},
                        rollout={"responses_per_prompt": 4}, execution={"server_batch_size": 3, "server_concurrency": 2})
    monkeypatch.setenv("BATON_ALLOWED_SERVERS", "example.org, 127.0.0.1")
    store = ["--store", str(tmp_path / "store"), "--quiet"]
    assert run_command(["train", str(folder), *store]) == 0
    run = open_run(Store(str(tmp_path / "store")), "case")
    made = run.state(1).artifacts
    rollouts, rewards = run.store.table(made["rollout"], Rollouts), run.store.table(made["reward"], Rewards)
    assert rewards.components["topic"].tolist() == rollouts.prompt_id.tolist()
    assert rewards.components["short"].tolist() == pytest.approx((-abs(rollouts.response_tokens.lengths - 4) / 4).tolist())
    expected = [float(len(text) % 2 == i % 2) for text, i in zip(rollouts.response, rollouts.prompt_id, strict=True)]
    assert rewards.components["right"].tolist() == expected
    assert abs(rewards.score.reshape(-1, 4).mean(1)).max() < 1e-5 < abs(rewards.raw_score).max()
    assert sorted(len(body["responses"]) for body in bodies if len(body["responses"]) != 1)[-1] == 3
    assert run_command(["stage", "reward", "case", "--iteration", "1", *store]) == 0


def test_an_async_judge_of_a_second_takes_about_a_second_for_32(tmp_path):
    """It is awaited 32 times side by side: they could not all be under way at once otherwise."""
    from stages.ops.rewards import function_scorer
    running, most = 0, 0

    async def judged(*, prompt, response):
        nonlocal running, most
        import asyncio
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.05)
        running -= 1
        return 1.0

    assert function_scorer("judged", judged)(given(["x"] * 32)).tolist() == [1.0] * 32 and most == 32


@pytest.mark.parametrize("components, words", [
    ({"a": {"source": "numeric", "options": {"answer": "anser"}}},
     "reward.components.a: reads the column 'anser', and data.prompts has no such column ("),
    ({"a": {"source": "numeric", "options": {"answer": "topic"}}},
     "p.jsonl, line 1: column 'topic': expected a number or a formula"),
    ({"a": {"source": "http://127.0.0.1:9/x", "columns": ["where"]}},
     "reads the column 'where', and data.prompts has no such"),
])
def test_what_a_component_reads_is_looked_for_at_the_start(tmp_path, capsys, components, words):
    folder = write_case(tmp_path / "case", components)
    assert run_command(["train", str(folder), "--store", str(tmp_path / "store")]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "store" / "runs").exists()


def test_a_server_that_is_not_allowed_and_a_package_that_is_not_there(tmp_path, capsys, monkeypatch):
    folder = write_case(tmp_path / "case", {"a": {"source": "http://127.0.0.1:9/x"}})
    train = ["train", str(folder), "--store", str(tmp_path / "store")]
    for allowed in ("example.org", "127.0.0.1:8", ""):
        monkeypatch.setenv("BATON_ALLOWED_SERVERS", allowed)
        assert run_command(train) == 2
        assert "BATON_ALLOWED_SERVERS does not name 127.0.0.1:9; add it there" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "math_verify", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run_command([*train, "--set", "reward.components={a: {source: numeric}}"]) == 2
    words = "reward.components.a: numeric needs the package math_verify: pip install 'baton-ppo[rewards]'"
    assert words in capsys.readouterr().err


def test_requests_are_side_by_side_and_in_order(server):  # noqa: F811
    from stages.ops.reward_server import RewardServer
    running, most = [0], [0]

    def answer(body):
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.1)
        running[0] -= 1
        return [float(text) for text in body["responses"]]

    url, asked = server((200, {}, answer))
    found = RewardServer(url, batch_size=2, concurrency=4)(given([str(i) for i in range(11)]))
    assert found.tolist() == list(range(11)) and len(asked) == 6 and 2 <= most[0] <= 4


def test_a_request_that_fails_ends_the_others(server):  # noqa: F811
    from stages.ops.reward_server import RewardServer
    url, asked = server((200, {}, lambda body: [0.0] * len(body["responses"])), (404, {}, {"error": "no"}))
    with pytest.raises(RewardError, match="answered 404"):
        RewardServer(url, batch_size=1, concurrency=2)(given([str(i) for i in range(40)]))
    assert len(asked) < 40


def test_bad_settings_of_a_component_are_one_line(tmp_path, capsys):
    folder = write_case(tmp_path / "case", {"a": {"source": "regex", "options": {"pattern": "("}}})
    assert run_command(["train", str(folder), "--store", str(tmp_path / "store")]) == 2
    error = capsys.readouterr().err
    assert "reward.components.a: options.pattern: no regular expression" in error and error.count("\n") == 1


def test_similarity_is_the_cosine_of_an_encoders_mean_states(tmp_path, prefect_server):
    from transformers import AutoModel
    folder = write_case(tmp_path / "case", {
        "like": {"source": "similarity", "options": {"model": "encoder", "answer": "topic"}}})
    tokenizer = make_tokenizer()
    make_model("bert", AutoModel, tokenizer=tokenizer).save_pretrained(folder / "encoder")
    tokenizer.save_pretrained(folder / "encoder")
    store = ["--store", str(tmp_path / "store"), "--quiet"]
    assert run_command(["train", str(folder), *store]) == 0
    run = open_run(Store(str(tmp_path / "store")), "case")
    made = run.state(1).artifacts
    rollouts, rewards = run.store.table(made["rollout"], Rollouts), run.store.table(made["reward"], Rewards)
    encoder = AutoModel.from_pretrained(folder / "encoder").eval()

    def mean(text):
        with torch.no_grad():
            return encoder(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0].mean(0).double()

    for row in range(4):
        one, other = mean(rollouts.response[row]), mean(f"t{rollouts.prompt_id[row]}")
        assert rewards.components["like"][row] == pytest.approx(float(one @ other / one.norm() / other.norm()), abs=1e-5)
    recipe = run.store.manifest(made["reward"]).recipe
    assert recipe.config["components"]["like"]["options"]["model"] == "model" and "reward.like" in recipe.inputs
    assert run_command(["stage", "reward", "case", "--iteration", "1", *store]) == 0
    (folder / "encoder/model.safetensors").unlink()
    assert run_command(["train", str(folder), "--run", "other", *store]) == 2

"""Reward sources and how they become one score; a real reward server on loopback."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

from schemas.config import ComponentConfig, RewardConfig
from schemas.errors import NonFiniteError, RewardError
from schemas.tables import Ragged, Rollouts
from stages.ops.rewards import combine, function_scorer, model_scorer, server_scorer
from stages.reward import metrics, reward


def config(**settings):
    parts = {"a": ComponentConfig(source="m:f", weight=2), "b": ComponentConfig(source="m:g", weight=-1)}
    return RewardConfig(components=parts, **settings)


PARTS = {"a": np.float32([1, 3, -2]), "b": np.float32([1, 1, 1])}
ENDS = ("eos", "length", "eos")


@pytest.mark.parametrize("settings, expected", [
    ({}, [1, 5, -5]),
    ({"clip": 2}, [1, 2, -2]),
    ({"clip": 2, "missing_eos": "subtract", "missing_eos_penalty": 1.5}, [1, 0.5, -2]),
    ({"missing_eos": "replace", "missing_eos_penalty": 4}, [1, -4, -5]),
])
def test_weights_then_clip_then_the_eos_rule(settings, expected):
    assert combine(PARTS, three(ENDS), config(**settings)).tolist() == expected


def three(finish_reason):
    """Three responses of one token, ended so."""
    token = Ragged.from_rows([np.zeros(1, np.int32)] * 3, np.int32)
    return Rollouts(row_id=np.arange(3), prompt_id=np.arange(3), prompt=("",) * 3, response=("",) * 3, prompt_tokens=token,
                    response_tokens=token, logprobs=token.with_values(np.zeros(3, np.float32)), finish_reason=finish_reason)


def test_a_sum_that_overflows_is_refused_with_its_rows():
    parts = {"a": np.float32([1, 3e38, 1]), "b": np.float32([0, -3e38, 0])}
    with pytest.raises(NonFiniteError, match="the score is inf in row 1"):
        combine(parts, three(ENDS), config())


def test_the_stage_keeps_each_component(rollouts):
    parts = RewardConfig(components={"length": ComponentConfig(source="m:f", weight=0.5),
                                     "one": ComponentConfig(source="m:g")})
    out = reward({"length": lambda r: np.float32([len(text) for text in r.response]),
                  "one": lambda r: np.ones(len(r), np.float32)}, rollouts, parts)
    lengths = np.array([len(text) for text in rollouts.response])
    np.testing.assert_allclose(out.score, 0.5 * lengths + 1)
    measured = metrics(out).flat()
    assert measured["component_one"] == 1 and abs(measured["component_length"] - lengths.mean()) < 1e-6


@pytest.mark.parametrize("function, message", [
    (lambda p, r: [1.0], "expected 9 numbers, one a response, found shape (1,)"),
    (lambda p, r: ["good"] * len(r), "expected 9 numbers"),
    (lambda p, r: 1 / 0, "the function raised ZeroDivisionError"),
])
def test_a_function_that_does_not_score_is_named(function, message, rollouts):
    with pytest.raises(RewardError) as error:
        function_scorer("mine.py:score", function)(rollouts)
    assert "mine.py:score" in str(error.value) and message in str(error.value)


def test_a_nan_reward_is_refused_with_its_rows(rollouts):
    parts = RewardConfig(components={"x": ComponentConfig(source="m:f")})
    with pytest.raises(NonFiniteError, match=r"reward component 'x' is nan in rows 2, 5"):
        reward({"x": lambda r: np.where(np.isin(r.row_id, [2, 5]), np.nan, 1.0)}, rollouts, parts)


def test_a_reward_model_scores_as_transformers_does_row_by_row(tiny_critic, rollouts):
    import torch

    ours = model_scorer(tiny_critic)(rollouts)
    for row in range(len(rollouts)):
        ids = np.concatenate([rollouts.prompt_tokens[row], rollouts.response_tokens[row]]).astype(np.int64)
        with torch.inference_mode():
            expected = tiny_critic.module(input_ids=torch.tensor(ids[None])).logits.item()
        assert abs(ours[row] - expected) < 2e-6


class _Handler(BaseHTTPRequestHandler):
    answer = staticmethod(lambda body: {"scores": [float(len(text)) for text in body["responses"]]})
    status = 200

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        data = json.dumps(self.answer(body)).encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    def start(**attributes):
        handler = type("Handler", (_Handler,), attributes)
        http = HTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=http.serve_forever, daemon=True).start()
        started.append(http)
        return f"http://127.0.0.1:{http.server_port}/score"

    started: list[HTTPServer] = []
    yield start
    for http in started:
        http.shutdown()


def test_a_reward_server_is_asked_over_http(server, rollouts):
    scores = server_scorer(server())(rollouts)
    assert scores.tolist() == [len(text) for text in rollouts.response]


@pytest.mark.parametrize("attributes, message", [
    ({"status": 503}, "503"),
    ({"answer": staticmethod(lambda body: {"result": []})}, "expected an object with 'scores'"),
    ({"answer": staticmethod(lambda body: {"scores": [1]})}, "expected 9 numbers"),
])
def test_a_reward_server_that_fails_is_named(server, rollouts, attributes, message):
    url = server(**attributes)
    with pytest.raises(RewardError) as error:
        server_scorer(url)(rollouts)
    assert url in str(error.value) and message in str(error.value)


def test_no_reward_server(rollouts):
    with pytest.raises(RewardError, match=r"127\.0\.0\.1:9"):
        server_scorer("http://127.0.0.1:9/score")(rollouts)

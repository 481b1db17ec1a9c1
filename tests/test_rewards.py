"""Reward sources and how they become one score; a real reward server on loopback."""


import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from schemas.artifacts import Moments
from schemas.errors import NonFiniteError, RewardError
from schemas.reward_settings import ComponentConfig, RewardConfig
from schemas.tables import Ragged, Rewards, Rollouts
from stages.ops.finite import require_finite
from stages.ops.moments import normalized, updated_moments
from stages.ops.prompts import demonstrations_as_texts, pretraining_as_texts
from stages.ops.rewards import (
    function_scorer,
    model_scorer,
    overlong_penalty,
    weighted_sum,
)
from stages.reward import metrics, reward
from stages.reward_bias import metrics as bias_metrics
from stages.reward_bias import reward_bias


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
    assert scored(three(ENDS), PARTS, config(**settings)).score.tolist() == expected


def scored(rollouts, parts, settings, bias=0.0, moments=Moments(), max_new_tokens=10):  # noqa: B008
    """What the stage makes of components that are known."""
    scorers = {name: lambda _, values=values: values for name, values in parts.items()}
    return reward(scorers, rollouts, settings, bias=bias, moments=moments, max_new_tokens=max_new_tokens)[0]


def rows_of(*lengths):
    """Responses of so many tokens that all ended."""
    tokens = Ragged.from_rows([np.zeros(n, np.int32) for n in lengths], np.int32)
    return Rollouts(row_id=np.arange(len(lengths)), prompt_id=np.arange(len(lengths)), prompt=("",) * len(lengths),
                    response=("said",) * len(lengths), prompt_tokens=tokens, response_tokens=tokens,
                    logprobs=tokens.with_values(np.zeros(sum(lengths), np.float32)), finish_reason=("eos",) * len(lengths))


def test_a_function_may_reward_each_token():
    """Components 2·(tokens: 1, −3 and 4) − (whole: 1 and 1), clipped to 5: the rest is paid at the last token."""
    rollouts = rows_of(2, 1)
    tokens = function_scorer("m:f", lambda prompts, responses: [np.array([1.0, -3.0]), [4]])
    scorers = {"a": tokens, "b": lambda _: np.float32([1, 1])}
    out, paid = reward(scorers, rollouts, config(clip=5), bias=0.0, moments=Moments(), max_new_tokens=10)
    assert out.components["a"].tolist() == [-2, 4] and out.score.tolist() == [-5, 5]
    assert paid.rewards.values.tolist() == [2, -6, 8]
    assert out.of_steps(rollouts.logprobs, paid).tolist() == [2, -7, 5]


@pytest.mark.parametrize(("given", "error", "message"), [
    ([[1.0], [1.0]], RewardError, "gave 1 numbers for the 2 tokens of the response in row 0, 'said'; expected one for each"),
    ([[1.0, 2.0], ["a"]], RewardError, r"expected numbers for the tokens of the response in row 1, 'said', found \['a'\]"),
    ([[1, [2, 3]], [1]], RewardError, r"expected numbers for the tokens of the response in row 0, 'said', found \[1, \[2"),
    ([["1", "2"], ["3"]], RewardError, "expected numbers for the tokens"),
    ([[10**400, 1], [1]], RewardError, "expected numbers for the tokens"),
    ([[1.0, float("nan")], [1.0]], NonFiniteError, "a token's reward is nan in row 0"),
    ([[1.0, 2.0], 3.0], RewardError, "expected 2 numbers"),
])
def test_what_is_no_reward_of_each_token(given, error, message):
    with pytest.raises(error, match=message):
        function_scorer("m:f", lambda prompts, responses: given)(rows_of(2, 1))


@pytest.mark.parametrize("given", [
    [torch.tensor([0.5]), torch.tensor([0.2])], [np.array([0.5]), np.array([0.2])],
    [torch.tensor([0.5], requires_grad=True), torch.tensor(0.2)]])
def test_an_array_of_one_number_is_the_score_of_a_response(given):
    found = function_scorer("m:f", lambda prompts, responses: given)(rows_of(2, 1))
    assert found.tolist() == pytest.approx([0.5, 0.2])


@pytest.mark.parametrize("given", [
    [torch.tensor([1.0, 2.0], requires_grad=True), [3]], [np.array([1.0, 2.0]), np.array([3.0])],
    [[torch.tensor(1.0), np.float32(2)], [3]]])
def test_arrays_reward_tokens_too_also_of_a_response_of_one(given):
    assert function_scorer("m:f", lambda prompts, responses: given)(rows_of(2, 1)).values.tolist() == [1, 2, 3]


@pytest.mark.parametrize("given", [np.array([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1, 2], [3, 4]])])
def test_one_array_rewards_the_tokens_of_responses_of_one_length(given):
    assert function_scorer("m:f", lambda prompts, responses: given)(rows_of(2, 2)).values.tolist() == [1, 2, 3, 4]


def test_rewards_of_tokens_are_not_normalised():
    scorers = {"a": lambda rollouts: rollouts.logprobs, "b": lambda _: np.float32([1, 1])}
    with pytest.raises(RewardError, match=r"it rewards each token, and reward.normalize=scale changes whole scores"):
        reward(scorers, rows_of(2, 1), config(normalize="scale"), bias=0.0, moments=Moments(), max_new_tokens=10)


def three(finish_reason):
    """Three responses of one token, ended so."""
    token = Ragged.from_rows([np.zeros(1, np.int32)] * 3, np.int32)
    return Rollouts(row_id=np.arange(3), prompt_id=np.arange(3), prompt=("",) * 3, response=("",) * 3, prompt_tokens=token,
                    response_tokens=token, logprobs=token.with_values(np.zeros(3, np.float32)), finish_reason=finish_reason)


def test_a_sum_that_overflows_is_refused_with_its_rows():
    parts = {"a": np.float32([1, 3e38, 1]), "b": np.float32([0, -3e38, 0])}
    with pytest.raises(NonFiniteError, match="the score is inf in row 1"):
        scored(three(ENDS), parts, config())


def test_order_of_the_score():
    """Raw 1, 5, −5 less bias 1: 0, 4, −6; over their σ: clipped to 1; then the EOS rule of the second."""
    out = scored(three(ENDS), PARTS, config(normalize="scale", clip=1, missing_eos="subtract", missing_eos_penalty=0.5), 1.0)
    sigma = np.std([0, 4, -6])
    assert out.raw_score.tolist() == [0, 4, -6]
    np.testing.assert_allclose(out.score, [0, min(4 / sigma, 1) - 0.5, -1], rtol=1e-6)


@given(st.lists(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=9), min_size=1, max_size=5))
def test_running_moments_are_those_of_all_scores_at_once(batches):
    moments = Moments()
    for batch in batches:
        moments = updated_moments(moments, np.float32(batch))
    everything = np.concatenate(batches).astype(np.float64)
    assert moments.count == len(everything)
    np.testing.assert_allclose([moments.mean, moments.std], [everything.mean(), everything.std()], atol=1e-6)


def test_scores_are_normalized_by_the_moments_that_hold_them():
    before = updated_moments(Moments(), np.float32([0, 2]))
    out = scored(three(ENDS), PARTS, config(normalize="standardize"), moments=before)
    everything = np.float64([0, 2, 1, 5, -5])
    np.testing.assert_allclose(out.score, (everything[2:] - everything.mean()) / everything.std(), rtol=1e-6)
    measured = metrics(out, config(normalize="standardize"), before)
    np.testing.assert_allclose([measured.running_count, measured.running_mean, measured.running_std],
                               [5, everything.mean(), everything.std()])
    plain = metrics(out, config(), before)
    assert (plain.running_count, plain.running_mean, plain.running_std) == (None, None, None)
    assert normalized(np.float32([3]), Moments(count=4, mean=1, std=2), "scale").tolist() == [1.5]
    assert normalized(np.float32([3, 3]), Moments(count=2, mean=3, std=0), "scale").tolist() == [3, 3]


def test_the_overlong_penalty_by_hand():
    """Of 10 tokens the last 4 are the buffer: 6 cost nothing, 7 a quarter, 10 all."""
    np.testing.assert_allclose(overlong_penalty(np.array([1, 6, 7, 9, 10]), 10, 4), [0, 0, 0.25, 0.75, 1])
    out = scored(three(ENDS), PARTS, config(overlong_buffer=4, overlong_penalty=2), max_new_tokens=2)
    assert out.score.tolist() == [1 - 1.5, 5 - 1.5, -5 - 1.5]  # one token of two, of which four are the buffer


DEMONSTRATIONS = [{"prompt": "The soup", "completion": " was warm."}, {"prompt": "A", "completion": " fine evening"}]


def test_demonstrations_score_0_on_average_once_their_mean_is_taken_off(tiny_model, tiny_critic):
    texts = demonstrations_as_texts(tiny_model.tokenizer, DEMONSTRATIONS, chat_template=False)
    parts = RewardConfig(components={"m": ComponentConfig(source="reward_model", weight=3)})
    out = reward_bias({"m": model_scorer(tiny_critic)}, texts, parts)
    assert abs((weighted_sum(out.components, parts, bias_metrics(out).bias)).mean()) < 1e-6
    for row, demonstration in enumerate(DEMONSTRATIONS):
        whole = tiny_model.tokenizer("".join(demonstration.values()))["input_ids"]
        assert [*texts.prompt_tokens[row], *texts.response_tokens[row]] == [*whole, tiny_model.tokenizer.eos_token_id]
        assert tiny_model.tokenizer.decode(texts.prompt_tokens[row]) == demonstration["prompt"]


def test_texts_are_whole_where_tokens_reach_over_the_prompts_end(tiny_model):
    """A prompt that ends within a token of the whole, and one that is empty."""
    tokenizer = tiny_model.tokenizer
    for prompt, completion in (("The so", "up was warm."), ("", "The soup."), ("The f", "ilm and the fil")):
        texts = demonstrations_as_texts(tokenizer, [{"prompt": prompt, "completion": completion}], False)
        whole = [*texts.prompt_tokens[0], *texts.response_tokens[0]]
        assert whole == [*tokenizer(prompt + completion)["input_ids"], tokenizer.eos_token_id]
        assert len(texts.prompt_tokens[0]) >= 1 and len(texts.response_tokens[0]) >= 1


def test_pretraining_text_is_the_response_to_its_first_token(tiny_model):
    texts = pretraining_as_texts(tiny_model.tokenizer, [{"text": "The soup was warm."}])
    ids = tiny_model.tokenizer("The soup was warm.")["input_ids"]
    assert texts.prompt_tokens[0].tolist() == ids[:1]
    assert texts.response_tokens[0].tolist() == [*ids[1:], tiny_model.tokenizer.eos_token_id]


def test_the_stage_keeps_each_component(rollouts):
    parts = RewardConfig(components={"length": ComponentConfig(source="m:f", weight=0.5),
                                     "one": ComponentConfig(source="m:g")})
    out, _ = reward({"length": lambda r: np.float32([len(text) for text in r.response]),
                  "one": lambda r: np.ones(len(r), np.float32)}, rollouts, parts, bias=0.0,
                 moments=Moments(), max_new_tokens=12)
    lengths = np.array([len(text) for text in rollouts.response])
    np.testing.assert_allclose(out.score, 0.5 * lengths + 1)
    measured = metrics(out, parts, Moments()).flat()
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
        reward({"x": lambda r: np.where(np.isin(r.row_id, [2, 5]), np.nan, 1.0)}, rollouts, parts,
               bias=0.0, moments=Moments(), max_new_tokens=12)


def test_a_reward_model_scores_as_transformers_does_row_by_row(tiny_critic, rollouts):
    import torch

    ours = model_scorer(tiny_critic)(rollouts)
    for row in range(len(rollouts)):
        ids = np.concatenate([rollouts.prompt_tokens[row], rollouts.response_tokens[row]]).astype(np.int64)
        with torch.inference_mode():
            expected = tiny_critic.module(input_ids=torch.tensor(ids[None])).logits.item()
        assert abs(ours[row] - expected) < 2e-6


@pytest.mark.parametrize("scores, spread", [([5.0], 0.0), ([1.0, 3.0], 2**0.5), ([1.0, 2.0, 6.0], 7**0.5)])
def test_metrics_of_scores_by_hand(scores, spread):
    """σ is divided by n − 1, and 0 for a single score; raw scores are apart from scores."""
    values, raw = np.array(scores, np.float32), np.array(scores, np.float32) * 10
    table = Rewards(row_id=np.arange(len(scores)), raw_score=raw, score=values, components={"a": raw + 1, "b": raw - 1})
    found = metrics(table, config(), Moments())
    assert found.score == pytest.approx(np.mean(scores)) and found.score_std == pytest.approx(spread)
    assert (found.score_min, found.score_max) == (min(scores), max(scores))
    assert found.raw_score == pytest.approx(10 * np.mean(scores))
    assert found.component == {"a": pytest.approx(found.raw_score + 1), "b": pytest.approx(found.raw_score - 1)}


def test_how_demonstrations_score():
    rewards = Rewards(np.arange(3), np.float32([1, 2, 4]), np.float32([1, 2, 4]), {})
    measured = bias_metrics(rewards)
    assert (measured.bias, measured.bias_std) == pytest.approx((7 / 3, 1.5275252316519468))


@pytest.mark.parametrize("bad, rows", [
    ([3], "row 13"), ([0, 3], "rows 10, 13"), (range(8), "rows 10, 11, 12, 13, 14, 15, 16, 17"),
    (range(10), "rows 10, 11, 12, 13, 14, 15, 16, 17 and 2 more")])
def test_a_number_that_is_none_is_said_with_its_rows(bad, rows):
    values = np.ones(12, np.float32)
    values[list(bad)] = np.inf
    with pytest.raises(NonFiniteError, match=f"^the score is inf in {rows}$"):
        require_finite("the score", values, np.arange(10, 22))

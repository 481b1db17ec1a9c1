"""Which tokens may come, and what ends a response: the same distribution in rollout, reference and update."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from brought import make_tokenizer, write_brought

from flows.cli.main import run_command
from flows.runs.run import open_run
from flows.store.store import Store
from schemas.errors import ConfigError
from schemas.language import RolloutConfig
from schemas.settings import PPOConfig
from schemas.tables import Advantages, Rollouts
from stages.ops import token_logprobs
from stages.ops.distribution import Distribution, distribution_of, token_ids
from stages.ops.language_learner import LanguageModelLearner
from stages.ops.sampling import ModelSampler, Stops, sample_tokens
from stages.ops.token_logprobs import score_tokens
from stages.ppo import ppo
from stages.rollout import rollout

PROMPTS = ["The soup", "The film The Salt Road", "A night at Villa Rosa", "My copy", "The choir at Saint Agnes", "Our"]


def sampled(model, **settings):
    config = RolloutConfig(**{"max_new_tokens": 12, "temperature": 0.8} | settings)
    rollouts = rollout(ModelSampler(model), PROMPTS * 4, np.arange(24), config, seed=11)
    return rollouts, distribution_of(config.model_dump(), model.tokenizer, model.eos_ids)


def likely(model, *tokens, by=0.35):
    """The model with these tokens made likelier."""
    module = copy.deepcopy(model.module)
    with torch.no_grad():
        module.transformer.ln_f.bias += 0.5
        module.lm_head.weight[list(tokens)] += by
    return replace(model, module=module)


def by_hand(model, rollouts, row, banned, early=(), least=0, temperature=0.8):
    """log π of each token of a response, one after the other, in float64, over the tokens that may come."""
    ids, found = list(rollouts.prompt_tokens[row]), []
    for t, token in enumerate(rollouts.response_tokens[row]):
        with torch.no_grad():
            logits = model.module(torch.tensor([ids])).logits[0, -1].double() / temperature
        out = {*banned, *(early if t < least else ())}
        allowed = [v for v in range(len(logits)) if v not in out]
        assert int(token) in allowed
        found.append(float(logits[int(token)] - torch.logsumexp(logits[allowed], 0)))
        ids.append(int(token))
    return found


SETTINGS = ({"suppress_tokens": (2, " the", "e")}, {"min_new_tokens": 6}, {"suppress_tokens": tuple(range(3, 120)),
            "min_new_tokens": 4, "stop_tokens": ("e", " was")})


@pytest.mark.parametrize("settings", SETTINGS)
def test_stored_logprobs_are_those_over_the_tokens_that_may_come(tiny_model, settings):
    """By a loop, by the reference's way, and by it with the head on some columns at a time."""
    model = likely(tiny_model, tiny_model.tokenizer.eos_token_id)
    rollouts, distribution = sampled(model, **settings)
    banned = set(token_ids(model.tokenizer, settings.get("suppress_tokens", ()), ""))
    early = {*model.eos_ids, *token_ids(model.tokenizer, settings.get("stop_tokens", ()), "")}
    for row in range(6):
        expected = by_hand(model, rollouts, row, banned, early, settings.get("min_new_tokens", 0))
        np.testing.assert_allclose(rollouts.logprobs[row], expected, atol=1e-5)
    assert not banned & {*rollouts.response_tokens.values.tolist()}
    assert rollouts.response_tokens.lengths.min() >= settings.get("min_new_tokens", 1)
    scored = score_tokens(model, rollouts, distribution, "test")
    np.testing.assert_allclose(scored.values, rollouts.logprobs.values, atol=5e-6)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("in_columns", [False, True])
def test_the_ratio_is_1_at_the_first_step_and_entropy_is_finite(tiny_model, monkeypatch, settings, in_columns):
    rollouts, distribution = sampled(tiny_model, **settings)
    if in_columns:
        monkeypatch.setattr(token_logprobs, "MAX_LOGITS", 24 * 320 * 2)
    learner = LanguageModelLearner(replace(tiny_model, module=copy.deepcopy(tiny_model.module)), None,
                                   PPOConfig(), distribution)
    noise = np.random.default_rng(0).normal(size=len(rollouts.logprobs.values)).astype(np.float32)
    draw = rollouts.logprobs.with_values(noise)
    table = Advantages(row_id=rollouts.row_id, kl=draw, rewards=draw, raw_advantages=draw, advantages=draw, returns=draw)
    metrics = ppo(learner, rollouts, None, table, PPOConfig(epochs=1, minibatches=1, entropy_coef=0.1), seed=0)
    assert abs(metrics.ratio_min - 1) < 1e-5 and abs(metrics.ratio_max - 1) < 1e-5
    suppressed = len(distribution.suppressed)
    assert 0 < metrics.entropy < np.log(320 - suppressed) + 1e-6
    assert all(torch.isfinite(p).all() for p in learner.actor.module.parameters())


def test_the_entropy_is_that_over_the_tokens_that_may_come():
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0]], requires_grad=True)
    pi = Distribution(suppressed=(3,)).logprobs(logits, 0)
    entropy = token_logprobs.entropy_of(pi).sum()
    p = torch.softmax(torch.tensor([1.0, 2.0, 3.0]).double(), 0)
    assert float(entropy) == pytest.approx(float(-(p * p.log()).sum()), abs=1e-6)
    entropy.backward()
    assert torch.isfinite(logits.grad).all() and logits.grad[0, 3] == 0


def test_a_token_that_may_not_come_is_never_drawn():
    pi = Distribution(suppressed=(0, 3)).logprobs(torch.zeros(4, 4), 0)
    assert sample_tokens(pi, torch.tensor([0.0, 0.4999, 0.5, 1.0], dtype=torch.float64)).tolist() == [1, 1, 2, 2]


# --- stops ---

def test_a_response_ends_with_the_token_by_which_it_holds_a_stop_text(tiny_model):
    tokenizer, stop = tiny_model.tokenizer, "xe"
    end = tokenizer("e")["input_ids"][0]
    model = likely(tiny_model, end, tokenizer("x")["input_ids"][0])
    config = {"max_new_tokens": 20, "stop": (stop, "QQ")}
    rollouts, _ = sampled(model, **config)
    free, _ = sampled(model, max_new_tokens=20)
    seen = set()
    for text, reason, tokens, whole in zip(rollouts.response, rollouts.finish_reason, rollouts.response_tokens,
                                           free.response_tokens, strict=True):
        assert list(tokens) == list(whole[: len(tokens)])  # the same uniforms: cut, not sampled otherwise
        decoded = [tokenizer.decode(tokens[: i + 1]) for i in range(len(tokens))]
        assert not any(stop in part for part in decoded[:-1])
        assert (reason == "stop") == (stop in decoded[-1]) and stop not in text[: len(text) - 2 * len(stop)]
        seen.add(reason)
    assert seen >= {"stop", "length"}
    assert rollouts.terminated.tolist() == [reason != "length" for reason in rollouts.finish_reason]


def test_a_stop_token_ends_and_stays(tiny_model):
    end = tiny_model.tokenizer("e")["input_ids"][0]
    rollouts, _ = sampled(likely(tiny_model, end), stop_tokens=("e",), max_new_tokens=20)
    stopped = [tokens for tokens, reason in zip(rollouts.response_tokens, rollouts.finish_reason, strict=True)
               if reason == "stop"]
    assert stopped and all(tokens[-1] == end and end not in tokens[:-1] for tokens in stopped)


def test_how_rows_are_batched_does_not_decide_where_they_stop(tiny_model):
    model = likely(tiny_model, tiny_model.tokenizer("e")["input_ids"][0])
    together, _ = sampled(model, stop=("e",))
    alone, _ = sampled(replace(model, generation_batch_size=1), stop=("e",))
    np.testing.assert_array_equal(together.response_tokens.values, alone.response_tokens.values)
    assert together.finish_reason == alone.finish_reason


def test_a_stop_text_before_the_least_length_ends_nothing(tiny_model):
    stops = Stops(frozenset(), texts=("a",), tokenizer=tiny_model.tokenizer, min_new_tokens=3)
    token = tiny_model.tokenizer("a")["input_ids"][0]
    other = tiny_model.tokenizer("x")["input_ids"][0]
    assert stops.reasons(np.array([[token]]), 1) == [""] and stops.reasons(np.array([[other, other, token]]), 3) == ["stop"]
    assert stops.reasons(np.array([[token, other, other]]), 3) == [""]  # it ends with another token


# --- a run ---

@pytest.mark.parametrize("setting, words", [
    ("rollout.suppress_tokens=[no such]", "rollout.suppress_tokens: 'no such' is not one token of the tokenizer, but"),
    ("rollout.suppress_tokens=[9999]", "rollout.suppress_tokens: 9999 is no token id; the tokenizer has 0 to"),
    ("rollout.stop=[\"\"]", "rollout.stop: an empty text would end every response at once"),
    ("rollout.min_new_tokens=99", "min_new_tokens=99 is more than max_new_tokens=8"),
])
def test_settings_that_nothing_could_be_sampled_by(tmp_path, capsys, setting, words):
    folder = write_brought(tmp_path / "case")
    assert run_command(["train", str(folder), "--store", str(tmp_path / "store"), "--set", setting]) == 2
    error = capsys.readouterr().err
    assert words in error.replace("rollout: stop", "rollout.stop") and error.count("\n") == 1
    assert not (tmp_path / "store" / "runs").exists()


def test_a_mask_that_forbids_everything(tmp_path, capsys):
    folder = write_brought(tmp_path / "case")
    everything = list(range(len(make_tokenizer())))
    for setting, words in ((f"{{suppress_tokens: {everything}}}", "none of the model's 300 tokens may be sampled; leave"),
                           (f"{{suppress_tokens: {everything[:1] + everything[2:]}, min_new_tokens: 2, max_new_tokens: 8, "
                            "batch_size: 8}", "may be sampled before min_new_tokens; leave some")):
        assert run_command(["train", str(folder), "--store", str(tmp_path / "store"), "--set", f"rollout={setting}"]) == 2
        assert words.replace("300", str(len(everything))) in capsys.readouterr().err


def test_a_stop_text_that_the_tokenizer_cannot_write(tmp_path, capsys):
    from tokenizers import normalizers
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    folder = write_brought(tmp_path / "case", tokenizer=tokenizer)
    assert run_command(["train", str(folder), "--store", str(tmp_path / "store"), "--set", "rollout.stop=[END]"]) == 2
    words = "rollout.stop: the tokenizer writes 'END' as 'end', so that no response would end on it"
    assert words in capsys.readouterr().err


def test_a_run_with_all_of_them_reproduces_each_stage(tmp_path, capsys, prefect_server):
    folder = write_brought(tmp_path / "case", kl={"coef": 0.1})
    chosen = ["--set", "rollout.stop=[e]", "--set", "rollout.suppress_tokens=[x, 7]", "--set", "rollout.min_new_tokens=2",
              "--set", "rollout.stop_tokens=[w]"]
    store = ["--store", str(tmp_path / "store"), "--quiet"]
    assert run_command(["train", str(folder), *store, *chosen]) == 0
    run = open_run(Store(str(tmp_path / "store")), "case")
    metrics = run.state(1).metrics
    assert abs(metrics["gae/kl"]) < 1e-4 and metrics["ppo/ratio_min"] < metrics["ppo/ratio_max"] < 1.5
    rollouts = run.store.table(run.state(1).artifacts["rollout"], Rollouts)
    assert {*rollouts.finish_reason} <= {"eos", "stop", "length"} and rollouts.response_tokens.lengths.min() >= 2
    calls = run.store.manifest(run.state(1).artifacts["reference"]).recipe.config
    assert calls == {"temperature": 1.0, "suppress_tokens": ["x", 7], "min_new_tokens": 2, "stop_tokens": ["w"]}
    for stage in ("rollout", "reference", "reward", "value", "gae", "ppo", "evaluate"):
        assert run_command(["stage", stage, "case", "--iteration", "1", *store]) == 0, stage
    with pytest.raises(ConfigError):
        distribution_of({"temperature": 1.0, "suppress_tokens": ["no such"]}, make_tokenizer(), frozenset())

"""Responses of several turns: who answers, which tokens are masked, what the numbers are by hand, and the same bytes
again."""

import json

import numpy as np
import pytest
import torch
from brought import make_model, make_tokenizer, with_eos_often, write_brought
from conftest import assert_same_bytes
from test_kill import kill_anywhere

from flows.cli.main import run_command
from flows.runs.run import open_run
from flows.store.store import Store
from flows.views.sql import Database
from schemas.errors import RewardError
from schemas.language import RolloutConfig
from schemas.settings import GAEConfig, KLConfig, PPOConfig
from schemas.tables import Advantages, ReferenceLogprobs, Rewards, Rollouts, Samples, Values
from stages.gae import gae
from stages.ops.advantages import gae_advantages
from stages.ops.distribution import Distribution
from stages.ops.language_learner import LanguageModelLearner
from stages.ops.language_model import LanguageModel
from stages.ops.sampling import ModelSampler, respond
from stages.ops.token_logprobs import score_tokens
from stages.ops.turns import Partner
from stages.ppo import ppo

TEMPLATE = ("{% for m in messages %}<|bos|>{{ m['role'] }}: {{ m['content'] }}<|eos|>{% endfor %}"
            "{% if add_generation_prompt %}<|bos|>assistant: {% endif %}")
PLAY = '''
def play(messages, answer):
    """Two replies, of the number of letters so far and of the prompt's column; then it is over."""
    out = []
    for turns, right in zip(messages, answer):
        said = sum(turn["role"] == "assistant" for turn in turns)
        out.append(None if said > 2 else {"role": "tool", "content": f"{len(turns[-1]['content'])} of {right}"})
    return out

def score(responses, messages):
    return [float(len(turns)) + len(response) % 3 for turns, response in zip(messages, responses)]
'''


@pytest.fixture(scope="module")
def model():
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    module = with_eos_often(make_model(tokenizer=tokenizer, max_position_embeddings=256), tokenizer)
    return LanguageModel(module, tokenizer, chat_template=True)


def partner(function, max_turns=3, max_reply_tokens=60):
    return Partner("play", function, max_turns, max_reply_tokens)


def sampled(model, function, seed=3, **more):
    config = RolloutConfig(max_new_tokens=24, batch_size=6, temperature=0.9)
    prompts = ["The soup", "it", "warm", "is it ? x", "y x", "the book is"]
    return respond(ModelSampler(model), prompts, np.arange(6), config, seed=seed, progress="test",
                   partner=partner(function, **more))


def twice(messages):
    return [None if len(turns) > 3 else f"so {len(turns)}" for turns in messages]


def test_the_tokens_are_those_of_the_template_and_the_mask_is_of_replies(model):
    rollouts, tokenizer, several = sampled(model, twice), model.tokenizer, 0
    for row in range(6):
        said, tokens = json.loads(rollouts.turns[row]), rollouts.response_tokens[row]
        mask, logprobs = rollouts.sampled[row], rollouts.logprobs[row]
        assert (logprobs[~mask] == 0).all() and (logprobs[mask] < 0).all() and mask[0] and mask[-1]
        assert [turn["role"] for turn in said] == ["assistant", "user"][: len(said)] + ["assistant"] * (len(said) > 2)
        whole = tokenizer.decode([*rollouts.prompt_tokens[row], *tokens])
        if len(said) == 3:
            several += 1
            ended = tokens[np.flatnonzero(~mask)[0] - 1] == tokenizer.eos_token_id
            reply = f"{'' if ended else '<|eos|>'}<|bos|>user: so 2<|eos|><|bos|>assistant: "
            assert tokenizer.decode(tokens[~mask]) == reply
            expected = tokenizer.apply_chat_template(
                [{"role": "user", "content": rollouts.prompt[row]}, *said], tokenize=False)
            assert whole in (expected, expected.removesuffix("<|eos|>"))
        assert mask.sum() <= 24
    assert several >= 2 and {*rollouts.finish_reason} <= {"eos", "length"}
    assert rollouts.sampled_lengths.tolist() == [int(mask.sum()) for mask in rollouts.sampled]


def test_logprobs_are_those_of_one_pass_over_the_whole_conversation(model):
    rollouts = sampled(model, twice)
    scored = score_tokens(model, rollouts, Distribution(0.9), "test")
    np.testing.assert_allclose(scored.values, rollouts.logprobs.values, atol=1e-5)
    assert (scored.values[~rollouts.sampled.values] == 0).all()


def test_a_conversation_of_one_turn_is_the_response_without_a_partner(model):
    rollouts = sampled(model, lambda messages: [None] * len(messages))
    config = RolloutConfig(max_new_tokens=24, batch_size=6, temperature=0.9)
    alone = respond(ModelSampler(model), rollouts.prompt, np.arange(6), config, seed=3, progress="test")
    np.testing.assert_array_equal(rollouts.response_tokens.values, alone.response_tokens.values)
    np.testing.assert_array_equal(rollouts.logprobs.values, alone.logprobs.values)
    assert rollouts.sampled.values.all() and alone.sampled is None and rollouts.response == alone.response


def two_turns():
    """One response: two sampled tokens, a reply of two, two sampled tokens; and its values, reference and score."""
    from schemas.tables import Ragged
    ragged = lambda *x: Ragged.from_rows([np.array(x)], np.float32)  # noqa: E731
    sampled = Ragged.from_rows([np.array([1, 1, 0, 0, 1, 1], bool)], np.bool_)
    rollouts = Rollouts(
        row_id=np.arange(1), prompt_id=np.arange(1), prompt=("p",), response=("r",),
        prompt_tokens=Ragged.from_rows([np.array([5])], np.int32),
        response_tokens=Ragged.from_rows([np.array([1, 2, 3, 4, 5, 6])], np.int32),
        logprobs=ragged(-1.0, -2.0, 0, 0, -1.0, -0.5), finish_reason=("eos",), sampled=sampled, turns=("[]",))
    reference = ReferenceLogprobs(row_id=np.arange(1), logprobs=ragged(-1.5, -2.0, 0, 0, -1.0, -1.5))
    values = Values(row_id=np.arange(1), values=ragged(0.5, 0.25, 0, 0, 1.0, 2.0), bootstrap=np.zeros(1, np.float32))
    one = np.ones(1, np.float32)
    rewards = Rewards(row_id=np.arange(1), raw_score=one, score=3 * one, components={})
    return rollouts, reference, rewards, values


def test_advantages_of_a_conversation_by_hand():
    """γ = 1, λ = ½, β = 0.1: δ_t = r_t + V of the next sampled token − V_t, and replies are not steps."""
    rollouts, reference, rewards, values = two_turns()
    table = gae(rollouts, reference, rewards, values, GAEConfig(gae_lambda=0.5, whiten="none"), KLConfig(), kl_coef=0.1)
    kl = [0.5, 0.0, 0.0, 1.0]
    r = [-0.05, 0.0, 0.0, 3.0 - 0.1]
    delta = [r[0] + 0.25 - 0.5, r[1] + 1.0 - 0.25, r[2] + 2.0 - 1.0, r[3] + 0.0 - 2.0]
    a3 = delta[3]
    a2 = delta[2] + 0.5 * a3
    a1 = delta[1] + 0.5 * a2
    a0 = delta[0] + 0.5 * a1
    at = [0, 1, 4, 5]
    for column, expected in ((table.kl, kl), (table.rewards, r), (table.advantages, [a0, a1, a2, a3]),
                             (table.returns, [a0 + 0.5, a1 + 0.25, a2 + 1.0, a3 + 2.0])):
        np.testing.assert_allclose(column.values[at], expected, atol=1e-6)
        assert (column.values[[2, 3]] == 0).all()


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_the_loss_is_the_mean_over_sampled_tokens(model, aggregation):
    """The gradient is that of a loop over the sampled tokens alone, each with its whole context."""
    import copy
    from dataclasses import replace
    rollouts = sampled(model, twice)
    n = len(rollouts.logprobs.values)
    draw = rollouts.logprobs.with_values(np.random.default_rng(1).normal(size=n).astype(np.float32))
    table = Advantages(row_id=rollouts.row_id, kl=draw, rewards=draw, raw_advantages=draw, advantages=draw, returns=draw)
    config = PPOConfig(epochs=1, minibatches=1, learning_rate=1e-3, max_grad_norm=1e9, loss_aggregation=aggregation)
    actor = replace(model, module=copy.deepcopy(model.module), micro_batch_tokens=150)
    learner = LanguageModelLearner(actor, None, config, Distribution(0.9))
    metrics = ppo(learner, rollouts, None, table, config, seed=0)
    assert abs(metrics.ratio_max - 1) < 1e-5 and abs(metrics.ratio_min - 1) < 1e-5

    loop = copy.deepcopy(model.module)
    losses = []
    for row in range(6):
        ids = [*rollouts.prompt_tokens[row], *rollouts.response_tokens[row]]
        logits = loop(torch.tensor([ids])).logits[0] / 0.9
        logprobs, first = logits.log_softmax(-1), len(rollouts.prompt_tokens[row])
        losses.append([-logprobs[first + t - 1, int(token)] * float(draw[row][t])
                       for t, token in enumerate(rollouts.response_tokens[row]) if rollouts.sampled[row][t]])
    flat = [loss for row in losses for loss in row]
    mean = sum(flat) / len(flat) if aggregation == "token" else sum(sum(row) / len(row) for row in losses) / len(losses)
    mean.backward()
    optimizer = learner.optimizers["actor"]
    for (name, one), other in zip(loop.named_parameters(), optimizer.param_groups[0]["params"], strict=True):
        moment = optimizer.state[other]["exp_avg"] / 0.1
        torch.testing.assert_close(moment, one.grad, rtol=1e-3, atol=2e-6, msg=name)


# --- runs ---

def write_case(folder, **rollout):
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    module = with_eos_often(make_model(tokenizer=tokenizer, max_position_embeddings=512), tokenizer)
    rows = [{"prompt": prompt, "answer": i} for i, prompt in enumerate(("The soup", "it", "warm", "is it ?", "y x", "book"))]
    folder = write_brought(
        folder, module, tokenizer, prompts="".join(json.dumps(row) + "\n" for row in rows).encode(), rewards_py=PLAY,
        base_model={"chat_template": True}, iterations=2, data={"heldout_prompts": "p.jsonl"},
        evaluate={"every": 1},
        rollout={"max_new_tokens": 24, "turns": {
            "function": "rewards.py:play", "max_turns": 3, "max_reply_tokens": 80}} | rollout)
    return folder


@pytest.fixture(scope="module")
def conversed(tmp_path_factory, prefect_server):
    place = tmp_path_factory.mktemp("turns")
    folder = write_case(place / "case")
    assert run_command(["train", str(folder), "--store", str(place / "store"), "--quiet"]) == 0
    return folder, place / "store"


def test_a_run_of_conversations_and_every_stage_again(conversed, capsys):
    run = open_run(Store(str(conversed[1])), "case")
    rollouts = run.store.table(run.state(1).artifacts["rollout"], Rollouts)
    said = [json.loads(turns) for turns in rollouts.turns]
    replies = [turn["content"] for turns in said for turn in turns if turn["role"] == "tool"]
    assert replies and all(reply.split(" of ")[1] in "012345" for reply in replies)
    rewards = run.store.table(run.state(1).artifacts["reward"], Rewards)
    expected = [1 + len(turns) + len(response) % 3 for turns, response in zip(said, rollouts.response, strict=True)]
    assert rewards.components["length"].tolist() == expected
    assert run.state(1).metrics["rollout/turns"] == np.mean([sum(t["role"] == "assistant" for t in turns) for turns in said])
    samples = run.store.table(run.state(1).artifacts["evaluate"], Samples)
    assert any("tool" in text for text in samples.response) and np.isfinite(samples.kl).all()
    for stage in ("rollout", "reference", "reward", "value", "gae", "ppo", "evaluate"):
        assert run_command(["stage", stage, "case", "--iteration", "2", "--store", str(conversed[1]), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["verdict"] == "same", stage


def test_delta_of_a_conversation_is_that_of_its_sampled_tokens(conversed):
    run = open_run(Store(str(conversed[1])), "case")
    artifacts = run.state(1).artifacts
    rollouts, values, gae = (run.store.table(artifacts[stage], kind) for stage, kind in (
        ("rollout", Rollouts), ("value", Values), ("gae", Advantages)))
    last = np.where(rollouts.truncated & (run.config.gae.truncation == "bootstrap"), values.bootstrap, 0)
    gae, values = gae.sampled_alone(rollouts.sampled), values.sampled_alone(rollouts.sampled)
    expected = gae_advantages(gae.rewards, values.values, last, run.config.gae.gamma, 0.0)
    found = Database([run]).sql("SELECT delta FROM tokens WHERE iteration = 1 ORDER BY row_id, position").fetchall()
    assert [delta is not None for delta, in found] == rollouts.sampled.values.tolist()
    np.testing.assert_allclose([delta for delta, in found if delta is not None], expected.values, atol=1e-6)
    metrics = run.state(1).metrics
    ((logprob, kl, tokens),) = Database([run]).sql(
        "SELECT avg(logprob), avg(kl), count(*) FROM tokens WHERE iteration = 1").fetchall()
    assert logprob == pytest.approx(metrics["rollout/logprob"])
    assert kl == pytest.approx(metrics["gae/kl_per_token"], abs=1e-9)
    assert tokens == len(rollouts.response_tokens.values)  # those of replies are there
    ((length,),) = Database([run]).sql("SELECT avg(length) FROM responses WHERE iteration = 1").fetchall()
    assert length == pytest.approx(metrics["rollout/response_length"])


def test_kill_9_anywhere_in_a_run_of_conversations(conversed, tmp_path):
    kill_anywhere(conversed[0], conversed[1], "case", "rollout", tmp_path)


def test_warm_or_cold_the_same_bytes(conversed, tmp_path, prefect_server):
    store = str(tmp_path / "store")
    for iteration in (1, 2):
        assert run_command(["train", str(conversed[0]), "--store", store, "--quiet", "--iterations", str(iteration)]) == 0
    assert_same_bytes(open_run(Store(store), "case"), open_run(Store(str(conversed[1])), "case"))


@pytest.mark.parametrize("body, words", [
    ("raise ValueError('no tool')", "rollout.turns rewards.py:play: the function raised ValueError: no tool (rewards.py"),
    ("return ['x ' * 100000] * len(messages)", "max_reply_tokens=80; make replies shorter, or raise it"),
    ("return [3] * len(messages)",
     "expected a text, a message {role, content}, or None to end the conversation, found '3' for"),
    ("return [{'role': 'user', 'content': 'x', 'more': object()}] * len(messages)", "cannot be kept as JSON: "),
    ("return ['\\ud800'] * len(messages)", "cannot be kept as JSON: "),
    ("return 'hello'", "replies, one a conversation, found hello"),
    ("import time; time.sleep(60)", "rollout.turns rewards.py:play: the function has not returned for 1 s"),
])
def test_a_partner_that_fails_is_named_and_the_next_run_goes_on(conversed, tmp_path, capsys, body, words, prefect_server):
    folder = write_case(tmp_path / "case", batch_size=6)
    good = (folder / "rewards.py").read_text()
    text = good.replace('    out = []\n', f"    {body}\n    out = []\n", 1)
    (folder / "rewards.py").write_text(text)
    train = ["train", str(folder), "--store", str(tmp_path / "store"), "--set", "execution.function_timeout=1", "--set",
             "evaluate.every=0", "--set", "iterations=1", "--set", "ppo.minibatches=3"]
    assert run_command(train) == 1
    assert words in capsys.readouterr().err
    assert not list((tmp_path / "store/artifacts").glob("rollout/*/manifest.json"))
    (folder / "rewards.py").write_text(good)
    assert run_command([*train, "--run", "good"]) == 0


def test_prompts_have_to_leave_room_for_replies(tmp_path, capsys):
    folder = write_case(tmp_path / "case")
    assert run_command(["train", str(folder), "--store", str(tmp_path / "store"), "--set",
                        "rollout.turns.max_reply_tokens=250"]) == 2
    assert "the model's context of 512 leaves -12 beside 524 for the response" in capsys.readouterr().err


def test_a_templates_end_of_turn_comes_once_also_if_it_is_a_token_without_a_name():
    """As Phi-3 ends turns by `<|end|>`, which is none of its named special tokens."""
    special = ["<|bos|>", "<|eos|>", "<|pad|>", "<|end|>"]
    tokenizer = make_tokenizer(special, chat_template=TEMPLATE.replace("<|eos|>", "<|end|>"))
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    said = [{"role": "assistant", "content": "it"}]
    for last, expected in ((end, "<|bos|>user: so<|end|>"), (5, "<|end|><|bos|>user: so<|end|>")):
        tokens = partner(twice).tokens(tokenizer, True, "p", said, {"role": "user", "content": "so"}, last, 0)
        assert tokenizer.decode(tokens).startswith(expected)


def test_a_template_that_leaves_out_what_the_assistant_said_is_refused():
    template = TEMPLATE.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'assistant' %}")
    tokenizer = make_tokenizer(chat_template=template)
    with pytest.raises(RewardError, match="leaves out the assistant's turns"):
        partner(twice).tokens(tokenizer, True, "p", [{"role": "assistant", "content": "it"}],
                              {"role": "user", "content": "so"}, 1, 0)

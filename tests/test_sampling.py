"""Sampling: the distribution, the logprobs, and what must not matter."""

from dataclasses import replace

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import NonFiniteError
from schemas.language import RolloutConfig
from stages.ops.distribution import Distribution
from stages.ops.sampling import ModelSampler, row_uniforms, sample_tokens
from stages.ops.token_logprobs import score_tokens
from stages.rollout import rollout


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=9), st.floats(0, 0.999))
def test_a_token_is_the_first_whose_cumulated_probability_exceeds_u(weights, u):
    probabilities = [w / sum(weights) for w in weights]
    ours = sample_tokens(torch.tensor([probabilities]).double().log(), torch.tensor([u]).double()).item()
    edges = np.cumsum(probabilities)
    if np.abs(edges - u).min() > 1e-9:  # on an edge either neighbour is right
        assert ours == oracles.sample(probabilities, u)


def test_frequencies_follow_the_distribution():
    p = torch.tensor([0.1, 0.6, 0.3])
    u = torch.from_numpy(np.random.Generator(np.random.Philox(0)).random(20000))
    drawn = sample_tokens(p.log().expand(20000, 3), u)
    assert torch.allclose(torch.bincount(drawn) / 20000, p, atol=0.01)


def test_uniforms_depend_on_seed_and_row_alone():
    whole = row_uniforms(4, np.arange(6), 5)
    np.testing.assert_array_equal(whole[[5, 2]], row_uniforms(4, np.array([5, 2]), 5))
    np.testing.assert_array_equal(whole[:, :3], row_uniforms(4, np.arange(6), 3))
    assert not np.array_equal(whole, row_uniforms(5, np.arange(6), 5))


def test_stored_logprobs_are_those_of_a_full_forward_pass(tiny_model, rollouts):
    """By a loop over rows without padding, cache or batch, the softmax written out in float64."""
    for row in range(len(rollouts)):
        ids = np.concatenate([rollouts.prompt_tokens[row], rollouts.response_tokens[row]])
        with torch.inference_mode():
            logits = tiny_model.module(input_ids=torch.tensor(ids[None].astype(np.int64))).logits[0].double() / 0.8
        start = len(rollouts.prompt_tokens[row]) - 1
        expected = [oracles.log_softmax(logits[start + t].tolist())[token]
                    for t, token in enumerate(rollouts.response_tokens[row])]
        np.testing.assert_allclose(rollouts.logprobs[row], expected, atol=2e-5)


def test_rows_end_at_eos_or_at_the_limit(tiny_model, rollouts):
    assert {"eos", "length"} >= set(rollouts.finish_reason)
    for tokens, reason in zip(rollouts.response_tokens, rollouts.finish_reason, strict=True):
        ended = np.isin(tokens, list(tiny_model.eos_ids))
        assert not ended[:-1].any()
        assert ended[-1] == (reason == "eos")
        assert reason == "eos" or len(tokens) == 12


def test_finished_rows_leave_the_batch_and_change_nothing(tiny_model):
    """With an EOS that is often drawn, rows end at different steps; each is as if it had been alone."""
    biased = _with_likely_eos(tiny_model)
    prompts = ["The soup", "The film The Salt Road", "A night", "My copy", "The choir at Saint Agnes", "Our room"]
    config = RolloutConfig(max_new_tokens=16)
    together = rollout(ModelSampler(biased), prompts, np.arange(6), config, seed=2)
    alone = rollout(ModelSampler(replace(biased, generation_batch_size=1)), prompts, np.arange(6), config, seed=2)
    assert len(set(together.response_tokens.lengths)) > 2
    np.testing.assert_array_equal(together.response_tokens.values, alone.response_tokens.values)
    np.testing.assert_allclose(together.logprobs.values, alone.logprobs.values, atol=2e-6)


def _with_likely_eos(model):
    """The model with its EOS made likelier by a large embedding, in the mean direction of the final norm's bias."""
    import copy

    module = copy.deepcopy(model.module)
    with torch.no_grad():
        module.transformer.ln_f.bias += 0.5
        module.lm_head.weight[model.tokenizer.eos_token_id] += 0.35
    return replace(model, module=module)


def test_several_samples_of_a_prompt_read_it_once(tiny_model):
    prompts = ["The soup", "A night", "The soup", "The choir at Saint Agnes", "The soup", "A night"]
    config, read = RolloutConfig(max_new_tokens=8), []
    hook = tiny_model.module.register_forward_pre_hook(
        lambda module, given, named: read.append(tuple(named["input_ids"].shape)), with_kwargs=True)
    together = rollout(ModelSampler(tiny_model), prompts, np.arange(6), config, seed=2)
    hook.remove()
    alone = rollout(ModelSampler(replace(tiny_model, generation_batch_size=1)), prompts, np.arange(6), config, seed=2)
    assert read[0][0] == 3 and read[1] == (6, 1)
    assert together.response[0] != together.response[2] != together.response[4]
    np.testing.assert_array_equal(together.response_tokens.values, alone.response_tokens.values)
    np.testing.assert_allclose(together.logprobs.values, alone.logprobs.values, atol=2e-6)


def test_scoring_does_not_depend_on_micro_batches(tiny_model, rollouts):
    wide = score_tokens(tiny_model, rollouts, Distribution(0.8), "test").values
    for budget in (1, 40, 90):
        narrow = score_tokens(replace(tiny_model, micro_batch_tokens=budget), rollouts, Distribution(0.8), "test").values
        np.testing.assert_allclose(narrow, wide, atol=2e-6)
    np.testing.assert_allclose(rollouts.logprobs.values, wide, atol=2e-6)


def test_no_padded_batch_exceeds_the_budget():
    from schemas.tables import Ragged
    from stages.ops.sequences import make_batch, split_by_tokens

    random = np.random.default_rng(0)
    for budget in (64, 182, 400):
        prompts, responses = (Ragged.from_rows([np.ones(n) for n in random.integers(1, 91, 40)], np.int32) for _ in range(2))
        lengths = prompts.lengths + responses.lengths
        groups = split_by_tokens(lengths, random.permutation(40), budget)
        assert sorted(np.concatenate(groups)) == list(range(40))
        for group in groups:
            size = make_batch(prompts, responses, group, 0, torch.device("cpu")).input_ids.numel()
            assert size <= budget or len(group) == 1


def test_little_of_a_batch_is_padding():
    """Under 5% where it is scored, with as few groups as that takes."""
    from stages.ops.sequences import split_by_tokens

    lengths = np.random.default_rng(0).integers(12, 81, 128)
    groups = split_by_tokens(lengths, np.arange(128), 4096)
    assert sum(len(group) * lengths[group].max() for group in groups) < 1.05 * lengths.sum()
    assert len(groups) <= 12
    assert len(split_by_tokens(np.full(64, 40), np.arange(64), 4096)) == 1


def test_a_nan_stops_the_rollout_with_its_rows(tiny_model):
    import copy

    module = copy.deepcopy(tiny_model.module)
    with torch.no_grad():
        module.transformer.wte.weight[tiny_model.tokenizer("x")["input_ids"][0]] = float("nan")
    broken = replace(tiny_model, module=module)
    with pytest.raises(NonFiniteError, match="the actor's logprob is nan"):
        rollout(ModelSampler(broken), ["a", "x", "a"], np.arange(3), RolloutConfig(max_new_tokens=3), seed=1)


def _llama(vocab, eos):
    from transformers import LlamaConfig, LlamaForCausalLM
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                        num_attention_heads=4, num_key_value_heads=2, eos_token_id=eos, pad_token_id=0))


def _neox(vocab, eos):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                            num_attention_heads=4, eos_token_id=eos, pad_token_id=0))


@pytest.mark.parametrize("make", [_llama, _neox])
def test_other_architectures_sample_and_score_alike(tiny_model, make):
    """Rotary positions, grouped heads, left padding and the cache: a rescoring finds the logprobs of the sampling."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        module = make(len(tiny_model.tokenizer), tiny_model.tokenizer.eos_token_id).eval()
    model = replace(tiny_model, module=module)
    prompts = ["The soup", "A night at Villa Rosa", "My", "The choir at Saint Agnes"]
    out = rollout(ModelSampler(model), prompts, np.arange(4), RolloutConfig(max_new_tokens=20), seed=6)
    np.testing.assert_allclose(score_tokens(model, out, Distribution(1.0), "test").values, out.logprobs.values, atol=5e-6)


def test_sampling_in_bfloat16_is_in_bfloat16(tiny_model):
    """The first token's logprob is that of one forward pass under autocast, and not that of float32; tokens and logprobs
    are of one distribution."""
    prompts = ["The soup", "A night at Villa Rosa", "My", "The choir at Saint Agnes"]
    config = RolloutConfig(max_new_tokens=6, precision="bfloat16")
    out = rollout(ModelSampler(replace(tiny_model, generation_batch_size=1)), prompts, np.arange(4), config, seed=6)
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([tiny_model.tokenizer(prompt)["input_ids"]])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits = tiny_model.module(ids).logits[0, -1]
        first = int(out.response_tokens[row][0])
        assert logits.dtype == torch.bfloat16
        assert out.logprobs[row][0] == logits.float().log_softmax(-1)[first]
    apart = abs(out.logprobs.values - score_tokens(tiny_model, out, Distribution(1.0), "test").values)
    assert 1e-5 < apart.max() < 0.05

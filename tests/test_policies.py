"""Policies of control tasks: distributions against torch's, moments of observations, checkpoints without Baton."""

import numpy as np
import pytest
import torch
from control import begun, config, own, play
from torch.distributions import Categorical, Independent, Normal

from schemas.control import PolicyConfig, Spaces
from stages.ops.networks import Actor, ToEnvironment
from stages.policy import policy

BOX = Spaces(observation_size=3, kind="box", low=(-1.0, None), high=(1.0, 2.0))
CHOICES = Spaces(observation_size=3, kind="discrete", choices=(2, 4), start=(0, 5))


def scattered(spaces, **settings):
    """An actor whose outputs are far from uniform."""
    actor, _ = policy(spaces, PolicyConfig(hidden=(7,), **settings), seed=1)
    generator = torch.Generator().manual_seed(2)
    for p in actor.parameters():
        p.data = torch.randn(p.shape, generator=generator)
    return actor


@pytest.mark.parametrize("state_dependent", [False, True])
def test_a_gaussians_logprobs_and_entropy_are_torchs(state_dependent):
    actor = scattered(BOX, state_dependent_std=state_dependent)
    observations, actions = torch.randn(50, 3), torch.randn(50, 2) * 3
    outputs = actor(observations)
    mean, log_std = outputs.chunk(2, 1) if state_dependent else (outputs, actor.log_std.expand(50, 2))
    theirs = Independent(Normal(mean, log_std.clamp(-20, 2).exp()), 1)
    logprobs, entropy = actor.score(observations, actions)
    torch.testing.assert_close(logprobs, theirs.log_prob(actions), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(entropy, theirs.entropy(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actor.most_likely(observations), mean)


def test_choices_add_up():
    actor = scattered(CHOICES)
    observations, actions = torch.randn(50, 3), torch.stack([torch.randint(2, (50,)), torch.randint(4, (50,))], 1)
    first, second = (Categorical(logits=logits) for logits in actor(observations).split((2, 4), 1))
    logprobs, entropy = actor.score(observations, actions.float())
    torch.testing.assert_close(logprobs, first.log_prob(actions[:, 0]) + second.log_prob(actions[:, 1]))
    torch.testing.assert_close(entropy, first.entropy() + second.entropy())
    assert torch.equal(actor.most_likely(observations)[:, 1], second.logits.argmax(1).float())


def test_actions_are_drawn_from_the_distribution_that_scores_them():
    """Frequencies of choices, and moments of a Gaussian, over 40,000 draws: within four standard errors."""
    n, generator = 40_000, np.random.default_rng(0)
    actor, one = scattered(CHOICES), torch.tensor([[0.3, -0.2, 0.5]])
    drawn = actor.sample(one.expand(n, 3), torch.from_numpy(actor.noise(generator, n)))
    for column, logits in enumerate(actor(one).split((2, 4), 1)):
        p = logits.softmax(1)[0]
        found = torch.bincount(drawn[:, column].long(), minlength=len(p)) / n
        assert (found - p).abs().max() < 4 * 0.5 / n**0.5
    actor = scattered(BOX)
    drawn = actor.sample(one.expand(n, 3), torch.from_numpy(actor.noise(generator, n)))
    std = actor.log_std.exp()
    assert ((drawn.mean(0) - actor(one)[0]).abs() < 4 * std / n**0.5).all()
    assert ((drawn.std(0) / std - 1).abs() < 4 / (2 * n) ** 0.5).all()


def test_the_environment_is_given_clipped_numbers_or_its_own_choices():
    given = ToEnvironment(BOX)(np.array([[-3.0, -9.0], [0.5, 9.0]], np.float32))
    assert given.tolist() == [[-1.0, -9.0], [0.5, 2.0]]  # no lower bound of the second
    assert ToEnvironment(CHOICES)(np.array([[1.0, 3.0]], np.float32)).tolist() == [[1, 8]]
    scalar = Spaces(observation_size=1, kind="discrete", choices=(3,), start=(-1,), scalar=True)
    assert ToEnvironment(scalar)(np.array([[0.0], [2.0]], np.float32)).tolist() == [-1, 1]


@pytest.mark.parametrize("spaces, gain", [(BOX, 0.01), (CHOICES, 0.01)])
def test_weights_begin_orthogonal(spaces, gain):
    actor, critic = policy(spaces, PolicyConfig(hidden=(16, 12), critic_hidden=(5,), log_std_init=-0.5), seed=4)
    for layer in (*actor.layers, *critic.layers, actor.head, critic.head):
        scale = {actor.head: gain, critic.head: 1.0}.get(layer, 2**0.5)
        w = layer.weight / scale
        short = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
        torch.testing.assert_close(short, torch.eye(len(short)), atol=1e-5, rtol=0)
        assert not layer.bias.any()
    assert [layer.out_features for layer in critic.layers] == [5]
    if spaces is BOX:
        assert actor.log_std.tolist() == [-0.5, -0.5]
        dependent, _ = policy(BOX, PolicyConfig(state_dependent_std=True, log_std_init=-0.5), seed=4)
        assert dependent.head.bias.tolist() == [0, 0, -0.5, -0.5]


def test_moments_of_observations_are_those_of_all_that_were_seen():
    actor = Actor(BOX, PolicyConfig(hidden=(4,), normalize_observations=True, clip_observations=1.5))
    seen = np.random.default_rng(0).normal([3, -50, 0.1], [2, 0.01, 30], (500, 3)).astype(np.float32)
    for part in np.split(seen, [1, 40, 300]):
        actor.observe(part[:, None] if len(part) > 40 else part[None])
    np.testing.assert_allclose(actor.observation_mean, seen.mean(0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(actor.observation_variance, seen.var(0, dtype=np.float64), rtol=1e-9)
    assert actor.observation_count == 500
    plain = Actor(BOX, PolicyConfig(hidden=(4,)))
    plain.load_state_dict({k: v for k, v in actor.state_dict().items() if "observation" not in k})
    z = (seen - seen.mean(0, dtype=np.float64)) / np.sqrt(seen.var(0, dtype=np.float64) + 1e-8)
    expected = plain(torch.from_numpy(z.clip(-1.5, 1.5)).float())
    torch.testing.assert_close(actor(actor.inputs(seen)), expected, atol=1e-5, rtol=1e-4)


def test_an_observation_that_never_varies_is_normalised_to_0():
    actor = Actor(BOX, PolicyConfig(hidden=(4,), normalize_observations=True))
    actor.observe(np.full((5, 2, 3), 7, np.float32))
    assert (actor.inputs(np.full((2, 3), 7, np.float32)) == 0).all()


def test_a_policy_that_was_not_told_to_normalise_keeps_no_moments():
    actor, _, environments = begun(config(environment=own("count")))
    before = {k: v.clone() for k, v in actor.state_dict().items()}
    actor.observe(np.ones((3, 1, 2), np.float32))
    assert actor.state_dict().keys() == before.keys() and not any("observation" in k for k in before)
    environments.close()


def test_stored_logprobs_and_values_are_those_computed_again():
    """One by one, in the order of time, as somebody would who has only the table."""
    c = config(environment={"id": "Pendulum-v1"}, policy={"normalize_observations": True}, rollout={"num_envs": 1})
    actor, critic, environments = begun(c)
    for network in (actor, critic):
        network.observe(np.random.default_rng(1).normal(0, 3, (100, 1, 3)).astype(np.float32))
    batch = play(c, actor, critic, environments)
    with torch.no_grad():
        for o, a, logprob, value in zip(batch.observations.values, batch.actions.values, batch.logprobs.values,
                                        batch.values.values, strict=True):
            a = torch.tensor(a)[None]
            for network in (actor, critic):
                network.observe(o[None, None])
            torch.testing.assert_close(actor.score(actor.inputs(o[None]), a)[0].item(), float(logprob), atol=2e-6, rtol=1e-5)
            torch.testing.assert_close(critic(critic.inputs(o[None])).item(), float(value), atol=2e-6, rtol=1e-5)
        for o, value in zip(batch.final_observation, batch.bootstrap, strict=True):
            torch.testing.assert_close(critic(critic.inputs(o[None])).item(), float(value), atol=2e-6, rtol=1e-5)

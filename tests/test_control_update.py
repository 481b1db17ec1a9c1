"""GAE and the update on trajectories: against a loop over time, against plain PyTorch, and A2C against PPO."""

import copy

import numpy as np
import pytest
import torch
from control import begun, config, in_memory, own, play, steps_of
from torch.distributions import Categorical, Independent, Normal

from schemas.settings import KLConfig
from stages.gae import gae
from stages.gae import metrics as gae_metrics
from stages.ops.control_learner import ControlLearner
from stages.ops.networks import Actor
from stages.ppo import ppo


def advantages_of(batch, c):
    return gae(batch, None, batch, batch, c.gae, KLConfig(), kl_coef=0.0)


@pytest.mark.parametrize("truncation", ["terminal", "bootstrap"])
@pytest.mark.parametrize("cut", [False, True])
def test_gae_is_that_of_a_loop_over_time(truncation, cut):
    """N environments abreast, backwards in time, with the value of what each step reached before any reset."""
    c = config(environment=own("count", length=5, cut=cut), gae={"truncation": truncation, "gae_lambda": 0.9})
    actor, critic, environments = begun(c)
    play(c, actor, critic, environments)
    batch = play(c, actor, critic, environments, iteration=2)
    found = advantages_of(batch, c)

    rewards, values = (steps_of(batch, name).astype(np.float64) for name in ("rewards", "values"))
    ends = batch.logprobs.offsets[1:] - 1
    ended, reached = np.zeros(rewards.size, bool), np.concatenate([values.reshape(-1)[1:], [0]])
    ended[ends], reached[ends] = batch.ended, batch.bootstrap
    stop = np.zeros(rewards.size, bool)
    stop[ends] = batch.terminated | (batch.truncated if truncation == "terminal" else False)
    ended, reached, stop = (x.reshape(rewards.shape) for x in (ended, reached, stop))
    expected, carried = np.zeros_like(rewards), np.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + c.gae.gamma * reached[:, t] * ~stop[:, t] - values[:, t]
        carried = expected[:, t] = delta + c.gae.gamma * c.gae.gae_lambda * ~ended[:, t] * carried
    np.testing.assert_allclose(found.raw_advantages.values, expected.reshape(-1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.returns.values, (expected + values).reshape(-1), rtol=1e-5, atol=1e-5)
    assert np.array_equal(found.advantages.values, found.raw_advantages.values)  # whitened by the minibatch
    assert not found.kl.values.any() and np.array_equal(found.rewards.values, batch.rewards.values)
    measured = gae_metrics(found, batch, batch, c.gae, kl_coef=None).flat()
    assert not [name for name in measured if name.startswith("kl")]


def test_a_cut_by_the_batch_bootstraps_whatever_truncation_says():
    for truncation in ("terminal", "bootstrap"):
        c = config(environment=own("count", length=100), gae={"truncation": truncation, "gae_lambda": 0.0})
        batch = play(c, *begun(c))
        last = batch.logprobs.offsets[1:] - 1
        delta = batch.rewards.values[last] + 0.99 * batch.bootstrap - batch.values.values[last]
        np.testing.assert_allclose(advantages_of(batch, c).raw_advantages.values[last], delta, rtol=1e-5, atol=1e-5)


def plain_torch(actor, critic, batch, advantages, c, order, factor):
    """One pass over minibatches with torch's distributions and AdamW over both networks; parameters afterwards."""
    parameters = [*actor.parameters(), *critic.parameters()]
    adam = torch.optim.AdamW(
        [{"params": list(actor.parameters()), "lr": factor * c.ppo.learning_rate},
         {"params": list(critic.parameters()), "lr": factor * (c.ppo.critic_learning_rate or c.ppo.learning_rate)}],
        eps=c.ppo.adam_epsilon, weight_decay=c.ppo.weight_decay)
    tensor = lambda ragged: torch.tensor(ragged.values)  # noqa: E731
    observations, actions, old, returns, values = map(tensor, (
        batch.observations, batch.actions, batch.logprobs, advantages.returns, batch.values))
    for steps in order:
        outputs = actor(observations[steps])
        if actor.spaces.kind == "box":
            distribution = Independent(Normal(outputs, actor.log_std.exp()), 1)
            logprobs = distribution.log_prob(actions[steps])
        else:
            distribution = Categorical(logits=outputs)
            logprobs = distribution.log_prob(actions[steps][:, 0])
        a = tensor(advantages.raw_advantages)[steps]
        a = (a - a.mean()) / (a.std() + 1e-8)
        ratio, v = (logprobs - old[steps]).exp(), critic(observations[steps])[:, 0]
        policy = torch.max(-a * ratio, -a * ratio.clamp(0.8, 1.2)).mean()
        clipped = values[steps] + (v - values[steps]).clamp(-0.2, 0.2)
        value = 0.5 * torch.max((v - returns[steps]) ** 2, (clipped - returns[steps]) ** 2).mean()
        adam.zero_grad()
        (policy + 0.5 * value - c.ppo.entropy_coef * distribution.entropy().mean()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, c.ppo.max_grad_norm)
        adam.step()
    return [p.detach() for p in parameters]


@pytest.mark.parametrize("environment, settings, factor", [
    ("CartPole-v1", {}, 1.0), ("Pendulum-v1", {}, 1.0),
    ("Pendulum-v1", {"learning_rate": 8e-2, "critic_learning_rate": 3e-3, "weight_decay": 0.5, "adam_epsilon": 1e-4}, 0.5)])
def test_the_update_is_that_of_plain_torch(environment, settings, factor):
    """Losses, entropy bonus, the common norm and AdamW, over several steps; the order of steps is that of the seed."""
    c = config(environment={"id": environment}, ppo={"epochs": 3, "entropy_coef": 0.01, "learning_rate": 3e-2} | settings)
    actor, critic, environments = begun(c)
    batch = play(c, actor, critic, environments)
    advantages = advantages_of(batch, c)
    generator = np.random.Generator(np.random.Philox(7))
    order = [torch.tensor(part) for _ in range(3) for part in np.array_split(generator.permutation(48), 4)]
    expected = plain_torch(*copy.deepcopy((actor, critic)), batch, advantages, c, order, factor)
    metrics = ppo(ControlLearner(actor, critic, c.ppo), batch, batch, advantages, c.ppo, seed=7,
                  learning_rate_factor=factor)
    assert metrics.steps == 12 and metrics.clip_fraction > 0
    assert np.hypot(metrics.grad_norm_actor, metrics.grad_norm_critic) > c.ppo.max_grad_norm  # the clip is at work
    for found, p in zip([*actor.parameters(), *critic.parameters()], expected, strict=True):
        torch.testing.assert_close(found.detach(), p, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("environment", ["CartPole-v1", "Pendulum-v1"])
def test_the_ratio_is_1_before_the_first_step(environment):
    c = config(environment={"id": environment}, policy={"normalize_observations": True},
               ppo={"epochs": 1, "minibatches": 1}, iterations=1)
    actor, critic, environments = begun(c)
    actor.observe(np.random.default_rng(0).normal(0, 2, (50, 1, actor.spaces.observation_size)))
    batch = play(c, actor, critic, environments)
    metrics = ppo(ControlLearner(actor, critic, c.ppo), batch, batch, advantages_of(batch, c), c.ppo, seed=1)
    assert metrics.ratio_min == pytest.approx(1, abs=2e-6) == metrics.ratio_max
    assert metrics.approx_kl == pytest.approx(0, abs=1e-10) and metrics.clip_fraction == 0


def test_a2c_is_ppo_while_the_policy_is_still_the_one_that_sampled():
    """One step: the same weights. Several: not any more."""
    for minibatches, same in ((1, True), (4, False)):
        results = []
        for objective in ("a2c", "ppo"):
            c = config(ppo={"objective": objective, "epochs": 1, "minibatches": minibatches})
            actor, critic, environments = begun(c)
            batch = play(c, actor, critic, environments)
            ppo(ControlLearner(actor, critic, c.ppo), batch, batch, advantages_of(batch, c), c.ppo, seed=1)
            results.append(torch.cat([p.detach().reshape(-1) for p in actor.parameters()]))
        assert torch.allclose(*results, atol=1e-6) == same


def test_a_network_that_was_trained_acts_as_the_same_one_loaded():
    """To the last bit, whatever the sizes of its layers: D = 3 and one output leave parameters of odd lengths."""
    c = config(environment={"id": "Pendulum-v1"}, policy={"hidden": [64, 64]})
    actor, critic, environments = begun(c)
    learner = ControlLearner(actor, critic, c.ppo)
    loaded = Actor(environments.spaces, c.policy)
    loaded.load_state_dict({name: tensor.clone() for name, tensor in learner.actor.state_dict().items()})
    observations = torch.randn(200, 1, 3, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert all(torch.equal(actor(o), loaded(o)) for o in observations)


def test_a_critic_warm_up_leaves_the_actor_as_it_is():
    c = config(ppo={"critic_warmup": 2}, iterations=2)
    actor, critic, _ = begun(c)
    learner, _, _ = in_memory(c)
    for mine, theirs in zip(actor.parameters(), learner.actor.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.equal(critic.head.weight, learner.critic.head.weight)


def test_target_kl_ends_the_update():
    c = config(ppo={"epochs": 50, "target_kl": 0.02, "learning_rate": 0.02})
    actor, critic, environments = begun(c)
    batch = play(c, actor, critic, environments)
    metrics = ppo(ControlLearner(actor, critic, c.ppo), batch, batch, advantages_of(batch, c), c.ppo, seed=1)
    assert metrics.steps < 200 and metrics.approx_kl_final > 0.02


def test_a_critic_warm_up_lets_moments_of_observations_go_on():
    c = config(ppo={"critic_warmup": 1}, policy={"normalize_observations": True}, iterations=1)
    learner, _, _ = in_memory(c)
    assert learner.actor.observation_count == c.batch_size


def test_evaluation_leaves_the_moments_of_observations_alone():
    c = config(policy={"normalize_observations": True})
    learner, batches, returns = in_memory(c)  # its evaluation comes last
    seen = np.concatenate([batch.observations.values for batch in batches]).astype(np.float64)
    np.testing.assert_allclose(learner.actor.observation_mean, seen.mean(0), rtol=1e-12)
    assert learner.actor.observation_count == len(seen) and len(returns) == 3


def test_cartpole_is_learned():
    """40,000 steps with CleanRL's settings, seconds: from about 20 to more than 120."""
    c = config(policy={"hidden": [64, 64]}, rollout={"num_envs": 4, "num_steps": 128}, iterations=80,
               ppo={"epochs": 4, "entropy_coef": 0.01, "learning_rate": 2.5e-4 * 2})
    _, batches, _ = in_memory(c)
    first, last = (np.concatenate([b.episode_return[b.ended] for b in part]) for part in (batches[:5], batches[-10:]))
    assert first.mean() < 40 and last.mean() > 120

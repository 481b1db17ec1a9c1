"""Evaluation of a control task: episodes worked out by hand, each played once, with the most likely actions."""

import numpy as np
import pytest
import torch
from control import begun, config, make, own

from schemas.errors import NonFiniteError
from stages.control_evaluate import control_evaluate, metrics


def evaluated(c, max_steps=100):
    """(returns, what each environment was given)."""
    actor, _, _ = begun(c)
    with make(c, c.evaluate.episodes, seed=5, once=True) as environments:
        returns = control_evaluate(actor, environments, max_steps=max_steps)
        return actor, returns, [env.unwrapped.acted for env in environments.vector.envs]


def test_returns_are_sums_up_to_the_end_and_no_further():
    """`Count` gives reward t at step t: 1 + … + 5 = 15. Lengths differ with the seed in `varied`."""
    _, returns, acted = evaluated(config(environment=own("count", length=5)))
    assert returns.episode_return.tolist() == [15, 15, 15] and returns.length.tolist() == [5, 5, 5]
    assert returns.terminated.all() and [len(actions) for actions in acted] == [5, 5, 5]
    _, returns, acted = evaluated(config(environment=own("varied"), evaluate={"episodes": 8}))
    lengths = [len(actions) for actions in acted]
    assert len(set(lengths)) > 2 and returns.length.tolist() == lengths  # no step after the end of its own episode
    assert returns.episode_return.tolist() == [n * (n + 1) / 2 for n in lengths]
    found, expected = metrics(returns), returns.episode_return
    assert found.episode_return == np.mean(expected) and found.episode_length == np.mean(lengths)
    assert found.episode_return_std == np.std(expected, ddof=1)
    assert (found.episode_return_min, found.episode_return_max) == (min(expected), max(expected))


def test_a_time_limit_and_max_steps_are_no_termination():
    for c, limit in ((config(environment=own("count", length=5, cut=True)), 100), (config(environment=own("count")), 3)):
        _, returns, _ = evaluated(c, limit)
        assert not returns.terminated.any() and set(returns.length) == {min(5, limit)}


def test_actions_are_the_most_likely():
    actor, returns, acted = evaluated(config(environment=own("narrow"), policy={"log_std_init": 1.0}))
    for seed, given in zip(returns.seed, acted, strict=True):
        draw = np.random.Generator(np.random.PCG64(np.random.SeedSequence(int(seed)))).random()
        shown = np.array([[t, draw] for t in range(len(given))], np.float32)
        with torch.no_grad():
            expected = actor.most_likely(actor.inputs(shown)).numpy().clip(-0.1, 0.1)
        np.testing.assert_allclose(given, expected, atol=1e-6)


def test_an_actor_whose_actions_are_no_numbers_is_not_evaluated():
    c = config(environment=own("narrow"))
    actor, _, _ = begun(c)
    torch.nn.init.constant_(actor.head.bias, float("nan"))
    with make(c, 2, once=True) as environments, pytest.raises(NonFiniteError, match="action is nan in rows 0, 1"):
        control_evaluate(actor, environments, max_steps=5)


def test_what_comes_after_an_episode_is_not_played():
    _, returns, _ = evaluated(config(environment=own("fails", how="raises in its second episode")))
    assert returns.length.tolist() == [9, 9, 9]

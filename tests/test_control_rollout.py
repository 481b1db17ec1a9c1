"""Rollouts of control tasks: what is in a batch, row by row; episodes that go on; failures that say where."""

import itertools
import time

import gymnasium
import numpy as np
import pytest
import torch
from control import begun, config, in_memory, make, own, play, steps_of
from gymnasium.wrappers.utils import RunningMeanStd

from flows.control.environments import Watch, make_vector
from schemas.artifacts import Moments
from schemas.errors import EnvironmentFailure
from schemas.tables import Trajectories
from stages.control_rollout import metrics
from stages.ops.episodes import Environments, actions_since_reset, episode_seed
from stages.ops.learning_signal import of_actions
from stages.ops.moments import RunningMoments


def test_rows_are_pieces_of_episodes_and_no_step_leads_over_a_reset():
    """Episodes of 5 in a batch of 12: rows of 5, 5, 2, then 3, 5, 4. Observation t shows t, and the next shows t + 1."""
    c = config(environment=own("count", length=5), rollout={"num_envs": 2, "num_steps": 12}, ppo={"minibatches": 1})
    actor, critic, environments = begun(c)
    first, second = (play(c, actor, critic, environments, iteration=i) for i in (1, 2))
    assert first.logprobs.lengths.tolist() == [5, 5, 2] * 2 and second.logprobs.lengths.tolist() == [3, 5, 4] * 2
    assert first.start.tolist() == [0, 0, 0] * 2 and second.start.tolist() == [2, 0, 0] * 2
    assert first.episode.tolist() == [0, 1, 2] * 2 and second.episode.tolist() == [2, 3, 4] * 2
    assert first.environment.tolist() == [0, 0, 0, 1, 1, 1]
    assert first.terminated.tolist() == [True, True, False] * 2 and not first.truncated.any()
    for batch in (first, second):
        for row in range(len(batch)):
            shown, draw = batch.observations[row].T
            assert shown.tolist() == list(range(batch.start[row], batch.start[row] + len(shown)))
            assert batch.final_observation[row].tolist() == [shown[-1] + 1, draw[0]]
            assert batch.raw_rewards[row].tolist() == (shown + 1).tolist()
            assert len(set(draw)) == 1
            assert batch.seed[row] == episode_seed(environments.seed, batch.environment[row], batch.episode[row])
            expected = gymnasium.utils.seeding.np_random(int(batch.seed[row]))[0].random()
            assert draw[0] == np.float32(expected)
    assert second.episode_return.tolist() == [15, 15, 10] * 2  # the first row's carries 1 + 2 from the batch before
    measured = metrics(second, actor, c.reward.model_copy(update={"normalize": "scale"}), Moments(count=2, mean=1, std=0))
    assert (measured.episode_return, measured.episode_length, measured.episodes, measured.steps) == (15, 5, 4, 24)
    seen = np.append([1, 1], second.discounted_returns.values.astype(np.float64))  # what the moments were of before
    assert measured.running_count == 26
    np.testing.assert_allclose([measured.running_mean, measured.running_std], [seen.mean(), seen.std()], rtol=1e-6)
    np.testing.assert_allclose([measured.raw_reward, measured.value, measured.value_std, measured.logprob], [
        np.mean([3, 4, 5, 1, 2, 3, 4, 5, 1, 2, 3, 4]), np.mean(second.values.values, dtype=float),
        np.std(second.values.values, dtype=float), np.mean(second.logprobs.values, dtype=float)], rtol=1e-6)
    assert metrics(second, actor, c.reward, Moments()).running_count is None


def test_a_time_limit_is_a_truncation():
    c = config(environment=own("count", length=5, cut=True), rollout={"num_envs": 1, "num_steps": 10},
               ppo={"minibatches": 1})
    batch = play(c, *begun(c))
    assert batch.truncated.tolist() == [True, True] and not batch.terminated.any()


@pytest.mark.parametrize("name, kwargs", [("choices", {}), ("shifted", {}), ("narrow", {}), ("narrow", {"dtype": "float64"}),
                                          ("half_bounded", {})])
def test_actions_of_every_kind_reach_the_environment_as_it_declares_them(name, kwargs):
    """`Count` asserts that its space contains each action; what is stored is what was sampled."""
    c = config(environment=own(name, **kwargs), policy={"log_std_init": 1.0})
    actor, critic, environments = begun(c)
    batch = play(c, actor, critic, environments)
    given = np.concatenate([np.reshape(env.unwrapped.acted, (c.rollout.num_steps, -1)) for env in environments.vector.envs])
    stored = batch.actions.values
    if name == "narrow":
        assert np.abs(given).max() == np.dtype(kwargs.get("dtype", "float32")).type(0.1) < np.abs(stored).max()
        assert 0.8 < metrics(batch, actor, c.reward, Moments()).action_clip_fraction < 1
    if name == "shifted":
        assert sorted(set(given[:, 0])) == [-1, 0, 1] and (given == stored - 1).all()
    if name == "choices":
        assert set(map(tuple, stored)) == set(itertools.product((0.0, 1.0), (0.0, 1.0, 2.0)))
    environments.close()


def test_rewards_are_scaled_by_all_discounted_returns_so_far():
    c = config(environment={"id": "Pendulum-v1", "kwargs": {"max_episode_steps": 10}},
               reward={"normalize": "scale", "clip": 0.5})
    _, batches, _ = in_memory(c)
    running, carried = RunningMeanStd(epsilon=0, shape=()), np.zeros(2)
    for batch in batches:
        raw, ended = steps_of(batch, "raw_rewards").astype(np.float64), np.zeros((2, 24), bool)
        ended.reshape(-1)[batch.logprobs.offsets[1:] - 1] = batch.ended
        for t in range(24):
            carried = carried * c.gae.gamma + raw[:, t]
            np.testing.assert_allclose(steps_of(batch, "discounted_returns")[:, t], carried, rtol=1e-5)
            running.update(carried)
            expected = (raw[:, t] / np.sqrt(running.var)).clip(-0.5, 0.5)
            np.testing.assert_allclose(steps_of(batch, "rewards")[:, t], expected, rtol=1e-4)
            carried = carried * ~ended[:, t]
    assert (np.abs(batch.rewards.values) == 0.5).any() and (np.abs(batch.rewards.values) < 0.5).any()


@pytest.mark.parametrize("environments", [1, 3])
def test_moments_of_many_steps_at_once_are_those_of_one_after_the_other(environments):
    """To the bit: what an action was sampled with is what its logprob is of."""
    x = np.random.default_rng(0).normal([3, -50], [2, 0.01], (40, environments, 2)).astype(np.float32)
    before = (17.0, np.array([3.0, -50.0]), np.array([4.0, 0.0001]))
    for start in (before, (0.0, np.zeros(2), np.ones(2))):
        at_once, one_by_one = RunningMoments(*start), RunningMoments(*start)
        mean, variance = at_once.see(x)
        for t in range(40):
            for found, expected in zip(one_by_one.see(x[t : t + 1]), (mean, variance), strict=True):
                np.testing.assert_array_equal(found[0], expected[t])


def test_observations_are_normalised_by_all_seen_so_far_the_steps_own_included():
    """Two batches with the moments going on in between, against Gymnasium's running moments."""
    c = config(environment={"id": "Pendulum-v1", "kwargs": {"max_episode_steps": 10}},
               policy={"normalize_observations": True, "clip_observations": 1.0})
    actor, critic, environments = begun(c)
    running = RunningMeanStd(epsilon=0, shape=(3,))
    for iteration in (1, 2):
        batch = play(c, actor, critic, environments, iteration=iteration)
        observations, inputs = steps_of(batch, "observations").astype(np.float64), np.empty((2, 24, 3))
        reached = np.full((48, 3), np.nan)
        reached[batch.logprobs.offsets[1:] - 1] = batch.final_observation
        after = reached.reshape(2, 24, 3)
        for t in range(24):
            running.update(observations[:, t])
            mean, std = running.mean, np.sqrt(running.var + 1e-8)
            inputs[:, t], after[:, t] = ((x - mean) / std for x in (observations[:, t], after[:, t]))
        x, y = (torch.tensor(z.clip(-1, 1).reshape(48, 3), dtype=torch.float32) for z in (inputs, after))
        with torch.no_grad():
            logprobs, _ = actor.score(x, torch.tensor(batch.actions.values))
            values, bootstrap = critic(x)[:, 0], critic(y[~y.isnan().any(1)])[:, 0]
        np.testing.assert_allclose(batch.logprobs.values, logprobs, atol=1e-5)
        np.testing.assert_allclose(batch.values.values, values, atol=1e-5)
        np.testing.assert_allclose(batch.bootstrap, bootstrap, atol=1e-5)
        for network in (actor, critic):
            network.observe(batch.by_step("observations"))
    np.testing.assert_allclose(actor.observation_mean, running.mean)
    np.testing.assert_allclose(actor.observation_variance, running.var)
    environments.close()


# --- episodes that go on in another process ---

@pytest.mark.parametrize("environment", [{"id": "CartPole-v1"}, {"id": "Pendulum-v1"}, {"id": "HalfCheetah-v5"}],
                         ids=lambda e: e["id"])
def test_an_episode_that_is_taken_up_again_goes_on_to_the_same_bytes(environment):
    """Three batches without a break; then the third again, in new environments, from the tables of the first two."""
    c = config(environment=environment, rollout={"num_envs": 2, "num_steps": 7}, ppo={"minibatches": 1})
    actor, critic, environments = begun(c)
    first, second, third = (play(c, actor, critic, environments, iteration=i) for i in (1, 2, 3))
    assert (second.start.any() and third.start.max() == 14) or environment["id"] == "CartPole-v1"
    new = make(c)
    read = []

    def newest_first():
        for batch in (second, first):
            read.append(batch)
            yield Trajectories.from_arrow(batch.to_arrow())

    replay = actions_since_reset(newest_first())
    assert [len(actions) for actions in replay] == new_starts(second)
    assert len(read) == (2 if second.start[second.ended == False].any() else 1)  # noqa: E712
    assert new.resume(second, replay) == []
    again = play(c, actor, critic, new, iteration=3)
    assert again.to_arrow().equals(third.to_arrow())


def new_starts(batch):
    """Steps that each environment's open episode has behind it after the batch."""
    out = []
    for i in range(batch.environment.max() + 1):
        row = np.flatnonzero(batch.environment == i)[-1]
        out.append(0 if batch.ended[row] else int(batch.start[row] + batch.logprobs.lengths[row]))
    return out


def test_an_environment_that_is_not_deterministic_is_noticed_and_begins_anew():
    c = config(environment=own("forgets"), rollout={"num_envs": 2, "num_steps": 7}, ppo={"minibatches": 1})
    actor, critic, environments = begun(c)
    first = play(c, actor, critic, environments)
    new = make(c)
    assert new.resume(first, actions_since_reset([first])) == [0, 1]
    second = play(c, actor, critic, new, iteration=2)
    assert second.episode.tolist() == [1, 1] and second.start.tolist() == [0, 0]


def test_environments_in_processes_of_their_own_give_the_same_bytes():
    c = config(rollout={"num_envs": 3, "num_steps": 40}, ppo={"minibatches": 1})
    there = c.model_copy(update={"execution": c.execution.model_copy(update={"environments": "async"})})
    batches = []
    for each in (c, there):
        actor, critic, environments = begun(each)
        batches.append(play(each, actor, critic, environments).to_arrow())
        environments.close()
    assert batches[0].equals(batches[1])


# --- failures ---

@pytest.mark.parametrize("how, said", [
    ("raises", "raised RuntimeError: the gear broke"), ("observes NaN", "gave the observation [nan, 0.0]"),
    ("rewards infinity", "gave the reward inf"), ("rewards too much", "gave the reward 1e+39, which float32 cannot hold"),
    ("calls exit", "called sys.exit(0) (environments.py, line "),
    ("rewards text", "gave the reward 'x', expected a number"), ("rewards two", "gave a reward of shape (2,)"),
    ("steps as Gym did", "gave 4 values from step, expected (observation, reward, terminated, truncated, info)"),
    ("shows another shape", "gave an observation of shape (3,), expected (2,)"),
    ("shows text", "raised ValueError: could not convert string to float"), ("ends twice", "raised ValueError")])
@pytest.mark.parametrize("where", ["sync", "async"])
def test_a_failure_says_which_environment_and_which_step(how, said, where):
    c = config(environment=own("fails", how=how), execution={"environments": where})
    actor, critic, environments = begun(c)
    seeds = environments.seeds()
    with pytest.raises(EnvironmentFailure) as error:
        play(c, actor, critic, environments)
    index = int(str(error.value).removeprefix("environments.py:fails, environment ")[0])
    assert f"environment {index}: step 3 of the episode with seed {seeds[index]} {said}" in str(error.value)
    environments.close()


def test_a_process_that_ends_is_an_environment_that_failed():
    c = config(environment=own("fails", how="exits"), execution={"environments": "async"})
    actor, critic, environments = begun(c)
    with pytest.raises(EnvironmentFailure, match="the process of an environment ended in a step, at the steps"):
        play(c, actor, critic, environments)
    environments.close(force=True)
    assert environments.vector.closed


def test_an_open_episode_may_take_long_to_be_played_again_but_none_of_its_steps():
    """Each step well within the limit, all of them together far beyond it; then one that hangs."""
    c = config(environment=own("slow", seconds=0.02), rollout={"num_envs": 2, "num_steps": 24})
    actor, critic, environments = begun(c)
    batch = play(c, actor, critic, environments)
    new = make(c)
    new.watch = Watch("slow", 0.3)
    assert new.resume(batch, actions_since_reset([batch])) == []
    hangs = make(config(environment=own("slow", seconds=0.0, hangs_at=5), rollout={"num_envs": 2, "num_steps": 24}))
    hangs.watch = Watch("slow", 0.3)
    with pytest.raises(EnvironmentFailure, match=r"step has not come back for 0\.3 s, at the steps \[4, 4\] of their"):
        hangs.resume(batch, actions_since_reset([batch]))


def test_what_is_computed_between_steps_is_not_the_environments_time():
    c = config(rollout={"num_envs": 1, "num_steps": 4}, ppo={"minibatches": 1})
    actor, critic, environments = begun(c)
    environments.watch = Watch("CartPole-v1", 0.2)
    actor.register_forward_hook(lambda *_: time.sleep(0.3))
    assert len(play(c, actor, critic, environments).logprobs.values) == 4


def test_an_episode_that_ends_when_it_is_played_again_is_noticed():
    """Its observations are those of before: only the end tells."""
    c = config(environment=own("count", length=100), rollout={"num_envs": 2, "num_steps": 7}, ppo={"minibatches": 1})
    batch = play(c, *begun(c))
    for length in (7, 4):
        new = make(config(environment=own("count", length=length), rollout={"num_envs": 2, "num_steps": 7},
                          ppo={"minibatches": 1}))
        assert new.resume(batch, actions_since_reset([batch])) == [0, 1]


def test_an_environment_that_cannot_be_closed_hides_nothing():
    c = config(environment=own("stubborn"))
    with pytest.raises(EnvironmentFailure, match="step has not come back"), make(c) as environments:
        environments.begin()
        environments.watch = Watch("stubborn", 0.2)
        environments.step(np.zeros((2, 1), np.float32))


def test_processes_that_are_gone_can_be_closed():
    environments = make(config(environment=own("count"), execution={"environments": "async"}))
    environments.begin()
    for process in environments.vector.processes:
        process.kill()
        process.join()
    environments.close()
    assert environments.vector.closed


@pytest.mark.parametrize("how, where", [("hangs", "sync"), ("hangs", "async"), ("hangs outside of Python", "async")])
def test_a_reset_that_hangs_is_ended(how, where):
    c = config(environment=own("fails", how=how), execution={"environments": where})
    watch = Watch(c.environment.id, 0.5)
    import environments as module

    vector = make_vector(c.environment, module.fails, 2, c.execution)
    from schemas.control import Spaces
    spaces = Spaces(observation_size=2, kind="discrete", choices=(2,), start=(0,), scalar=True)
    with (pytest.raises(EnvironmentFailure, match=r"reset has not come back for 0\.5 s, at the steps \[0, 0\]"),
          Environments(vector, spaces, c.environment.id, seed=0, watch=watch) as environments):
        environments.begin()
    assert vector.closed and not [process for process in getattr(vector, "processes", ()) if process.is_alive()]


def test_an_environment_of_gyms_old_api_and_one_whose_space_is_another():
    for how, said in (
            ("old reset", r"gave ndarray from reset, expected \(observation, info\): this is the old API of Gym; shimmy's"),
            ("fractions", r"step 1 of the episode .* gave the observation \[1.0, 0\.[0-9]+\], and its space of int64 would "
                          r"make \[1, 0\] of it; declare a space that holds it")):
        c = config(environment=own("odd", how=how))
        with pytest.raises(EnvironmentFailure, match=said):
            play(c, *begun(c))


def test_a_reward_in_an_array_of_one_is_a_number(caplog):
    c = config(environment=own("odd", how="array"))
    batch = play(c, *begun(c))
    assert batch.raw_rewards[0].tolist() == [1, 2, 3, 4, 5] and not caplog.records


@pytest.mark.parametrize("how", ["mask", "step_mask"])
def test_a_mask_is_said_wherever_it_is(caplog, how):
    c = config(environment=own("odd", how=how))
    play(c, *begun(c))
    (line,) = (record.message for record in caplog.records)
    assert line.endswith("its info holds an action_mask, which is not used: actions that it forbids are sampled too; "
                         "environment.action_mask: true uses it")


def test_binary_actions_are_choices_of_two():
    c = config(environment=own("acts_in", space="binary"))
    actor, critic, environments = begun(c)
    play(c, actor, critic, environments)
    assert actor.spaces.choices == (2, 2, 2) and len({tuple(a) for a in environments.vector.envs[0].unwrapped.acted}) > 1


@pytest.mark.parametrize("space, reach", [("far", "0%"), ("wide", "0%"), ("unit", None)])
def test_a_box_that_the_policy_does_not_reach_is_said(space, reach):
    c = config(environment=own("acts_in", space=space), rollout={"num_envs": 2, "num_steps": 60}, ppo={"minibatches": 1})
    actor, critic, there = begun(c)
    lines = list(of_actions(play(c, actor, critic, there).actions.values, actor.spaces))
    assert all(f"reaches {reach} of the Box" in line and "environment.scale_actions: true" in line for line in lines)
    assert bool(lines) == (reach is not None)

"""Spaces of every kind: observations flattened, pictures through convolutions, actions taken apart, masks and wrappers."""

import json

import gymnasium
import numpy as np
import pytest
import torch
from control import begun, config, in_memory, own, play, write_control
from environments import ACTS, SEEN, of_spaces

from flows.cli.main import run_command
from flows.control.spaces import fitted
from flows.runs.run import open_run
from flows.store.store import Store
from schemas.control import EnvironmentConfig, PolicyConfig, Spaces
from schemas.errors import ConfigError, EnvironmentFailure
from schemas.tables import Trajectories
from stages.ops.networks import Actor, Critic


@pytest.mark.parametrize("seen", SEEN)
def test_observations_of_every_kind_are_those_of_gymnasiums_flattening(seen):
    c = config(environment=own("of_spaces", seen=seen), rollout={"num_envs": 2, "num_steps": 12})
    actor, critic, environments = begun(c)
    batch = play(c, actor, critic, environments)
    space = SEEN[seen]
    assert actor.spaces.observation_size == gymnasium.spaces.flatdim(space) == batch.observations.values.shape[1]
    plain = of_spaces(seen)
    shown, _ = plain.reset(seed=int(batch.seed[0]))
    np.testing.assert_array_equal(batch.observations[0][0], gymnasium.spaces.flatten(space, shown).astype(np.float32))
    assert bool(actor.spaces.image) == (seen in ("image", "frames", "gray"))  # not "cube", whose numbers are no bytes


@pytest.mark.parametrize("acts", ACTS)
def test_actions_of_every_kind_reach_the_environment_as_it_declares_them(acts):
    """`Count` asserts that its space contains each."""
    c = config(environment=own("of_spaces", acts=acts), policy={"log_std_init": 1.0},
               rollout={"num_envs": 2, "num_steps": 40})
    actor, critic, environments = begun(c)
    batch = play(c, actor, critic, environments)
    acted = environments.vector.envs[0].unwrapped.acted
    assert len(acted) == 40 and len({str(action) for action in acted}) > 1
    if acts == "tuple":
        assert actor.spaces.choices == (3, 2, 2, 4, 2) and actor.spaces.start == (1, 0, 0, 0, 0)
        first, flags, numbers = acted[5]
        assert [first - 1, *flags, *numbers] == np.concatenate([batch.actions[i] for i in range(2)])[5].tolist()


def test_a_bounded_box_is_scaled():
    env, spaces = fitted(of_spaces(acts="far"), EnvironmentConfig(id="x", scale_actions=True))
    assert spaces.low == (-1, -1) and spaces.high == (1, 1)
    env.reset(seed=0)
    for action in ([-1, 1], [0, 0], [1, -1]):
        env.step(np.array(action, np.float32))
    np.testing.assert_allclose(env.unwrapped.acted, [[100, 9], [100.5, 3], [101, -3]])


# --- pictures ---

@pytest.mark.parametrize("shape, first, channels", [((9, 8, 3), 0, 3), ((4, 9, 8), 1, 4), ((9, 8), 0, 1)])
def test_a_pictures_features_are_those_of_the_convolutions(shape, first, channels):
    space = {(9, 8, 3): "image", (4, 9, 8): "frames", (9, 8): "gray"}[shape]
    _, spaces = fitted(of_spaces(space), EnvironmentConfig(id="x"))
    assert spaces.image == (9, 8, channels, first)
    critic = Critic(spaces, PolicyConfig(hidden=(8,), channels=(5, 6)))
    pixels = torch.randint(0, 256, (3, *shape)).float()
    image = pixels if first else pixels.reshape(3, 9, 8, channels).permute(0, 3, 1, 2)
    one, two = critic.pixels.layers
    x = torch.relu(two(torch.relu(one(image / 255)))).flatten(1)
    assert x.shape == (3, 6 * 3 * 2)
    expected = critic.head(torch.tanh(critic.layers[0](x)))
    torch.testing.assert_close(critic(pixels.reshape(3, -1)), expected)


class Bright(gymnasium.Env):
    """Pays for saying whether the left half of the picture is the brighter one."""

    observation_space = gymnasium.spaces.Box(0, 255, (8, 8, 1), np.uint8)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._show(), {}

    def _show(self):
        self.left = self.np_random.random() < 0.5
        picture = self.np_random.integers(0, 100, (8, 8, 1))
        picture[:, :4] += 100 * self.left
        picture[:, 4:] += 100 * (not self.left)
        return picture.astype(np.uint8)

    def step(self, action):
        self.steps += 1
        reward = float(action == self.left)
        return self._show(), reward, self.steps >= 8, False, {}


def test_a_policy_learns_from_pictures(monkeypatch):
    import environments
    monkeypatch.setattr(environments, "bright", Bright, raising=False)
    c = config(environment=own("bright"), policy={"hidden": [16]}, rollout={"num_envs": 4, "num_steps": 64}, iterations=8,
               ppo={"epochs": 4, "minibatches": 4, "learning_rate": 3e-3})
    _, batches, _ = in_memory(c)
    assert batches[0].raw_rewards.values.mean() < 0.65 and batches[-1].raw_rewards.values.mean() > 0.9


# --- masks ---

def masked(masks="right"):
    return {"environment": own("of_spaces", acts="five", masks=masks) | {"action_mask": True},
            "rollout": {"num_envs": 2, "num_steps": 16}, "policy": {"normalize_observations": True}}


def test_what_is_forbidden_is_never_done_and_the_mask_is_part_of_the_distribution():
    c = config(**masked())
    actor, critic, environments = begun(c)
    batch = play(c, actor, critic, environments)
    masks = batch.observations.values[:, -5:]
    steps = np.concatenate([batch.start[i] + np.arange(len(row)) for i, row in enumerate(batch.logprobs)])
    assert (masks == [[k % 3 == step % 3 for k in range(5)] for step in steps]).all()
    chosen = batch.actions.values[:, 0].astype(int)
    assert masks[np.arange(len(chosen)), chosen].all()
    inputs = torch.tensor(actor.inputs(batch.observations.values))
    logits = actor(inputs).double()
    for i in range(len(chosen)):
        allowed = logits[i][torch.tensor(masks[i] == 1)]
        pi, entropy = actor.score(inputs[i : i + 1], torch.tensor(batch.actions.values[i : i + 1]))
        assert float(pi) == pytest.approx(float(logits[i, chosen[i]] - allowed.logsumexp(0)), abs=1e-5)
        p = allowed.softmax(0)
        assert float(entropy) == pytest.approx(float(-(p * p.log()).sum()), abs=1e-5)
    assert actor.spaces == Spaces(observation_size=7, kind="discrete", choices=(5,), start=(0,), scalar=True, masked=True)


def test_a_masked_run_reproduces_each_stage_and_its_ratio_is_1(tmp_path, capsys, prefect_server):
    folder = write_control(tmp_path / "masked", iterations=2, **masked() | {"ppo": {"epochs": 1, "minibatches": 1}})
    store = ["--store", str(tmp_path / "store"), "--quiet"]
    for iterations in ("1", "2"):
        assert run_command(["train", str(folder), *store, "--iterations", iterations]) == 0
    run = open_run(Store(str(tmp_path / "store")), "masked")
    assert abs(run.state(2).metrics["ppo/ratio_max"] - 1) < 1e-5 > abs(run.state(2).metrics["ppo/ratio_min"] - 1)
    for stage in ("rollout", "gae", "ppo", "evaluate"):
        assert run_command(["stage", stage, "masked", "--iteration", "2", "--store", store[1], "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["verdict"] == "same", stage
    batch = run.store.table(run.state(2).artifacts["rollout"], Trajectories)
    assert batch.observations.values.shape[1] == 7


@pytest.mark.parametrize("masks, words", [
    ("none", "reset of the episode with seed .* its action_mask forbids every action; allow one, or end the episode"),
    ("short", "its action_mask has 2 entries, expected 5, one a choice"), ("", "its info holds no action_mask, and "),
    ("late", "step 1 of the episode .* its info holds no action_mask"),
])
def test_a_mask_that_cannot_be_used_is_named_with_its_step(masks, words):
    c = config(**masked(masks))
    with pytest.raises(EnvironmentFailure, match=words):
        play(c, *begun(c))


def test_a_mask_is_of_one_choice():
    with pytest.raises(ConfigError, match=r"environment\.action_mask is about one Discrete action"):
        fitted(of_spaces(acts="boxes"), EnvironmentConfig(id="x", action_mask=True))


# --- wrappers ---

def test_wrappers_are_put_around_in_order_with_what_they_are_given():
    config = EnvironmentConfig(id="x", wrappers=[
        {"name": "TimeLimit", "kwargs": {"max_episode_steps": 2}}, {"name": "gymnasium.wrappers:RecordEpisodeStatistics"}])
    env, _ = fitted(of_spaces(), config)
    assert isinstance(env, gymnasium.wrappers.RecordEpisodeStatistics) and isinstance(env.env, gymnasium.wrappers.TimeLimit)
    env.reset(seed=0)
    assert [env.step(0)[3] for _ in range(2)] == [False, True]


@pytest.mark.parametrize("name, setting", [("NormalizeReward", "reward.normalize: scale"),
                                           ("NormalizeObservation", "policy.normalize_observations: true")])
def test_wrappers_that_remember_earlier_episodes_are_refused(name, setting):
    with pytest.raises(ConfigError, match=f"so that a run that goes on would see others; {setting} does that"):
        fitted(of_spaces(), EnvironmentConfig(id="x", wrappers=[{"name": name}]))


def test_a_policy_of_other_spaces_has_the_files_it_had_before():
    """Settings that came later are left out of its config where they are as before."""
    from flows.runs.kind import settings_of
    _, spaces = fitted(of_spaces(), EnvironmentConfig(id="x"))
    assert not {"image", "masked"} & settings_of(spaces).keys() and "channels" not in settings_of(PolicyConfig())
    assert [name for name, _ in Actor(spaces, PolicyConfig(hidden=(4,))).named_parameters()] == [
        "layers.0.weight", "layers.0.bias", "head.weight", "head.bias"]

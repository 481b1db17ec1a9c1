"""What tests of control tasks share: a config, environments without a flow, and the stages in a plain loop."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import yaml

from flows.control.environments import make_environment as make_one
from flows.control.environments import make_vector
from flows.control.spaces import fitted
from schemas.artifacts import Moments, derive_seed
from schemas.config import parse_config
from schemas.control import ControlConfig
from schemas.settings import KLConfig
from stages.control_evaluate import control_evaluate
from stages.control_rollout import control_rollout
from stages.gae import gae
from stages.ops.control_learner import ControlLearner
from stages.ops.episodes import Environments
from stages.ops.moments import updated_moments
from stages.ops.optim import learning_rate_factor
from stages.policy import policy
from stages.ppo import ppo

ENVIRONMENTS = Path(__file__).parent / "environments.py"
SMALL = {
    "seed": 3, "iterations": 3, "environment": {"id": "CartPole-v1"}, "policy": {"hidden": [8]},
    "rollout": {"num_envs": 2, "num_steps": 24}, "ppo": {"epochs": 2, "minibatches": 4, "learning_rate": 1e-2},
    "evaluate": {"episodes": 3, "every": 2, "picture": False}, "execution": {"threads": 1},
}


def config(**sections) -> ControlConfig:
    """`SMALL` with other sections, each merged into it."""
    data = {key: dict(value) if isinstance(value, dict) else value for key, value in SMALL.items()}
    for key, value in sections.items():
        data[key] = data.get(key, {}) | value if isinstance(value, dict) else value
    return parse_config(data, "small")


def write_control(folder: Path, **sections) -> Path:
    """A folder with that config and the environments of tests/environments.py."""
    folder.mkdir(parents=True)
    shutil.copy(ENVIRONMENTS, folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(config(**sections).model_dump(mode="json", exclude={"execution"})
                                                       | {"execution": {"threads": 1}}))
    return folder


def own(name: str, **kwargs):
    """The section `environment` for a function of tests/environments.py."""
    return {"id": f"environments.py:{name}", "kwargs": kwargs}


PENDULUM = {  # every setting that is off by default, episodes longer than a batch, two environments
    "environment": {"id": "Pendulum-v1", "kwargs": {"max_episode_steps": 60}},
    "policy": {"hidden": [64, 64], "critic_hidden": [6, 6], "activation": "relu", "state_dependent_std": True,
               "normalize_observations": True, "log_std_init": -0.5},
    "reward": {"normalize": "scale", "clip": 5}, "gae": {"truncation": "terminal", "critic_lambda": 1.0},
    "ppo": {"critic_warmup": 1, "schedule": "linear", "schedule_iterations": 5, "critic_learning_rate": 1e-3,
            "value_clip_range": None, "recompute_old_logprobs": True, "importance_cap": 1.5, "target_kl": 0.5},
    "evaluate": {"episodes": 2, "every": 0, "max_steps": 20, "picture": True},
}
RUNS = {"cartpole": {}, "pendulum": PENDULUM, "choices": {"environment": own("choices"), "tracking": {"enabled": False}}}


def function_of(c: ControlConfig):
    import environments

    return getattr(environments, c.environment.id.rpartition(":")[2]) if ".py:" in c.environment.id else None


def make(c: ControlConfig, count: int | None = None, seed: int | None = None, once: bool = False) -> Environments:
    """Environments of the config, not reset yet."""
    vector = make_vector(c.environment, function_of(c), count or c.rollout.num_envs, c.execution)
    _, spaces = fitted(make_one(c.environment, function_of(c)), c.environment)
    own_seed = derive_seed(c.seed, 0, "environments")
    return Environments(vector, spaces, c.environment.id, seed=own_seed if seed is None else seed, once=once)


def begun(c: ControlConfig):
    """(actor, critic, environments reset to their first episodes)."""
    environments = make(c)
    actor, critic = policy(environments.spaces, c.policy, seed=derive_seed(c.seed, 0, "policy"))
    environments.begin()
    return actor, critic, environments


def play(c: ControlConfig, actor, critic, environments, *, iteration=1, moments=None):
    return control_rollout(actor, critic, environments, c.rollout, c.reward, gamma=c.gae.gamma,
                           moments=moments or Moments(), seed=derive_seed(c.seed, iteration, "rollout"))


def in_memory(c: ControlConfig):
    """The stages in a plain loop: no store, no Prefect. The learner after the last iteration, batches, last returns."""
    actor, critic, environments = begun(c)
    learner, moments, batches = ControlLearner(actor, critic, c.ppo), Moments(), []
    for i in range(1, c.iterations + 1):
        batch = play(c, actor, critic, environments, iteration=i, moments=moments)
        if c.reward.normalize != "none":
            moments = updated_moments(moments, batch.discounted_returns.values)
        ppo(learner, batch, batch, gae(batch, None, batch, batch, c.gae, KLConfig(), kl_coef=0.0), c.ppo,
            seed=derive_seed(c.seed, i, "ppo"), learning_rate_factor=learning_rate_factor(i, c.ppo),
            train_actor=i > c.ppo.critic_warmup)
        learner.observe(batch)
        batches.append(batch)
    trials = make(c, c.evaluate.episodes, seed=derive_seed(c.seed, 0, "evaluate"), once=True)
    return learner, batches, control_evaluate(actor, trials, max_steps=c.evaluate.max_steps)


def steps_of(batch, column: str) -> np.ndarray:
    """(N, T, …) of a ragged column."""
    values, count = getattr(batch, column).values, batch.environment.max() + 1
    return values.reshape(count, len(values) // count, *values.shape[1:])

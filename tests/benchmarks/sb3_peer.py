"""The other side of `make bench`: Stable-Baselines3 with CleanRL's hyperparameters, by .peers/bin/python; prints steps/s."""

import sys
import time

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

SHARED = {"gamma": 0.99, "gae_lambda": 0.95, "clip_range": 0.2, "clip_range_vf": 0.2, "vf_coef": 0.5, "max_grad_norm": 0.5,
          "seed": 1, "device": "cpu"}


def main(task: str, steps: int) -> None:
    torch.set_num_threads(1)
    if task == "pendulum":
        environments = VecNormalize(make_vec_env("Pendulum-v1", 1, seed=1), clip_obs=10, clip_reward=10, gamma=0.99)
        model = PPO("MlpPolicy", environments, n_steps=2048, batch_size=64, n_epochs=10, learning_rate=3e-4, **SHARED)
    else:
        model = PPO("MlpPolicy", make_vec_env("CartPole-v1", 4, seed=1), n_steps=128, batch_size=128, n_epochs=4,
                    learning_rate=lambda left: 2.5e-4 * left, ent_coef=0.01, **SHARED)
    began = time.perf_counter()
    model.learn(steps)
    print(model.num_timesteps / (time.perf_counter() - began))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

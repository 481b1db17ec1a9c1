"""How fast, beside Stable-Baselines3: both train the same task with the same hyperparameters, in turns, on one thread each.

    make bench                                needs the extra `bench`; some minutes
    make bench ONLY="cartpole"                one of the tasks; "overhead" and "flat" are those files'

What is timed for Baton is a whole run of the example by the `baton` command, from its first iteration to the last one's
commit, everything included: Parquet tables, checkpoints, manifests and their syncs, Prefect's flow and tasks, MLflow beside
it. To begin takes the command some seconds more, Prefect's server above all, and so does the end, when MLflow is given its
last points; the ratio with these too is printed beside the other. Both compute on one thread; Prefect's server and the
process that tells MLflow are Baton's and may use other cores. Stable-Baselines3's time is that of `learn`, without imports.
Rounds alternate, so that both see the machine alike; what counts is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from flat import flat
from overhead import overhead

ROOT = Path(__file__).parents[2]
TASKS = {  # example, steps of the peer, what the ratio has to be
    "pendulum": (ROOT / "data/pendulum", 30 * 2048, 2.0),
    "cartpole": (ROOT / "data/cartpole", 300 * 512, 1.0),
}
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def baton(example: Path) -> tuple[float, float]:
    """Steps per second of the iterations, and of the whole command."""
    with tempfile.TemporaryDirectory() as store:
        began = time.time()
        subprocess.run([sys.executable, "-m", "flows.cli.main", "train", str(example), "--store", store, "--quiet",
                        "--set", "evaluate.picture=false"], check=True, cwd=ROOT, env=ONE_THREAD)
        ended = time.time()
        states = sorted(Path(store).glob("runs/*/iterations/*.json"))
        first, last = states[0].stat().st_mtime, states[-1].stat().st_mtime
        record = json.loads(next(Path(store).glob("runs/*/run.json")).read_text())["config"]["rollout"]
    steps = (len(states) - 1) * record["num_envs"] * record["num_steps"]
    return steps / (last - first), steps / (ended - began)


def stable_baselines3(task: str, steps: int) -> float:
    """Steps per second of `learn`, in a process of its own."""
    out = subprocess.run([sys.executable, __file__, "--peer", task, str(steps)], check=True, env=ONE_THREAD, text=True,
                         stdout=subprocess.PIPE).stdout
    return float(out.splitlines()[-1])


def peer(task: str, steps: int) -> float:
    """CleanRL's hyperparameters in Stable-Baselines3's words."""
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    torch.set_num_threads(1)
    shared = dict(gamma=0.99, gae_lambda=0.95, clip_range=0.2, clip_range_vf=0.2, vf_coef=0.5, max_grad_norm=0.5, seed=1,
                  device="cpu")
    if task == "pendulum":
        environments = VecNormalize(make_vec_env("Pendulum-v1", 1, seed=1), clip_obs=10, clip_reward=10, gamma=0.99)
        model = PPO("MlpPolicy", environments, n_steps=2048, batch_size=64, n_epochs=10, learning_rate=3e-4, **shared)
    else:
        model = PPO("MlpPolicy", make_vec_env("CartPole-v1", 4, seed=1), n_steps=128, batch_size=128, n_epochs=4,
                    learning_rate=lambda left: 2.5e-4 * left, ent_coef=0.01, **shared)
    began = time.perf_counter()
    model.learn(steps)
    return model.num_timesteps / (time.perf_counter() - began)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK",
                        help=f"some of {', '.join(TASKS)}, overhead, flat; all if none is named")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer", nargs=2, metavar=("TASK", "STEPS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        print(peer(options.peer[0], int(options.peer[1])))
        return 0
    held = True
    for task in options.tasks or (*TASKS, "overhead", "flat"):
        if task == "overhead":
            overhead(options.rounds)
            continue
        if task == "flat":
            held &= flat()
            continue
        example, steps, wanted = TASKS[task]
        ratios = []
        for round_ in range(options.rounds):
            ours, whole = baton(example)
            theirs = stable_baselines3(task, steps)
            ratios.append(ours / theirs)
            print(f"{task} round {round_ + 1}: baton {ours:,.0f} steps/s, Stable-Baselines3 {theirs:,.0f}, ratio "
                  f"{ratios[-1]:.2f}; of the whole command {whole / theirs:.2f}", flush=True)
        ratio = statistics.median(ratios)
        held &= ratio >= wanted
        print(f"{task}: median ratio {ratio:.2f}, {'ok' if ratio >= wanted else 'FELL SHORT'} (wanted {wanted:g})")
    return int(not held)


if __name__ == "__main__":
    sys.exit(main())

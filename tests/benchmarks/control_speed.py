"""Control tasks beside Stable-Baselines3: both train one with the same hyperparameters, in turns, on one thread each.

What is timed for Baton is a whole run of the example by the `baton` command, from its first iteration to the last one's
commit, everything included: Parquet tables, checkpoints, manifests and their syncs, Prefect's flow and tasks, MLflow beside.
Prefect's server, the process that tells MLflow and the thread that commits may use other cores. Stable-Baselines3's time is
that of `learn`, without imports.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from rows import Row

ROOT = Path(__file__).parents[2]
PEERS = ROOT / ".peers" / "bin" / "python"
STEPS = {"pendulum": 30 * 2048, "cartpole": 300 * 512}
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def rows(rounds: int) -> list[Row]:
    return [Row(task, f"data/{task}: steps/s over Stable-Baselines3's", goal, ">=",
                lambda task=task: beside_stable_baselines3(task, rounds))
            for task, goal in (("pendulum", 3.0), ("cartpole", 2.0))]


def beside_stable_baselines3(task: str, rounds: int) -> tuple[float, str]:
    found = [(ours(task), theirs(task)) for _ in range(rounds)]
    us, them = (statistics.median(side) for side in zip(*found, strict=True))
    return statistics.median(a / b for a, b in found), f"{us:,.0f} steps/s, Stable-Baselines3 {them:,.0f}"


def ours(task: str) -> float:
    with TemporaryDirectory() as store:
        subprocess.run([sys.executable, "-m", "flows.cli.main", "train", ROOT / "data" / task, "--store", store, "--quiet",
                        "--set", "evaluate.picture=false"], check=True, cwd=ROOT, env=ONE_THREAD)
        states = sorted(Path(store).glob("runs/*/iterations/*.json"))
        rollout = json.loads(next(Path(store).glob("runs/*/run.json")).read_text())["config"]["rollout"]
        steps = (len(states) - 1) * rollout["num_envs"] * rollout["num_steps"]
        return steps / (states[-1].stat().st_mtime - states[0].stat().st_mtime)


def theirs(task: str) -> float:
    out = subprocess.run([PEERS, Path(__file__).with_name("sb3_peer.py"), task, str(STEPS[task])], check=True, text=True,
                         env=ONE_THREAD, stdout=subprocess.PIPE).stdout
    return float(out.splitlines()[-1])

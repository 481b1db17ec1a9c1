"""What orchestration adds to an iteration: a tiny language model, trained by `baton train` in four ways, in turns.

    make bench ONLY=overhead                  some minutes

| way | Prefect's flow and tasks | Prefect's server | MLflow |
|---|---|---|---|
| neither | none: the functions that they decorate | | |
| prefect | as always | its own, that ends with the command | |
| both | as always | its own, that ends with the command | sqlite |
| server | as always | one that is there already | sqlite |

An iteration is the time between two states' commits, the median over a run; "around them" are the seconds of the command
before the first and after the last, the preparation among them. Medians of the rounds, ratio and difference to `neither` of
the same round.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
PORT = 4391
ITERATIONS = 60
TINY = {
    "iterations": ITERATIONS, "base_model.layers": 1, "base_model.heads": 2, "base_model.width": 16,
    "base_model.vocab_size": 320, "base_model.context_length": 160, "sft.epochs": 1, "rollout.batch_size": 8,
    "rollout.max_new_tokens": 10, "ppo.minibatches": 2, "evaluate.every": 0, "execution.threads": 1,
}
UNDECORATED = """
import functools, sys
import prefect
from prefect.utilities.annotations import quote

def task(**_):
    def plain(function):
        return lambda *given: function(*(one.unquote() if isinstance(one, quote) else one for one in given))
    return plain

prefect.flow, prefect.task = lambda **_: lambda function: function, task
from flows.cli.main import run_command
sys.exit(run_command(sys.argv[1:]))
"""
BATON, PLAIN = ("-m", "flows.cli.main"), ("-c", UNDECORATED)
WAYS = {  # how the command is called, whether a server is there, MLflow
    "neither": (PLAIN, False, False), "prefect": (BATON, False, False), "both": (BATON, False, True),
    "server": (BATON, True, True),
}


def run(way: str, environment: dict[str, str]) -> tuple[float, float]:
    """Seconds of an iteration, and of the command outside of its iterations."""
    how, server, mlflow = WAYS[way]
    environment = environment | ({"PREFECT_API_URL": f"http://127.0.0.1:{PORT}/api"} if server else {})
    settings = [f"--set={key}={value}" for key, value in (TINY | {"tracking.enabled": str(mlflow).lower()}).items()]
    with tempfile.TemporaryDirectory() as store:
        began = time.perf_counter()
        subprocess.run([sys.executable, *how, "train", "data/reviews", "--store", store, "--quiet", *settings], check=True,
                       cwd=ROOT, env=environment)
        whole = time.perf_counter() - began
        commits = [path.stat().st_mtime for path in sorted(Path(store).glob("runs/*/iterations/*.json"))]
    return statistics.median(after - before for before, after in pairwise(commits)), whole - (commits[-1] - commits[0])


@contextmanager
def server(environment: dict[str, str], logs: Path) -> Iterator[None]:
    from flows.orchestration.pool import Processes

    processes = Processes(logs, environment)
    try:
        processes.start("server", "prefect", "server", "start", "--port", str(PORT))
        processes.wait_for("server", f"http://127.0.0.1:{PORT}/api/health")
        yield
    finally:
        processes.end()


def overhead(rounds: int) -> None:
    """Prints a table, one row for each way."""
    seen = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as home:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PREFECT_HOME": home}
        environment.pop("PREFECT_API_URL", None)
        for round_ in range(rounds):
            for way, (_, there, _) in WAYS.items():
                with server(environment, Path(home)) if there else nullcontext():
                    iteration, around = run(way, environment)
                seen[way].append((iteration, around))
                print(f"overhead round {round_ + 1}: {way:<8} {1000 * iteration:6.1f} ms an iteration, "
                      f"{around:5.1f} s around them", flush=True)
    bare, bare_around = np.array(seen["neither"]).T
    for way, figures in seen.items():
        iteration, around = np.array(figures).T
        print(f"overhead: {way:<8} {1000 * np.median(iteration):6.1f} ms an iteration "
              f"({np.median(iteration / bare):.2f} times, {1000 * np.median(iteration - bare):+.1f} ms), "
              f"{np.median(around):5.1f} s around them ({np.median(around - bare_around):+.1f} s)")

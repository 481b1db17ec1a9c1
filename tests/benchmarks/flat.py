"""What an iteration costs at 1,000 beside one at 10: calls to the store, and milliseconds.

    make bench ONLY="flat"

A small CartPole run with retention and MLflow on, in a store with ten other runs that share its first iterations. Calls are
those of the protocol in flows/store/files.py, counted from one saved state to the next. Milliseconds are medians of 50
iterations from 10 on and of 50 up to 1,000; one process makes all of them.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rows import Row

TESTS = Path(__file__).parents[1]
ITERATIONS, SAMPLE = 1000, 50
RATIO = 1.1  # how much longer a late iteration may take
COUNTED = """
import json, sys
from collections import Counter
from flows.runs.run import Run
from flows.store.local import LocalFiles
calls, counts, save = Counter(), {}, Run.save
def counted(verb):
    call = getattr(LocalFiles, verb)
    return lambda files, *arguments: calls.update([verb]) or call(files, *arguments)
for verb in ("read", "exists", "names", "walk", "local", "put_once", "begin", "sync", "publish", "remove", "holder"):
    setattr(LocalFiles, verb, counted(verb))
def saved(run, state):
    save(run, state)
    counts[state.iteration] = calls.total()
    calls.clear()
Run.save = saved
from flows.cli.main import run_command
code = run_command(sys.argv[2:])
open(sys.argv[1], "w").write(json.dumps(counts))
sys.exit(code)
"""


def flat_row() -> Row:
    return Row("flat", "iteration 1,000 over iteration 10, ten other runs in the store", RATIO, "<=", flat)


def flat() -> tuple[float, str]:
    """Milliseconds late over early, and how many more calls to the store there are."""
    sys.path.insert(0, str(TESTS))
    from control import write_control

    with tempfile.TemporaryDirectory() as scratch:
        example = write_control(Path(scratch, "small"), evaluate={"every": 0}, retention={"keep_last": 2},
                                tracking={"enabled": True})
        store, counts = Path(scratch, "store"), Path(scratch, "counts.json")
        baton = lambda *arguments: subprocess.run(  # noqa: E731
            [sys.executable, *map(str, arguments), "--store", str(store), "--quiet"], check=True, cwd=TESTS.parent,
            env=os.environ | {"MLFLOW_TRACKING_URI": ""})
        baton("-m", "flows.cli.main", "train", example, "--run", "other", "--iterations", "3", "--set",
              "tracking.enabled=false")
        for number in range(9):
            baton("-m", "flows.cli.main", "fork", "other", "--at", "3", "--run", f"other{number}")
        baton("-c", COUNTED, counts, "train", example, "--iterations", ITERATIONS)
        calls = {int(i): count for i, count in json.loads(counts.read_text()).items()}
        seconds = [json.loads((store / f"runs/small/iterations/{i:06d}.json").read_text())["seconds"]
                   for i in range(ITERATIONS + 1)]
    early, late = (1000 * statistics.median(part) for part in (seconds[10 : 10 + SAMPLE], seconds[1 - SAMPLE :][:-1]))
    ratio = late / early
    last = ITERATIONS - 1  # the very last one is evaluated
    return ratio, f"{early:.1f} and {late:.1f} ms, {calls[10]} and {calls[last]} calls to the store"

"""data/reviews over three seeds: does gold rise, how far does the policy move, does the reward model order pairs?

    make bench-learning        about four minutes of two cores a seed; prints a line per seed

Held to: gold rises by one standard deviation of the starting samples' scores, KL stays under 20 nats a response, the
reward model orders 85% of held-out pairs rightly; for every seed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def train(seed: int, store: str) -> dict[str, float]:
    """The example from nothing, with that seed."""
    started = time.perf_counter()
    baton = [sys.executable, "-m", "flows.cli"]
    subprocess.run([*baton, "train", str(ROOT / "data/reviews"), "--run", f"seed-{seed}", "--set", f"seed={seed}",
                    "--store", store, "--quiet"], check=True, cwd=ROOT)
    seconds = time.perf_counter() - started
    shown = subprocess.run([*baton, "show", f"seed-{seed}", "--store", store, "--json"], check=True, cwd=ROOT,
                           capture_output=True, text=True)
    states = json.loads(shown.stdout)["states"]
    before, after = states[0]["metrics"], states[-1]["metrics"]
    return {"seed": seed, "gold_before": before["evaluate/gold"], "gold_after": after["evaluate/gold"],
            "sigma": before["evaluate/gold_std"], "kl": after["evaluate/kl"], "win_rate": after["evaluate/win_rate"],
            "pairs": before["reward_model/heldout_accuracy"], "seconds": seconds}


def main() -> int:
    failed = False
    with tempfile.TemporaryDirectory() as store:
        for seed in (1, 2, 3):
            r = train(seed, store)
            rise = (r["gold_after"] - r["gold_before"]) / r["sigma"]
            good = rise >= 1 and r["kl"] < 20 and r["pairs"] >= 0.85
            failed |= not good
            print(f"seed {seed}: gold {r['gold_before']:+.3f} → {r['gold_after']:+.3f} ({rise:.2f} σ)  "
                  f"KL {r['kl']:.2f} nats  wins {r['win_rate']:.2f}  pairs {r['pairs']:.3f}  {r['seconds']:.0f} s  "
                  f"{'ok' if good else 'FELL SHORT'}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

"""Does it learn? Each check trains from nothing with the `baton` command and prints a line per run; no run is left out.

    make bench-learning                      all of them, some hours of two cores
    make bench-learning ONLY="bandit walks"  some

| check | what is run | held to |
|---|---|---|
| reviews | data/reviews, 3 seeds | gold rises by 1 σ of the starting samples, KL < 20 nats, 85% of held-out pairs |
| bandit | one token out of 10, reward for one of them, β = ½ | its probability within 0.02 of e²/(e² + 9) |
| walks | data/randomwalks, 3 seeds, 2,560 episodes | mean optimality of 400 sampled walks ≥ 0.95 |
| digits | data/digits, 3 seeds; draws its picture | mean reward of the last ten iterations > 0.2 |
| reverse | data/reverse, 2 seeds | twice the reward that `sft` has on held-out prompts |
| arithmetic | data/arithmetic, 3 seeds | accuracy on held-out sums 20 points above that of `sft` |
| adaptive | data/reviews with kl.target | mean KL of the last 24 of 80 iterations within 10% of it |
| presets | data/reviews with each preset, 2 seeds | gold rises |
| estimators | data/reviews with each estimator that has no critic | gold rises |
| overoptimization | data/reviews without KL penalty, reward models of 100 and of 3,000 pairs | see `overoptimization` |
| classic | CleanRL's ppo.py: 500,000 steps of CartPole-v1, Acrobot-v1, MountainCar-v0, 3 seeds | ≥ 475, ≥ −95, −200 |
| pendulum | data/pendulum, 3 seeds | return > −200 |
| mujoco | CleanRL's ppo_continuous_action.py: a million steps of Hopper-v4, 3 seeds | mean within 2,382.86 ± 271.74 |
| inverted | data/invertedpendulum, 3 seeds | mean ≥ 963.09 − 22.20, CleanRL's of the v4; SLM-Lab: 949.94 |
| lunarlander | data/lunarlander, 3 seeds | mean ≥ 183.30, SLM-Lab's of as many steps |

Control tasks are measured as in CleanRL's docs: the mean return of the last 100 episodes of training, by the policy that
samples.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import yaml

ROOT = Path(__file__).parents[2]
REVIEWS, WALKS, DIGITS = (ROOT / "data" / name for name in ("reviews", "randomwalks", "digits"))
Check = Iterator[tuple[bool, str]]
"""For each run: whether it held, and its line."""


def train(store: Path, example: Path, name: str, *settings: str) -> list[dict]:
    """The metrics of every iteration, the preparation first; each with the `actor`, and the `seconds` of the whole run."""
    started = time.perf_counter()
    options = [option for setting in settings for option in ("--set", setting)]
    _baton("train", str(example), "--run", name, *options, "--store", str(store), "--quiet")
    shown = json.loads(_baton("show", name, "--store", str(store), "--json"))
    seconds = time.perf_counter() - started
    return [state["metrics"] | {"seconds": seconds, "actor": state["actor"]} for state in shown["states"]]


def _baton(*arguments: str) -> str:
    return subprocess.run([sys.executable, "-m", "flows.cli.main", *arguments], check=True, cwd=ROOT, text=True,
                          stdout=subprocess.PIPE).stdout


def variant(folder: Path, example: Path, **sections: dict | str | None) -> Path:
    """A copy of the example whose config has other sections; None removes one."""
    copy = folder / f"{example.name}-{len(list(folder.glob('*')))}"
    shutil.copytree(example, copy)
    config = yaml.safe_load((copy / "config.yaml").read_text(encoding="utf-8")) | sections
    kept = {key: value for key, value in config.items() if value is not None}
    (copy / "config.yaml").write_text(yaml.safe_dump(kept), encoding="utf-8")
    return copy


def gold_line(name: str, states: list[dict]) -> tuple[float, str]:
    """How far gold rose, in σ of the starting samples, and the run's line."""
    before, after = states[0], states[-1]
    rise = (after["evaluate/gold"] - before["evaluate/gold"]) / before["evaluate/gold_std"]
    return rise, (f"{name}: gold {before['evaluate/gold']:+.3f} → {after['evaluate/gold']:+.3f} ({rise:+.2f} σ)  "
                  f"KL {after['evaluate/kl']:.2f} nats  wins {after['evaluate/win_rate']:.2f}  {after['seconds']:.0f} s")


def reviews(store: Path, folder: Path) -> Check:
    for seed in (1, 2, 3):
        states = train(store, REVIEWS, f"seed-{seed}", f"seed={seed}")
        rise, line = gold_line(f"seed {seed}", states)
        pairs = states[0]["reward_model/heldout_accuracy"]
        yield rise >= 1 and states[-1]["evaluate/kl"] < 20 and pairs >= 0.85, f"{line}  pairs {pairs:.3f}"


# --- one token ---

ARMS, BETA = 10, 0.5


def bandit(store: Path, folder: Path) -> Check:
    """max_π E[reward] − β·KL(π‖uniform) has π ∝ exp(reward/β): the rewarded token gets e²/(e² + 9)."""
    best, example = math.exp(1 / BETA), make_bandit(folder / "bandit")
    optimum = best / (best + ARMS - 1)
    for seed in (1, 2, 3):
        states = train(store, example, f"bandit-{seed}", f"seed={seed}")
        found = arm_probability(store, states[-1]["actor"])
        yield abs(found - optimum) <= 0.02, (f"seed {seed}: π(arm) {found:.4f}, optimum {optimum:.4f}  "
                                             f"{states[-1]['seconds']:.0f} s")


def make_bandit(folder: Path) -> Path:
    """An example with a vocabulary of ten tokens, all of them arms, and a GPT-2 whose logits start at 0."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    arms = [f"arm{i}" for i in range(ARMS)]
    words = Tokenizer(models.WordLevel({arm: i for i, arm in enumerate(arms)}, unk_token=arms[0]))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=arms[-1], pad_token=arms[-1])
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=ARMS, n_positions=4, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.0,
                                       embd_pdrop=0.0, attn_pdrop=0.0, eos_token_id=ARMS - 1, bos_token_id=ARMS - 1))
    torch.nn.init.zeros_(model.transformer.wte.weight)
    for part in (model, tokenizer):
        part.save_pretrained(folder / "model")
    (folder / "arms.py").write_text("def reward(prompts, responses):\n"
                                    "    return [float(response.strip() == 'arm3') for response in responses]\n")
    for role in ("prompts", "heldout_prompts"):
        (folder / f"{role}.jsonl").write_text(json.dumps({"prompt": "arm0"}) + "\n")
    (folder / "config.yaml").write_text(yaml.safe_dump({
        "iterations": 60, "data": {"prompts": "prompts.jsonl", "heldout_prompts": "heldout_prompts.jsonl"},
        "base_model": {"source": "model"}, "rollout": {"batch_size": 512, "max_new_tokens": 1},
        "reward": {"components": {"arm": {"source": "arms.py:reward"}}}, "kl": {"coef": BETA}, "value": {"start": "actor"},
        "ppo": {"epochs": 4, "minibatches": 2, "learning_rate": 3e-3, "critic_learning_rate": 3e-3, "schedule": "linear",
                "schedule_iterations": 60}, "evaluate": {"every": 0}}))
    return folder


def arm_probability(store: Path, actor: dict) -> float:
    """π(arm 3) of the trained actor, by transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM

    (folder,) = (store / "artifacts" / actor["artifact"]["stage"] / actor["artifact"]["identity"]).glob("attempts/*/actor")
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([[0]])).logits[0, -1].softmax(-1)[3].item()


# --- random walks ---

def walks(store: Path, folder: Path) -> Check:
    for seed in (1, 2, 3):
        states = train(store, WALKS, f"walks-{seed}", f"seed={seed}")
        before, after = states[0]["evaluate/gold"], states[-1]["evaluate/gold"]
        yield after >= 0.95, (f"seed {seed}: optimality {before:.3f} → {after:.3f}  "
                              f"{(len(states) - 1) * 128:,} episodes  {states[-1]['seconds']:.0f} s")


def digits(store: Path, folder: Path) -> Check:
    subprocess.run([sys.executable, DIGITS / "make_inputs.py"], check=True)
    curves = {}
    for seed in (1, 2, 3):
        states = train(store, DIGITS, f"digits-{seed}", f"seed={seed}")
        rewards = curves[f"seed {seed}"] = np.array([state["reward/score"] for state in states[1:]])
        last, solved = rewards[-10:].mean(), states[-1]["evaluate/gold"]
        passed = int((rewards > 0.2).argmax()) + 1
        yield last > 0.2, (f"seed {seed}: reward {rewards[0]:.3f} → {last:.3f}, above 0.2 in iteration {passed}  "
                           f"solved {solved:.3f}  {states[-1]['seconds']:.0f} s")
    plot_rewards(curves)


def plot_rewards(curves: dict[str, np.ndarray]) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3), constrained_layout=True)
    for name, rewards in curves.items():
        axes.plot(np.arange(1, len(rewards) + 1), rewards, label=name, linewidth=1)
    axes.axhline(0.2, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xlabel("iteration")
    axes.set_ylabel("mean reward of 800 responses")
    axes.legend()
    figure.savefig(DIGITS / "rewards.png", dpi=80)


def reverse(store: Path, folder: Path) -> Check:
    subprocess.run([sys.executable, ROOT / "data/smollm2/get_model.py"], check=True)
    for seed in (1, 2):
        states = train(store, ROOT / "data/reverse", f"reverse-{seed}", f"seed={seed}")
        before, after = (state["evaluate/score"] for state in (states[0], states[-1]))
        first, last = (state["evaluate/gold"] for state in (states[0], states[-1]))
        yield after >= 2 * before, (f"seed {seed}: reward {before:.3f} → {after:.3f}  solved {first:.2f} → {last:.2f}  "
                                    f"KL {states[-1]['evaluate/kl']:.1f} nats  {states[-1]['seconds']:.0f} s")


# --- variants of reviews ---

def adaptive(store: Path, folder: Path) -> Check:
    target, last = 3.0, 24
    states = train(store, REVIEWS, "adaptive", "iterations=80", "evaluate.every=0", f"kl.target={target}", "kl.horizon=300")
    kl = np.array([state["gae/kl"] for state in states[1:]])[-last:]
    yield abs(kl.mean() / target - 1) <= 0.1, (
        f"seed 1: target {target} nats, mean of the last {last} iterations {kl.mean():.2f} (σ {kl.std():.2f}), "
        f"β {states[1]['gae/kl_coef']:.3f} → {states[-1]['gae/kl_coef']:.3f}  {states[-1]['seconds']:.0f} s")


RATES = {  # a preset's learning rates are for models a thousand times as large; these keep its ratio of the two
    "classic": {"learning_rate": 1e-4, "critic_learning_rate": 1e-4},
    "reasoning": {"learning_rate": 1e-4, "critic_learning_rate": 1e-3},
}


def presets(store: Path, folder: Path) -> Check:
    for preset, rates in RATES.items():
        example = variant(folder, REVIEWS, preset=preset, kl=None, ppo=rates)
        for seed in (1, 2):
            rise, line = gold_line(f"{preset}, seed {seed}", train(store, example, f"{preset}-{seed}", f"seed={seed}"))
            yield rise > 0, line


def estimators(store: Path, folder: Path) -> Check:
    for estimator in ("grpo", "rloo", "reinforce++", "reinforce++-baseline"):
        settings = [f"gae.estimator={estimator}", "rollout.responses_per_prompt=4"]
        if estimator == "grpo":  # as its paper has it
            settings += ["kl.placement=loss", "kl.estimator=k3", "kl.coef=0.04"]
        rise, line = gold_line(f"{estimator}, seed 1", train(store, REVIEWS, estimator.replace("+", "p"), *settings))
        yield rise > 0, line


# --- over-optimisation ---

PICTURE = REVIEWS / "overoptimization.png"


def overoptimization(store: Path, folder: Path) -> Check:
    """Gold and proxy along √KL, for a reward model of few pairs and one of many (Gao et al. 2023, arXiv:2210.10760).

    Held to: with few pairs gold ends below its peak by more than two standard errors while the proxy ends above what it was
    at that peak; with many, gold's peak is higher, or at a larger √KL. Curves are means of three neighbouring evaluations.
    """
    example, curves = variant(folder, REVIEWS), {}
    prompts = (example / "heldout_prompts.jsonl").read_text(encoding="utf-8")
    (example / "heldout_prompts.jsonl").write_text(prompts * 4, encoding="utf-8")  # 256 samples an evaluation
    pairs = (example / "pairs.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (example / "few.jsonl").write_text("".join(pairs[:100]), encoding="utf-8")
    for name, settings in {"100 pairs": ("data.pairs=few.jsonl", "reward_model.epochs=10"), "3,000 pairs": ()}.items():
        states = train(store, example, f"over-{name.split()[0].replace(',', '')}", "iterations=64", "kl.coef=0.0", *settings)
        curves[name] = curve(states)
        c, accuracy = curves[name], states[0]["reward_model/heldout_accuracy"]
        peak = int(c["gold"].argmax())
        golds, proxies = (" → ".join(f"{c[key][at]:+.2f}" for at in (0, peak, -1)) for key in ("gold", "proxy"))
        yield True, (f"{name} ({accuracy:.3f} of held-out ones): start, peak, end: gold {golds}, proxy {proxies}; √KL "
                     f"{c['distance'][peak]:.2f} at the peak, {c['distance'][-1]:.2f} last  {states[-1]['seconds']:.0f} s")
    plot(curves)
    few, many = curves["100 pairs"], curves["3,000 pairs"]
    peak, other = int(few["gold"].argmax()), int(many["gold"].argmax())
    yield (few["gold"][-1] < few["gold"][peak] - 2 * few["error"] and few["proxy"][-1] > few["proxy"][peak],
           "few pairs: gold falls from its peak while the proxy goes on rising")
    yield (many["gold"][other] > few["gold"][peak] or many["distance"][other] > few["distance"][peak],
           f"many pairs: the peak is later or higher; {PICTURE}")


def curve(states: list[dict]) -> dict:
    """√KL, gold and proxy of each evaluation, smoothed; the standard error of a smoothed gold score."""
    rows = [state for state in states if "evaluate/gold" in state]
    smooth = lambda key: np.convolve(np.pad([row[key] for row in rows], 1, "edge"), np.ones(3) / 3, "valid")  # noqa: E731
    return {"distance": np.sqrt(np.maximum(smooth("evaluate/kl"), 0)), "gold": smooth("evaluate/gold"),
            "proxy": smooth("evaluate/score"), "error": rows[-1]["evaluate/gold_std"] / math.sqrt(256 * 3)}


def plot(curves: dict[str, dict]) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, rows = plt.subplots(2, len(curves), figsize=(8, 5), sharex=True, sharey="row", constrained_layout=True)
    for (top, bottom), (name, c) in zip(rows.T, curves.items(), strict=True):
        top.plot(c["distance"], c["gold"], color="tab:orange", marker="o", markersize=3)
        top.axvline(c["distance"][c["gold"].argmax()], color="grey", linewidth=0.8, linestyle=":")
        bottom.plot(c["distance"], c["proxy"], color="tab:blue", marker="o", markersize=3)
        top.set_title(f"reward model of {name}")
        bottom.set_xlabel("√KL to the reference (√nats a response)")
    rows[0, 0].set_ylabel("gold score")
    rows[1, 0].set_ylabel("reward model's score")
    figure.savefig(PICTURE, dpi=80)


def arithmetic(store: Path, folder: Path) -> Check:
    """Of sampled answers to held-out sums, and of the likeliest ones."""
    for seed in (1, 2, 3):
        states = train(store, ROOT / "data/arithmetic", f"arithmetic-{seed}", f"seed={seed}")
        before, after = states[0], states[-1]
        rise = after["evaluate/gold"] - before["evaluate/gold"]
        parts = [f"{label} {before[key]:.3f} → {after[key]:.3f}" for label, key in (
            ("accuracy", "evaluate/gold"), ("likeliest", "evaluate/greedy_gold"), ("pass@8", "evaluate/pass_at_8"))]
        yield rise >= 0.2, f"arithmetic seed {seed}: {'  '.join(parts)}  {after['seconds']:.0f} s"


# --- control ---

CARTPOLE, PENDULUM, HALFCHEETAH, INVERTED, LUNARLANDER = (
    ROOT / "data" / name for name in ("cartpole", "pendulum", "halfcheetah", "invertedpendulum", "lunarlander"))


def last_returns(store: Path, run: str, count: int = 100) -> np.ndarray:
    """Of the last `count` episodes that ended in training."""
    from flows.runs.run import open_run
    from flows.store.store import Store
    from schemas.tables import Trajectories

    opened, returns = open_run(Store(store), run), np.empty(0)
    for iteration in range(opened.last().iteration, 0, -1):
        batch = opened.store.table(opened.state(iteration).artifacts["rollout"], Trajectories)
        returns = np.concatenate([batch.episode_return[batch.ended], returns])
        if len(returns) >= count:
            break
    return returns[-count:]


def control_runs(store: Path, example: Path, name: str, *settings: str) -> Iterator[tuple[float, str]]:
    """For each of three seeds the last returns' mean, and the run's line."""
    for seed in (1, 2, 3):
        states = train(store, example, f"{name}-{seed}", f"seed={seed}", "evaluate.picture=false", *settings)
        mean = last_returns(store, f"{name}-{seed}").mean()
        yield mean, (f"{name} seed {seed}: last 100 episodes {mean:.2f}, most likely actions "
                     f"{states[-1]['evaluate/episode_return']:.2f}  {states[-1]['seconds']:.0f} s")


def classic(store: Path, folder: Path) -> Check:
    for name, environment, held in (
            ("cartpole", "CartPole-v1", lambda x: x >= 475), ("acrobot", "Acrobot-v1", lambda x: x >= -95),
            ("mountaincar", "MountainCar-v0", lambda x: x == -200)):  # a better number there means another algorithm
        for mean, line in control_runs(store, CARTPOLE, name, f"environment.id={environment}"):
            yield held(mean), line


def pendulum(store: Path, folder: Path) -> Check:
    for mean, line in control_runs(store, PENDULUM, "pendulum"):
        yield mean > -200, line


def mujoco(store: Path, folder: Path) -> Check:
    """CleanRL's table has three seeds' mean and spread, for the v4 of the environment."""
    means = []
    for mean, line in control_runs(store, HALFCHEETAH, "hopper", "environment.id=Hopper-v4"):
        means.append(mean)
        yield True, line
    yield abs(np.mean(means) - 2382.86) <= 271.74, f"hopper: {np.mean(means):.2f} ± {np.std(means):.2f}"


def inverted(store: Path, folder: Path) -> Check:
    """CleanRL's table has three seeds' mean and spread, for the v4; SLM-Lab's that of ten million steps of the v5."""
    means = []
    for mean, line in control_runs(store, INVERTED, "inverted"):
        means.append(mean)
        yield True, line
    yield np.mean(means) >= 963.09 - 22.20, f"inverted: {np.mean(means):.2f} ± {np.std(means):.2f}"


def lunarlander(store: Path, folder: Path) -> Check:
    """SLM-Lab's PPO comes to 183.30 within 300,000 steps of eight environments, four seeds' mean."""
    means = []
    for mean, line in control_runs(store, LUNARLANDER, "lunarlander"):
        means.append(mean)
        yield True, line
    yield np.mean(means) >= 183.30, f"lunarlander: {np.mean(means):.2f} ± {np.std(means):.2f}"


CHECKS = {check.__name__: check for check in (
    reviews, bandit, walks, digits, reverse, arithmetic, adaptive, presets, estimators, overoptimization, classic, pendulum,
    mujoco, inverted, lunarlander)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"some of {', '.join(CHECKS)}; all if none is named")
    parser.add_argument("--store", help="where to keep the runs; a temporary folder if it is left out")
    options = parser.parse_args()
    if unknown := set(options.checks) - set(CHECKS):
        parser.error(f"no check {sorted(unknown)[0]!r}; there are {', '.join(CHECKS)}")
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.checks or CHECKS:
            folder = Path(scratch, name)
            folder.mkdir()
            for held, line in CHECKS[name](Path(options.store or Path(scratch, "store")), folder):
                failed += not held
                print(f"{name:<17} {'ok  ' if held else 'FELL SHORT'} {line}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

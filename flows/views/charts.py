"""The curves of a run: which there are, and their points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from flows.runs.run import Run
from flows.views.thinning import thinned
from schemas.artifacts import TrainState
from schemas.stages import STAGES

POINTS = 1000  # of a curve, beyond which every so many are drawn


@dataclass(frozen=True)
class Line:
    """A curve; `low` and `high`: of its interval, where there is one."""

    name: str
    run: str
    iterations: list[int]
    x: list[float]
    y: list[float]
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Chart:
    """Some curves over one axis."""

    title: str
    unit: str
    x: str
    lines: list[Line]

    @property
    def file(self) -> str:
        """Its name as a file."""
        return "".join(c if c.isalnum() else "-" for c in self.title.lower()).strip("-")


# title, unit, metric → name; of a metric that ends in *, all that begin so
CURVES: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Return of an episode", "Σ of raw rewards", {
        "rollout/episode_return": "rollout", "evaluate/episode_return": "evaluation"}),
    ("Gold", "the judge's score, 95% interval", {"evaluate/gold": "held-out samples"}),
    ("Reward", "score of a response", {"reward/score": "rollout", "evaluate/score": "held-out samples"}),
    ("KL to the reference", "nats a response", {"gae/kl": "rollout", "evaluate/kl": "held-out samples"}),
    ("Wins against the start", "fraction, 95% interval", {"evaluate/win_rate": "held-out samples"}),
    ("Components of the reward", "before their weights", {"reward/component_*": ""}),
    ("Right answers", "chance that one of k is right", {"evaluate/pass_at_*": "pass@"}),
    ("Entropy", "nats a token, or a step", {"ppo/entropy": "the policy's"}),
    ("Size of an update", "nats a token: KL of the old policy to the new", {
        "ppo/approx_kl": "mean", "ppo/approx_kl_final": "last minibatch"}),
    ("Clipped", "fraction of tokens", {"ppo/clip_fraction": "ratio", "ppo/value_clip_fraction": "value"}),
    ("What the critic explains", "fraction of the returns' variance", {"gae/explained_variance": "explained variance"}),
    ("Length", "tokens of a response, or steps of an episode", {
        "rollout/response_length": "rollout", "evaluate/response_length": "held-out samples",
        "rollout/episode_length": "rollout", "evaluate/episode_length": "evaluation"}),
    ("Ended by themselves", "fraction of responses", {
        "rollout/eos_fraction": "rollout", "evaluate/eos_fraction": "held-out samples"}),
    ("Gradient", "norm before clipping", {"ppo/grad_norm_actor": "actor", "ppo/grad_norm_critic": "critic"}),
    ("KL coefficient", "β", {"gae/kl_coef": "β"}),
)


def charts(runs: Sequence[Run], states: Sequence[list[TrainState]]) -> list[Chart]:
    """Those that the runs have points of, the runs' curves in one chart."""
    found = curves(runs, states)
    found.insert(4, Chart("Gold against KL", "gold, over √ of KL in nats", "√KL", [
        line for run, some in zip(runs, states, strict=True) for line in _frontier(run, some)]))
    found.append(Chart("Seconds", "of an iteration, by stage", "iteration", [
        line for run, some in zip(runs, states, strict=True) for line in _by_stage(run, some, "seconds")]))
    found.append(Chart("Bytes", "written in an iteration, by stage", "iteration", [
        line for run, some in zip(runs, states, strict=True) for line in _by_stage(run, some, "bytes")]))
    return drawn(found)


def curves(runs: Sequence[Run], states: Sequence[list[TrainState]]) -> list[Chart]:
    """Those of metrics, which the states hold: nothing else is read."""
    return [Chart(title, unit, "iteration", [line for run, some in zip(runs, states, strict=True)
                                             for line in _lines(run, some, metrics)]) for title, unit, metrics in CURVES]


def drawn(found: Sequence[Chart]) -> list[Chart]:
    """Those that have a point."""
    return [chart for chart in found if any(line.y for line in chart.lines)]


def _lines(run: Run, states: list[TrainState], metrics: dict[str, str]) -> list[Line]:
    named = {}
    for metric, name in metrics.items():
        if metric.endswith("*"):
            begin = metric[:-1]
            there = dict.fromkeys(key for state in states for key in state.metrics if key.startswith(begin))
            named |= {key: f"{name}{key.removeprefix(begin)}" for key in there}
        else:
            named[metric] = name
    return [line for metric, name in named.items() if (line := _line(run, states, metric, name)).y]


def _line(run: Run, states: list[TrainState], metric: str, name: str) -> Line:
    there = [state for state in states if math.isfinite(state.metrics.get(metric, math.nan))]
    has_interval = all(f"{metric}_low" in state.metrics for state in there)
    low, high = ([state.metrics[f"{metric}_{end}"] for state in there] if has_interval else [] for end in ("low", "high"))
    iterations = [state.iteration for state in there]
    y = [state.metrics[metric] for state in there]
    return _thinned(Line(name, run.name, iterations, list(map(float, iterations)), y, low, high))


def _frontier(run: Run, states: list[TrainState]) -> list[Line]:
    """Gold reached by how far the policy went (Gao et al. 2022, https://arxiv.org/abs/2210.10760)."""
    there = [state for state in states if "evaluate/gold" in state.metrics and "evaluate/kl" in state.metrics]
    if len(there) < 2:
        return []
    x = [math.sqrt(max(0.0, state.metrics["evaluate/kl"])) for state in there]
    line = Line("held-out samples", run.name, [state.iteration for state in there], x,
                [state.metrics["evaluate/gold"] for state in there])
    return [_thinned(line)]


def _by_stage(run: Run, states: list[TrainState], what: str) -> list[Line]:
    lines = []
    for stage in STAGES[run.config.kind]:
        there = thinned([(state.iteration, state.artifacts[stage]) for state in states
                         if state.iteration > 0 and stage in state.artifacts], POINTS)
        found = [(iteration, float(getattr(manifest, what))) for iteration, ref in there
                 if (manifest := run.store.find(ref)) is not None]
        if found:
            iterations, y = map(list, zip(*found, strict=True))
            lines.append(Line(stage, run.name, iterations, list(map(float, iterations)), y))
    return lines


def _thinned(line: Line) -> Line:
    kept = thinned(range(len(line.y)), POINTS)
    return replace(line, **{name: [values[i] for i in kept] for name in ("iterations", "x", "y", "low", "high")
                            if (values := getattr(line, name))})

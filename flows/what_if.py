"""What a run would have given with other settings, from saved artifacts: nothing is sampled again.

`what_if`: one stage of one iteration for each setting of a grid. `rescore`: the rollouts of all iterations under another
reward, and how far the two agree.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import product

import numpy as np

from flows.again import call_again
from flows.chains import warm_of
from flows.perform import perform
from flows.runs.run import Run, changed
from flows.runs.start import check_device
from flows.store.lease import wait_for_gc
from schemas.artifacts import ArtifactRef, Produced, StageCall
from schemas.errors import ConfigError
from schemas.stages import STAGES
from schemas.tables import Rewards, Rollouts

STAGE_OF = {"kl": "gae"}
"""Section of the config → the stage that it is a setting of, where they are named otherwise."""


@dataclass(frozen=True)
class Variant:
    """One point of a grid."""

    settings: tuple[str, ...]
    ref: ArtifactRef
    how: str
    metrics: dict[str, float]


def grid_of(given: Iterable[str]) -> dict[str, list[str]]:
    """`key=a,b,c` each, to key → its values. Raises `ConfigError`."""
    grid: dict[str, list[str]] = {}
    for one in given:
        key, equals, values = one.partition("=")
        found = _values(values)
        if not equals or not all(found):
            raise ConfigError(f"--grid {one!r}: expected KEY=VALUE,VALUE, for example gae.gae_lambda=0.9,0.95,1")
        if key.strip() in grid:
            raise ConfigError(f"--grid {one!r}: {key.strip()} was named before; name all its values at once")
        grid[key.strip()] = found
    return grid


def _values(text: str) -> list[str]:
    """What commas part, but for those within brackets, braces, or a value in quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"" and not parts[-1].strip():
            quote = character
        depth = max(0, depth + (0 if quote else (character in "[{(") - (character in ")}]")))
        if character == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def stage_of(run: Run, keys: Iterable[str]) -> str:
    """The stage that these settings are of. Raises `ConfigError` if that is not one."""
    sections = dict.fromkeys(STAGE_OF.get(section, section) for section in (key.partition(".")[0] for key in keys))
    stages = STAGES[run.config.kind]
    if len(sections) != 1 or not set(sections) <= set(stages):
        raise ConfigError(f"what-if: {', '.join(sections)} is not one stage; name it with --stage: {', '.join(stages)}")
    return next(iter(sections))


def what_if(run: Run, stage: str, iteration: int, grid: Mapping[str, Sequence[str]]) -> Iterator[Variant]:
    """The stage's artifact for each combination, found or made; the run is as it was. Raises what making one raises."""
    wait_for_gc(run.store)
    settings = [tuple(f"{key}={value}" for key, value in zip(grid, values, strict=True))
                for values in product(*grid.values())]
    calls = [call_again(run, stage, iteration, each) for each in settings]  # mistakes before anything is computed
    _require_read(run, stage, grid, settings, calls)
    check_device(calls[0].execution)
    with closing(warm_of(calls[0].kind, run.store, calls[0].execution)) as warm:
        for each, call in zip(settings, calls, strict=True):
            produced: Produced = perform(call, run.store, warm)
            yield Variant(each, produced.ref, produced.how, produced.metrics)


def _require_read(
    run: Run, stage: str, grid: Mapping[str, Sequence[str]], settings: Sequence[tuple[str, ...]], calls: Sequence[StageCall]
) -> None:
    """Raises `ConfigError` for a setting that is changed and changes nothing of the stage."""
    points = [(each, changed(run, settings=each).config.model_dump_json(), call.recipe.ref.identity)
              for each, call in zip(settings, calls, strict=True)]
    if len(grid) == 1:  # the run's own value beside those that are named
        points.append(((), run.config.model_dump_json(), run.recorded(stage, calls[0].iteration).identity))
    for i, key in enumerate(grid):
        others: dict[tuple[str, ...], set[tuple[str, str]]] = defaultdict(set)
        for each, config, identity in points:
            others[each[:i] + each[i + 1 :]].add((config, identity))
        different = any(len({config for config, _ in found}) > 1 for found in others.values())
        if different and all(len({identity for _, identity in found}) == 1 for found in others.values()):
            raise ConfigError(f"what-if: {key} changes nothing of stage {stage!r}, which does not read it as this run is "
                              "set; --stage names another")


@dataclass(frozen=True)
class Agreement:
    """Two rewards of the same responses."""

    iteration: int
    responses: int
    before: float  # mean score, as it was rewarded
    after: float  # and under the other reward
    correlation: float | None  # Pearson's
    rank_correlation: float | None  # Spearman's
    same_order: float | None  # of pairs of responses to one prompt that both tell apart: the fraction ordered alike


def rescore(run: Run, settings: Sequence[str], iterations: Iterable[int]) -> Iterator[Agreement]:
    """The `reward` stage over saved rollouts with these settings, held against what was rewarded.

    The tables are committed as artifacts of their own, and found the next time; the run is as it was.
    """
    wait_for_gc(run.store)
    warm = None
    try:
        for iteration in iterations:
            call = call_again(run, "reward", iteration, settings)
            if warm is None:
                check_device(call.execution)
                warm = warm_of(call.kind, run.store, call.execution)
            other = run.store.table(perform(call, run.store, warm).ref, Rewards)
            ours = run.store.table(run.recorded("reward", iteration), Rewards)
            rollouts = run.store.table(run.recorded("rollout", iteration), Rollouts)
            yield agreement(iteration, ours.score, other.score, rollouts.prompt_id)
    finally:
        if warm is not None:
            warm.close()


def agreement(iteration: int, before: np.ndarray, after: np.ndarray, prompts: np.ndarray) -> Agreement:
    """Of (B,) scores each."""
    a, b = before.astype(np.float64), after.astype(np.float64)
    return Agreement(iteration, len(a), float(a.mean()), float(b.mean()), _correlation(a, b),
                     _correlation(_ranks(a), _ranks(b)), _same_order(a, b, prompts))


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """None where one of them does not vary."""
    return None if a.std() == 0 or b.std() == 0 else float(np.corrcoef(a, b)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Of equal ones the mean."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def _same_order(a: np.ndarray, b: np.ndarray, prompts: np.ndarray) -> float | None:
    alike = told_apart = 0
    for prompt in np.unique(prompts):
        of = np.flatnonzero(prompts == prompt)
        first, second = (of[index] for index in np.triu_indices(len(of), 1))
        signs = np.sign(a[first] - a[second]) * np.sign(b[first] - b[second])
        alike, told_apart = alike + int((signs > 0).sum()), told_apart + int((signs != 0).sum())
    return alike / told_apart if told_apart else None

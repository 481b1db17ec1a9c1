"""`baton doctor`: what is wrong with a training, by which numbers, and what people do about it.

Each check looks at the last iterations, a fifth of them and three at least, beside the first as many. Numbers in a check are
what it takes to raise it: far enough from what sound runs show that it does not cry wolf.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from flows.runs.run import Run
from flows.views.sql import Database
from schemas.artifacts import TrainState

FLAT = 0.2
"""Of the mean return: a smaller spread, as of a task that is solved, is nothing that a critic could explain."""
LEAST = 3
"""Iterations that a window has, and a run has to have twice."""


@dataclass(frozen=True)
class Verdict:
    """Something that is wrong."""

    name: str
    iterations: tuple[int, int]
    """The first and the last that show it."""
    reason: str
    """With its numbers."""
    remedy: str


@dataclass(frozen=True)
class Examination:
    """What was found, and what was not looked at."""

    verdicts: list[Verdict]
    checked: list[str]
    left_out: dict[str, str]
    """Check → why it says nothing of this run."""

    @property
    def summary(self) -> str:
        """In a line."""
        if not self.checked:
            return f"nothing could be checked, {next(iter(self.left_out.values()))}"
        raised = f": {', '.join(verdict.name for verdict in self.verdicts)}" if self.verdicts else ""
        return f"{len(self.verdicts)} of {len(self.checked)} checks raised{raised}"


class _NotApplicableError(Exception):
    """A check that says nothing of this run, and why."""


@dataclass(frozen=True)
class _Course:
    """A run's numbers over its iterations."""

    run: Run
    states: list[TrainState]  # of iterations
    all_states: list[TrainState]  # what was prepared too

    @property
    def window(self) -> int:
        return max(LEAST, len(self.states) // 5)

    @cached_property
    def first(self) -> list[TrainState]:
        return self.states[: self.window]

    @cached_property
    def last(self) -> list[TrainState]:
        return self.states[-self.window :]

    @property
    def span(self) -> tuple[int, int]:
        """The last window's iterations."""
        return self.last[0].iteration, self.last[-1].iteration

    @property
    def judged_better(self) -> bool:
        """Whether the judge's score, in the last iterations, is above that of the first evaluation and not below the best,
        its intervals apart."""
        seen = self.judged
        if not seen or seen[-1].iteration < self.span[0]:
            return False
        first, last = seen[0].metrics, seen[-1].metrics
        best = max(seen, key=lambda state: state.metrics["evaluate/gold"]).metrics
        return last["evaluate/gold_low"] > first["evaluate/gold_high"] and (
            last["evaluate/gold_high"] >= best["evaluate/gold_low"])

    @property
    def judged(self) -> list[TrainState]:
        """Those that were evaluated by a judge beside the reward."""
        return [state for state in self.all_states if self.has_judge and "evaluate/gold_low" in state.metrics]

    @property
    def has_judge(self) -> bool:
        """Whether there is one beside the reward."""
        return self.run.config.evaluate.judge is not None or bool(self.run.config.evaluate.judges)

    def mean(self, metric: str, states: list[TrainState], why: str) -> float:
        """Over those that have it. Raises `_NotApplicableError` with the reason if none has."""
        found = [state.metrics[metric] for state in states if metric in state.metrics]
        if not found:
            raise _NotApplicableError(why)
        return float(np.mean(found))

    def ask(self, query: str, states: list[TrainState]) -> list[tuple]:
        """SQL over those iterations."""
        return Database([self.run], {self.run.name: states}).sql(query).fetchall()


def examine(run: Run, states: list[TrainState]) -> Examination:
    """All checks, on the iterations that are there; `states`: all of the run."""
    course = _Course(run, states[1:], states)
    verdicts, checked, left_out = [], [], {}
    if (there := len(course.states)) < 2 * LEAST:
        return Examination([], [], dict.fromkeys(CHECKS, f"it takes {2 * LEAST} iterations, there are {there}"))
    for name, check in CHECKS.items():
        try:
            found = list(check(course))
        except _NotApplicableError as reason:
            left_out[name] = str(reason)
            continue
        checked.append(name)
        verdicts += [Verdict(name, course.span, reason[0].upper() + reason[1:], remedy) for reason, remedy in found]
    return Examination(verdicts, checked, left_out)


Found = Iterator[tuple[str, str]]


def _language(course: _Course) -> None:
    if course.run.config.kind != "language":
        raise _NotApplicableError("a control task")


def _kl(course: _Course) -> Found:
    _language(course)
    if course.run.config.kl.coef == 0:
        raise _NotApplicableError("kl.coef is 0: nothing is to keep the policy near the reference")
    why = "no reference was run"
    now, token = (course.mean(name, course.last, why) for name in ("gae/kl", "gae/kl_per_token"))
    before = course.mean("gae/kl", course.states[len(course.states) // 2 :][: course.window], why)
    if (token > 1 or (now > 10 and now > 4 * max(before, 1))) and not course.judged_better:
        yield (f"KL to the reference is {now:.1f} nats a response, {token:.2f} a token, where it was {before:.1f} half-way: "
               "the policy no longer speaks the reference's language, and no reward was made for what it says",
               "raise kl.coef or set kl.target, lower ppo.learning_rate or ppo.epochs; baton inspect shows at which tokens")


def _entropy(course: _Course) -> Found:
    why = "the policy's entropy was not measured"
    before, now = (course.mean("ppo/entropy", states, why) for states in (course.first, course.last))
    if course.run.config.kind == "control":
        yield from _entropy_of_actions(course, before, now)
        return
    one_each = "SELECT iteration, prompt_id, min_by(response, row_id) AS response FROM rollouts GROUP BY ALL"
    own = (f"SELECT avg(part) FROM (SELECT count(DISTINCT response) / count(*) AS part FROM ({one_each}) "
           "GROUP BY iteration)")  # in one iteration: sums, say, have few answers, which come again in the next
    (varied,), (varies,) = (course.ask(own, states)[0] for states in (course.first, course.last))
    if now < 0.2 * before and varies < 0.5 * varied:
        yield (f"the policy's entropy fell from {before:.3f} to {now:.3f} nats a token, and {varies:.0%} of the prompts get "
               f"a response of their own, where {varied:.0%} did: it says the same to all",
               "raise ppo.entropy_coef or kl.coef, lower ppo.learning_rate; look whether the reward pays one phrase")


def _entropy_of_actions(course: _Course, before: float, now: float) -> Found:
    """A policy that has become sure of nothing better: what has learned its task may be sure."""
    if min(before, now) < 0:
        raise _NotApplicableError("actions have a density, whose entropy has no zero to fall to")
    why = "no episode ended"
    first, last = (course.mean("rollout/episode_return", states, why) for states in (course.first, course.last))
    if now < 0.1 * before and last <= first:
        yield (f"the policy's entropy fell from {before:.3f} to {now:.3f} nats an action, and an episode returns "
               f"{last:.4g}, where it did {first:.4g}: it no longer tries other actions, and its own are no better",
               "raise ppo.entropy_coef, lower ppo.learning_rate or ppo.epochs")


def _critic(course: _Course) -> Found:
    if course.last[-1].critic is None:
        raise _NotApplicableError(f"gae.estimator={course.run.config.gae.estimator} has no critic")
    found = course.mean("gae/explained_variance", course.last, "the returns do not vary")
    mean, spread = (course.mean(f"gae/return_{of}", course.last, "") for of in ("mean", "std"))
    if spread < FLAT * abs(mean):
        raise _NotApplicableError(f"the returns hardly vary, by {spread:.3g} around {mean:.3g}")
    if found < -0.1 and course.mean("gae/explained_variance", course.states[len(course.states) // 2 :], "") < 0:
        yield (f"the critic explains {found:.0%} of the returns' variance: its values are further off than their mean, and "
               "add noise to the advantages",
               "raise ppo.critic_learning_rate or ppo.epochs, or scale rewards (reward.normalize)" + (
                   "; or take an estimator without a critic (gae.estimator: rloo)"
                   if course.run.config.kind == "language" else ""))


def _groups(course: _Course) -> Found:
    found = course.mean("gae/equal_groups", course.last, "responses to a prompt are not compared")
    if found > 0.7:
        yield (f"in {found:.0%} of the groups all responses have one score: their advantages are 0, and they are sampled "
               "for nothing", "take harder or easier prompts, more rollout.responses_per_prompt, or rollout.resample_rounds")


def _saturated(course: _Course) -> Found:
    _language(course)
    before, now = (course.mean("reward/score_std", states, "no rewards") for states in (course.first, course.last))
    if before > 0 and now < 0.05 * before:
        score = course.mean("reward/score", course.last, "")
        yield (f"scores spread by {now:.3g} around {score:.3g}, where they did by {before:.3g}: the reward no longer says "
               "which response is better", "stop here, take a reward that tells good from better, or harder prompts")


def _length(course: _Course) -> Found:
    _language(course)
    before, now = (course.mean("rollout/response_length", states, "") for states in (course.first, course.last))
    ((correlation,),) = course.ask("SELECT corr(length, score) FROM responses", course.last)
    if correlation is not None and correlation > 0.8 and now > 1.5 * before and not course.judged_better:
        yield (f"responses grew from {before:.0f} to {now:.0f} tokens, and their length explains {correlation**2:.0%} of "
               "the score: the policy is paid for length",
               "take length out of the reward, or set reward.overlong_buffer; baton sql on responses shows score by length")


def _limit(course: _Course) -> Found:
    _language(course)
    config = course.run.config.rollout
    if config.min_new_tokens == config.max_new_tokens:
        raise _NotApplicableError("all responses are of one length by rollout.min_new_tokens")
    before, now = (1 - course.mean("rollout/eos_fraction", states, "") for states in (course.first, course.last))
    if now > 0.5 and now > before - 0.05:
        yield (f"{now:.0%} of the responses are cut at rollout.max_new_tokens={config.max_new_tokens}, {before:.0%} were at "
               "first: what is scored is not what would have been said",
               "raise rollout.max_new_tokens, or make ending pay: reward.missing_eos, reward.overlong_buffer")


def _clipped(course: _Course) -> Found:
    found = course.mean("ppo/clip_fraction", course.last, "the policy was not updated")
    if found > 0.35:
        yield (f"{found:.0%} of the tokens are clipped: one batch moves the policy further than its ratio is to be trusted",
               "lower ppo.learning_rate or ppo.epochs, or set ppo.target_kl")


def _gold(course: _Course) -> Found:
    _language(course)
    if not course.has_judge:
        raise _NotApplicableError("no judge beside the reward is set (evaluate.judge)")
    seen = course.judged
    if len(seen) < 2:
        raise _NotApplicableError("it was evaluated once")
    best, last = max(seen, key=lambda state: state.metrics["evaluate/gold"]), seen[-1]
    reward = [state.metrics["evaluate/score"] for state in (best, last)]
    if last.metrics["evaluate/gold_high"] < best.metrics["evaluate/gold_low"] and reward[1] >= reward[0]:
        yield (f"gold fell from {best.metrics['evaluate/gold']:.3f} in iteration {best.iteration} to "
               f"{last.metrics['evaluate/gold']:.3f}, its intervals apart, while the reward went from {reward[0]:.3f} to "
               f"{reward[1]:.3f}: the reward is exploited",
               f"take iteration {best.iteration} (baton export --iteration {best.iteration}), raise kl.coef, or mend the "
               "reward; baton sql on samples, by score, shows how")


def _gap(course: _Course) -> Found:
    why = "old logprobs are those of sampling (ppo.recompute_old_logprobs is off)"
    mean, most = (course.mean(f"ppo/importance_weight{which}", course.last, why) for which in ("", "_max"))
    if abs(mean - 1) > 0.05 or most > 3:
        yield (f"The ratio π_old/π_rollout is {mean:.3f} in the mean and {most:.2f} at most, where it should be 1: what "
               "sampled is not the model that is updated",
               "sample in the update's precision (rollout.precision: float32); look at temperature and suppressed tokens")


def _components(course: _Course) -> Found:
    _language(course)
    found = course.ask(
        "SELECT component, min(given), max(given) FROM (SELECT unnest(map_keys(components)) AS component, "
        "unnest(map_values(components)) AS given FROM rewards) GROUP BY component ORDER BY component", course.last)
    for name, low, high in found:
        if low == high:
            yield (f"the component {name!r} is {low:g} for every response: it rewards nothing",
                   "look whether it is given what it expects (baton sql on rewards), or take it out")


CHECKS: dict[str, Callable[[_Course], Found]] = {
    "kl-runs-away": _kl, "entropy-collapsed": _entropy, "critic-explains-nothing": _critic, "groups-without-spread": _groups,
    "reward-saturated": _saturated, "reward-paid-for-length": _length, "responses-at-the-limit": _limit,
    "clip-fraction-high": _clipped, "gold-falls-while-reward-rises": _gold, "engine-and-update-apart": _gap,
    "component-never-varies": _components}

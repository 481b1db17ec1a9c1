"""Evaluation: responses to held-out prompts, scored by the reward and by judges that are never trained on.

The score is the reward's raw_score, which means the same in all iterations: no running moments, clip or penalties. Gold is
what judges say, else the score. KL is Σ_t log π(token) − log π_ref(token) of a response, in nats. A win is a sample
whose gold is above that of the baseline's samples for the same prompt, by default the starting actor's, drawn with the
same uniforms; a tie is half a win.

Of n samples a prompt, c of them right (gold ≥ `correct`):
    pass@k = 1 − C(n − c, k)/C(n, k), mean over prompts             (Chen et al. 2021, https://arxiv.org/abs/2107.03374)
    best of k = Σ_i C(i − 1, k − 1)/C(n, k)·gold of the i-th, by score  (the expected gold of the best by score of k of them)
A mean's interval is the 95% percentile interval of the bootstrap over prompts (Efron 1979).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import comb

import numpy as np

from schemas.language import EvaluateConfig, RolloutConfig
from schemas.metrics import EvaluateMetrics
from schemas.reward_settings import RewardConfig
from schemas.tables import Rollouts, Samples
from stages.ops.conversations import Prompt
from stages.ops.distribution import distribution_of
from stages.ops.finite import require_finite
from stages.ops.language_model import LanguageModel
from stages.ops.moments import sample_std
from stages.ops.rewards import Scorer, score_components, weighted_sum
from stages.ops.sampling import Sampler, respond
from stages.ops.token_logprobs import score_tokens
from stages.ops.turns import Partner

RESAMPLES = 1000  # of the bootstrap


def evaluate(
    sampler: Sampler, reference: LanguageModel, prompts: Sequence[Prompt], scorers: Mapping[str, Scorer],
    judges: Mapping[str, Scorer], baseline: Samples | None, rollout: RolloutConfig, reward: RewardConfig, *,
    bias: float, seed: int, config: EvaluateConfig | None = None, partner: Partner | None = None, first_prompt: int = 0,
) -> Samples:
    """`prompts`: B held-out ones, from line `first_prompt` on; `judges`: by name, their weighted sum is gold; `baseline`:
    the samples that wins are over, none where it is the starting actor that is evaluated; `bias`: what the reward takes off.

    Raises `RewardError` and `NonFiniteError` with the rows.
    """
    config = config or EvaluateConfig()
    lines = first_prompt + np.arange(len(prompts))
    responses = respond(sampler, [prompt for prompt in prompts for _ in range(config.samples)],
                        np.repeat(lines, config.samples), rollout, seed=seed, progress="evaluate", partner=partner,
                        first_row=first_prompt * config.samples)
    greedy = None
    if config.greedy:
        likeliest = respond(sampler, prompts, lines, rollout, seed=seed, progress="evaluate, greedy", partner=partner,
                            greedy=True)
        greedy = np.repeat([False, True], [len(responses), len(likeliest)])
        responses = Rollouts.joined([responses, likeliest])
    components = score_components(scorers, responses)
    gold = score = weighted_sum(components, reward, bias)
    require_finite("the score", score, responses.row_id)
    judged = score_components(judges, responses)
    if judges:
        gold = sum(config.weight_of(name) * values.astype(np.float64) for name, values in judged.items()).astype(np.float32)
        require_finite("the judges' score", gold, responses.row_id)
    several = config.samples > 1 or config.greedy
    return Samples(
        row_id=responses.row_id, prompt=responses.prompt, response=responses.response,
        response_length=responses.sampled_lengths, finish_reason=responses.finish_reason, score=score, gold=gold,
        kl=_kl(responses, reference, rollout), win=_wins(responses.prompt_id, gold, greedy, baseline),
        prompt_id=responses.prompt_id if several else None, greedy=greedy,
        judges=judged if len(judged) > 1 else None)


def sampled_first(samples: Samples) -> Samples:
    """Of parts that were joined: those that were sampled, then the greedy ones, as without parts."""
    return samples.only(np.argsort(samples.is_greedy, kind="stable"), samples.row_id)


def _kl(responses: Rollouts, reference: LanguageModel, rollout: RolloutConfig) -> np.ndarray:
    """(B,) float32, nats a response."""
    distribution = distribution_of(rollout.model_dump(), reference.tokenizer, reference.eos_ids)
    theirs = score_tokens(reference, responses, distribution, "evaluate")
    log_ratio = responses.logprobs.values.astype(np.float64) - theirs.values
    return responses.logprobs.with_values(log_ratio).sums().astype(np.float32)


def _wins(ids: np.ndarray, gold: np.ndarray, greedy: np.ndarray | None, baseline: Samples | None) -> np.ndarray:
    """(B,) float32: 1 above, ½ equal, 0 below, mean over the baseline's samples of the same kind for the prompt."""
    drawn = np.zeros(len(gold), bool) if greedy is None else greedy
    theirs = (ids, gold, drawn) if baseline is None else (baseline.prompt_ids, baseline.gold, baseline.is_greedy)
    wins = np.full(len(gold), 0.5)
    for row, (prompt, likeliest) in enumerate(zip(ids, drawn, strict=True)):
        same = (theirs[0] == prompt) & (theirs[2] == likeliest)
        if baseline is not None and same.any():
            wins[row] = np.mean(np.sign(gold[row] - theirs[1][same]) / 2 + 0.5)
    return wins.astype(np.float32)


# --- metrics ---

def metrics(
    samples: Samples, config: EvaluateConfig | None = None, cut: Mapping[str, int] | None = None
) -> EvaluateMetrics:
    """Means over the samples, with intervals; the greedy ones apart. `cut`: texts of each component that were too long."""
    config = config or EvaluateConfig()
    everything, samples = samples, samples.only(np.flatnonzero(~samples.is_greedy), samples.row_id[~samples.is_greedy])
    gold = samples.gold.astype(np.float64)
    gold_low, gold_high = interval(gold, samples.prompt_ids)
    win_low, win_high = interval(samples.win, samples.prompt_ids)
    greedy = everything.is_greedy
    return EvaluateMetrics(
        gold=gold.mean(), gold_std=sample_std(gold), gold_low=gold_low, gold_high=gold_high,
        score=samples.score.mean(dtype=np.float64), kl=samples.kl.mean(dtype=np.float64),
        win_rate=samples.win.mean(dtype=np.float64), win_rate_low=win_low, win_rate_high=win_high,
        response_length=samples.response_length.mean(),
        eos_fraction=np.mean(np.array(samples.finish_reason) != "length"),
        judge={name: values.mean(dtype=np.float64) for name, values in (samples.judges or {}).items()},
        greedy_gold=everything.gold[greedy].mean(dtype=np.float64) if greedy.any() else None,
        greedy_score=everything.score[greedy].mean(dtype=np.float64) if greedy.any() else None,
        pass_at={str(k): pass_at(gold >= config.correct, samples.prompt_ids, k) for k in config.pass_at},
        best_of={str(k): best_of(samples.score, gold, samples.prompt_ids, k) for k in config.best_of}, cut=dict(cut or {}))


def pass_at(right: np.ndarray, ids: np.ndarray, k: int) -> float:
    """The chance that one of k samples of a prompt is right, mean over prompts."""
    chances = []
    for prompt in np.unique(ids):
        n, c = int((ids == prompt).sum()), int(right[ids == prompt].sum())
        chances.append(1 - comb(n - c, k) / comb(n, k))
    return float(np.mean(chances))


def best_of(score: np.ndarray, gold: np.ndarray, ids: np.ndarray, k: int) -> float:
    """The gold that is expected of the best by score of k samples of a prompt, mean over prompts; of equal scores the
    mean."""
    means = []
    for prompt in np.unique(ids):
        scores, golds = score[ids == prompt], gold[ids == prompt]
        n, order = len(scores), np.argsort(scores, kind="stable")
        weights = np.array([comb(i, k - 1) / comb(n, k) for i in range(n)])  # of the i-th from below being the best
        for value in np.unique(scores):
            tied = scores[order] == value
            weights[tied] = weights[tied].mean()
        means.append(float(weights @ golds[order]))
    return float(np.mean(means))


def interval(values: np.ndarray, ids: np.ndarray) -> tuple[float, float]:
    """Ends of the 95% interval of the mean, whole prompts resampled."""
    prompts, index = np.unique(ids, return_inverse=True)
    sums, counts = np.bincount(index, weights=values), np.bincount(index)
    draws = np.random.Generator(np.random.Philox(0)).integers(len(prompts), size=(RESAMPLES, len(prompts)))
    low, high = np.percentile(sums[draws].sum(1) / counts[draws].sum(1), [2.5, 97.5])
    return float(low), float(high)

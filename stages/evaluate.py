"""Evaluation: one response to each held-out prompt, scored by the reward and by a judge that is never trained on.

The score is the reward's raw_score, which means the same in all iterations: no running moments, clip or penalties.
KL is Σ_t log π(token) − log π_ref(token) of a response, in nats. A win is a sample whose gold score is above that of the
starting actor's sample for the same prompt, drawn with the same uniforms; a tie is half a win.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from schemas.language import RewardConfig, RolloutConfig
from schemas.metrics import EvaluateMetrics
from schemas.tables import Rollouts, Samples
from stages.ops.conversations import Prompt
from stages.ops.distribution import distribution_of
from stages.ops.finite import require_finite
from stages.ops.language_model import LanguageModel
from stages.ops.moments import sample_std
from stages.ops.rewards import Scorer, of_responses, score_components, weighted_sum
from stages.ops.sampling import Sampler, respond
from stages.ops.token_logprobs import score_tokens
from stages.ops.turns import Partner


def evaluate(
    sampler: Sampler, reference: LanguageModel, prompts: Sequence[Prompt], scorers: Mapping[str, Scorer],
    judge: Scorer | None, baseline: Samples | None, rollout: RolloutConfig, reward: RewardConfig, *,
    bias: float, seed: int, partner: Partner | None = None,
) -> Samples:
    """`prompts`: B held-out ones; `baseline`: the starting actor's samples, none when it is the one evaluated; `bias`:
    what the reward takes off.

    Raises `RewardError` and `NonFiniteError` with the rows.
    """
    responses = respond(sampler, prompts, np.arange(len(prompts)), rollout, seed=seed, progress="evaluate", partner=partner)
    gold = score = weighted_sum(score_components(scorers, responses), reward, bias)
    require_finite("the score", score, responses.row_id)
    if judge is not None:
        gold = of_responses(judge(responses))
        require_finite("the judge's score", gold, responses.row_id)
    return Samples(
        row_id=responses.row_id, prompt=responses.prompt, response=responses.response,
        response_length=responses.sampled_lengths, finish_reason=responses.finish_reason, score=score, gold=gold,
        kl=_kl(responses, reference, rollout), win=_wins(gold, gold if baseline is None else baseline.gold))


def _kl(responses: Rollouts, reference: LanguageModel, rollout: RolloutConfig) -> np.ndarray:
    """(B,) float32, nats a response."""
    distribution = distribution_of(rollout.model_dump(), reference.tokenizer, reference.eos_ids)
    theirs = score_tokens(reference, responses, distribution, "evaluate")
    log_ratio = responses.logprobs.values.astype(np.float64) - theirs.values
    return responses.logprobs.with_values(log_ratio).sums().astype(np.float32)


def _wins(gold: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """(B,) float32: 1 above, ½ equal, 0 below."""
    return (np.sign(gold - baseline) / 2 + 0.5).astype(np.float32)


def metrics(samples: Samples) -> EvaluateMetrics:
    """Means over the samples."""
    gold = samples.gold.astype(np.float64)
    return EvaluateMetrics(
        gold=gold.mean(), gold_std=sample_std(gold),
        score=samples.score.mean(dtype=np.float64), kl=samples.kl.mean(dtype=np.float64),
        win_rate=samples.win.mean(dtype=np.float64), response_length=samples.response_length.mean(),
        eos_fraction=np.mean(np.array(samples.finish_reason) != "length"))

"""Is there anything to learn from? Lines for people where a score, an advantage or a policy carries no signal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from schemas.control import Spaces
from schemas.language import RolloutConfig
from schemas.reward_settings import RewardConfig
from schemas.settings import GAEConfig, KLConfig

NARROW = 0.05  # of a Box
NEARLY_UNIFORM = 0.999  # of the largest entropy there is


def of_components(components: Mapping[str, np.ndarray]) -> Iterator[str]:
    """Components of the reward, (B,) each, that are the same for all responses."""
    for name, values in components.items():
        if len(values) > 1 and (values == values[0]).all():
            yield (f"the component {name!r} is {values[0]:g} for all {len(values)} responses: it does not say which of them "
                   "is better")


def cut_texts(cut: Mapping[str, int], config: RewardConfig, rows: int) -> Iterator[str]:
    """`cut`: of how many of so many texts a reward model was given a part."""
    for name, count in cut.items():
        if count:
            yield (f"{count} of {rows} texts are longer than the component {name!r} takes, and were cut on the "
                   f"{config.components[name].truncation} (reward.components.{name}.truncation; max_tokens, if that is set)")


def flat_groups(count: int, config: RolloutConfig) -> Iterator[str]:
    """`count`: groups without spread that are in the batch although others were looked for."""
    if count:
        yield (f"{count} of {config.batch_size // config.responses_per_prompt} groups have one score for all their "
               f"responses, since rollout.resample_rounds={config.resample_rounds} did not suffice: their advantages are "
               "0; look for harder or easier prompts, or raise it")


def of_advantages(raw: np.ndarray, flat: float | None, config: GAEConfig, kl: KLConfig) -> Iterator[str]:
    """`raw`: (n,) before whitening; `flat`: the fraction of groups whose responses all have one score."""
    if len(raw) > 1 and (raw == raw[0]).all():
        yield f"all {len(raw)} advantages are {raw[0]:g}: the update has nothing to learn from"
    elif flat and kl.coef > 0 and kl.placement == "reward":
        yield (f"in {flat:.0%} of the groups all responses have one score, and their advantages come from the KL in the "
               f"reward alone ({config.estimator} compares the sums); kl.placement: loss leaves them at 0")


def of_actions(actions: np.ndarray, spaces: Spaces) -> Iterator[str]:
    """`actions`: (n, A) as they were sampled by a policy that is new, of which a Box should be given most."""
    for i, (low, high) in enumerate(zip(spaces.low, spaces.high, strict=True)):
        if low is None or high is None:
            continue
        given = np.clip(actions[:, i], low, high)
        covered = (np.quantile(given, 0.95) - np.quantile(given, 0.05)) / (high - low)
        if covered < NARROW:
            yield (f"the policy begins near 0 with a spread of {actions[:, i].std():.2g}, and its action {i} reaches "
                   f"{covered:.0%} of the Box from {low:g} to {high:g}: environment.scale_actions: true gives it all of it")


def of_policy(entropy: float | None, vocabulary: int) -> Iterator[str]:
    """`entropy`: mean over the tokens, nats."""
    if entropy is not None and entropy >= NEARLY_UNIFORM * math.log(vocabulary):
        yield (f"the policy is uniform: its entropy of {entropy:.3f} nats is that of {vocabulary} equally likely tokens; a "
               "lower learning rate, or a smaller ppo.entropy_coef, may keep it")

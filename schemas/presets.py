"""What a config can start from: `preset: classic` or `preset: reasoning`; a control task starts from `CONTROL`.

What the config says itself takes precedence. Learning rates of the presets are those that the systems train models of
billions of parameters with; small models want larger ones.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

CLASSIC: dict[str, Any] = {
    "rollout": {"temperature": 0.7},
    "reward": {"missing_eos": "replace", "missing_eos_penalty": 1.0},
    "kl": {"coef": 0.05, "estimator": "k1", "placement": "reward"},
    "gae": {"gamma": 1.0, "gae_lambda": 0.95},
    "ppo": {"epochs": 4, "minibatches": 1, "clip_range_low": 0.2, "clip_range_high": 0.2, "value_clip_range": 0.2,
            "value_coef": 0.1, "learning_rate": 3e-6, "critic_learning_rate": 3e-6, "adam_epsilon": 1e-5},
}
"""The main settings of TRL's PPO trainer and of the N+ details (Huang et al. 2024, https://arxiv.org/abs/2403.17031)."""

REASONING: dict[str, Any] = {
    "rollout": {"temperature": 1.0},
    "kl": {"coef": 0.0},
    "gae": {"gamma": 1.0, "gae_lambda": 1.0},
    "ppo": {"epochs": 1, "minibatches": 4, "clip_range_low": 0.2, "clip_range_high": 0.2, "dual_clip": 3.0,
            "value_clip_range": 0.5, "learning_rate": 1e-6, "critic_learning_rate": 1e-5, "adam_epsilon": 1e-8},
}
"""The main settings of OpenRLHF and verl: one pass, λ 1, a critic that learns faster than the actor."""

PRESETS = {"classic": CLASSIC, "reasoning": REASONING}

CONTROL: dict[str, Any] = {
    "gae": {"gamma": 0.99, "gae_lambda": 0.95, "truncation": "bootstrap", "whiten": "none"},
    "ppo": {"epochs": 10, "minibatches": 32, "whiten_minibatches": True, "value_coef": 0.5, "learning_rate": 3e-4,
            "critic_learning_rate": None, "max_grad_norm": 0.5},
}
"""Continuous control in Baselines' PPO2 and CleanRL (Huang et al. 2022,
https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details/), but for truncation."""


WHOLE = frozenset({"placement"})  # settings that are a mapping and one value: another one takes their place


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `below` with the values of `above` put over it, section by section."""
    out = copy.deepcopy(dict(below))
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping) and key not in WHOLE
        out[key] = merged(out[key], value) if both else value
    return out

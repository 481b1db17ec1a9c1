"""Columns of the views that have a row a token or a step: the table that each is in, the list there, and what it is."""

from __future__ import annotations

TOKENS: dict[str, tuple[str, str, str]] = {
    "token": ("rollouts", "response_tokens", "id"),
    "text": ("rollouts", "response_tokens", "the token alone, decoded"),
    "logprob": ("rollouts", "logprobs", "nats: log π_old, as it was sampled"),
    "sampled": ("rollouts", "sampled", "several turns: whether it was sampled, rather than part of a reply"),
    "reference": ("reference", "logprobs", "nats: log π_ref"),
    "value": ("values", "values", "V before the token"),
    "kl": ("advantages", "kl", "nats: the KL estimate"),
    "reward": ("advantages", "rewards", "r_t, what `gae` was given: −β·kl and, at the last one, the score"),
    "delta": ("values", "", "δ_t = r_t + γ·V_{t+1} − V_t"),
    "raw_advantage": ("advantages", "raw_advantages", "A_t before whitening"),
    "advantage": ("advantages", "advantages", "A_t, what the policy is updated with"),
    "return": ("advantages", "returns", "what the critic is fitted to"),
}
STEPS: dict[str, tuple[str, str, str]] = {
    "observation": ("trajectories", "observations", "o_t"),
    "action": ("trajectories", "actions", "a_t, as sampled"),
    "logprob": ("trajectories", "logprobs", "nats: log π_old(a_t | o_t)"),
    "value": ("trajectories", "values", "V(o_t)"),
    "raw_reward": ("trajectories", "raw_rewards", "as the environment gave it"),
    "reward": ("trajectories", "rewards", "scaled and clipped, if set"),
    "delta": ("trajectories", "", "δ_t = r_t + γ·V_{t+1} − V_t"),
    "raw_advantage": ("advantages", "raw_advantages", "A_t before whitening"),
    "advantage": ("advantages", "advantages", "A_t, what the policy is updated with"),
    "return": ("advantages", "returns", "what the critic is fitted to"),
}
NUMBERS = ("kl", "advantage", "raw_advantage", "value", "delta", "reward", "return", "logprob", "reference")
"""Those of `tokens` that tokens are coloured by."""

"""Naive reference maths, in float64 loops, sharing no code with what it checks."""

from __future__ import annotations

import math


def gae(rewards: list[float], values: list[float], bootstrap: float, gamma: float, lam: float) -> list[float]:
    """A_t = Σ_l (γλ)^l δ_{t+l}, summed term by term (Schulman et al. 2016, equation 16)."""
    n = len(rewards)
    following = [*values[1:], bootstrap]
    deltas = [rewards[t] + gamma * following[t] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]


def kl(logprob: float, reference: float, estimator: str) -> float:
    """Of one token, by the definitions in Schulman's note, with r = π_ref/π."""
    r = math.exp(reference) / math.exp(logprob)
    return {"k1": -math.log(r), "k2": math.log(r) ** 2 / 2, "k3": (r - 1) - math.log(r)}[estimator]


def policy_loss(logprob: float, old: float, advantage: float, low: float, high: float, dual: float = math.inf) -> float:
    """Case by case: a positive advantage is cut off above 1 + high, a negative one below 1 − low and above dual."""
    ratio = math.exp(max(-20.0, min(20.0, logprob - old)))
    if advantage >= 0:
        return -advantage * min(ratio, 1 + high)
    return -advantage * min(max(ratio, 1 - low), dual)


def value_loss(value: float, old: float, target: float, clip: float | None) -> float:
    """The worse of the clipped and the unclipped squared error, halved."""
    plain = (value - target) ** 2
    if clip is None:
        return plain / 2
    near = min(max(value, old - clip), old + clip)
    return max(plain, (near - target) ** 2) / 2


def log_softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    total = top + math.log(sum(math.exp(x - top) for x in logits))
    return [x - total for x in logits]


def whiten(values: list[float], shift: bool = True, unbiased: bool = True) -> list[float]:
    mean = sum(values) / len(values)
    variance = sum((x - mean) ** 2 for x in values) / (len(values) - (1 if unbiased else 0))
    return [(x - mean) / math.sqrt(variance + 1e-8) + (0 if shift else mean) for x in values]


def group_advantages(returns: list[float], groups: list[int], estimator: str) -> list[float]:
    """Each response against the others to its prompt, one at a time."""
    out = []
    for i, (own, group) in enumerate(zip(returns, groups, strict=True)):
        others = [r for j, (r, g) in enumerate(zip(returns, groups, strict=True)) if g == group and j != i]
        everyone = [own, *others]
        mean = sum(everyone) / len(everyone)
        variance = sum((r - mean) ** 2 for r in everyone) / (len(everyone) - 1)
        out.append({"rloo": own - sum(others) / len(others), "grpo": (own - mean) / math.sqrt(variance + 1e-8),
                    "reinforce++-baseline": own - mean}[estimator])
    return out


def sample(probabilities: list[float], u: float) -> int:
    """The first token whose cumulated probability exceeds u."""
    total = 0.0
    for token, p in enumerate(probabilities):
        total += p
        if u * sum(probabilities) < total:
            return token
    return len(probabilities) - 1

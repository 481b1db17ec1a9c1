"""The exercises of the pages that teach, and whether an answer is right.

    python docs/examples/exercises.py              # the questions; --zh in Chinese
    python docs/examples/exercises.py 5 -0.05      # an answer to the fifth

Right is what Baton's own functions give, to two digits after the point.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from schemas.tables import Ragged
from stages.ops.advantages import gae_advantages
from stages.ops.kl import kl_estimate
from stages.ops.losses import policy_loss

LANGUAGES = ("en", "zh")
TOLERANCE = 0.0051  # two digits after the point, rounded either way


@dataclass(frozen=True)
class Exercise:
    """A question in each language, the number that answers it, and the way to it."""

    question: tuple[str, str]
    answer: Callable[[], float]
    way: tuple[str, str]


def gradient(advantage: float) -> float:
    """By the log probability, of an action whose probability rose from 0.2 to 0.3."""
    log_ratio = torch.tensor([0.3 / 0.2]).log().requires_grad_()
    policy_loss(log_ratio, torch.tensor([advantage]), 0.2, 0.2).loss.sum().backward()
    return log_ratio.grad.item() + 0.0


def first_advantage() -> float:
    rows = [Ragged.from_rows([np.array(numbers)], np.float64) for numbers in ([0.0, 0.0, 1.0], [0.5, 0.5, 0.5])]
    return float(gae_advantages(*rows, np.zeros(1), gamma=1.0, gae_lambda=0.5).values[0])


EXERCISES = (
    Exercise(
        ("An action had probability 0.2 when it was sampled. Now it has 0.3. What is its ratio?",
         "一个动作在采样时概率是 0.2，现在是 0.3。它的比率是多少？"),
        lambda: 0.3 / 0.2,
        ("The ratio is the new probability over the old one: 0.3 / 0.2.", "比率是新概率除以旧概率：0.3 / 0.2。")),
    Exercise(
        ("Its advantage is +1 and ε is 0.2. What is the gradient of PPO's loss by its log probability?",
         "它的优势是 +1，ε 是 0.2。PPO 的损失对它的对数概率的梯度是多少？"),
        lambda: gradient(+1.0),
        ("The ratio is beyond 1 + ε and the advantage positive: the clipped side is the smaller one, and it is flat.",
         "比率超过 1 + ε，优势为正：截断的一边更小，而它是平的。")),
    Exercise(
        ("The same action with advantage −1: what is the gradient?", "同一个动作，优势是 −1：梯度是多少？"),
        lambda: gradient(-1.0),
        ("A bad action that became likelier: the minimum takes the unclipped side, −ρ·A, whose gradient is −ρ·A = 1.5.",
         "一个变得更可能的坏动作：最小值取未截断的一边 −ρ·A，它的梯度是 −ρ·A = 1.5。")),
    Exercise(
        ("Three tokens are paid 0, 0 and 1; the critic says 0.5 for each; γ is 1, λ is 0.5. What is the first one's "
         "advantage?",
         "三个词元分别得到 0、0 和 1；critic 对每个词元的估计都是 0.5；γ 是 1，λ 是 0.5。第一个词元的优势是多少？"),
        first_advantage,
        ("δ is 0, 0 and 0.5. From the end: 0.5, then 0 + 0.5 · 0.5 = 0.25, then 0 + 0.5 · 0.25.",
         "δ 是 0、0 和 0.5。从结尾算起：0.5，然后 0 + 0.5 · 0.5 = 0.25，然后 0 + 0.5 · 0.25。")),
    Exercise(
        ("The actor gives a token the log probability −1.0, the reference −1.5; β is 0.1. What is the token paid, if it is "
         "not the last one?",
         "actor 给一个词元的对数概率是 −1.0，reference 给的是 −1.5；β 是 0.1。如果它不是最后一个，它得到多少？"),
        lambda: -0.1 * kl_estimate(torch.tensor(-1.5 - -1.0), "k1").item(),
        ("−β · (log π − log π_ref) = −0.1 · (−1.0 + 1.5).", "−β · (log π − log π_ref) = −0.1 · (−1.0 + 1.5)。")),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("number", nargs="?", type=int, help="which exercise")
    parser.add_argument("answer", nargs="?", help="a number: -0.05, 3/2")
    parser.add_argument("--zh", action="store_true", help="in Chinese")
    options = parser.parse_args()
    language = LANGUAGES.index("zh" if options.zh else "en")
    if options.number is None:
        for number, exercise in enumerate(EXERCISES, 1):
            print(f"{number}. {exercise.question[language]}")
        return 0
    if not 1 <= options.number <= len(EXERCISES):
        parser.error(f"there are exercises 1 to {len(EXERCISES)}")
    exercise = EXERCISES[options.number - 1]
    if options.answer is None:
        print(exercise.question[language])
        return 0
    try:
        given = as_number(options.answer)
    except ValueError:
        parser.error((f"expected a number, such as -0.05 or 3/2, got {options.answer!r}",
                      f"需要一个数，例如 -0.05 或 3/2，得到的是 {options.answer!r}")[language])
    if abs(given - exercise.answer()) < TOLERANCE:
        print(("right", "正确")[language])
        return 0
    print((f"not {given:g}. ", f"不是 {given:g}。")[language] + exercise.way[language])
    return 1


def as_number(text: str) -> float:
    """With the minus sign of a page, and fractions. Raises `ValueError`."""
    return float(Fraction(text.replace("−", "-")))


if __name__ == "__main__":
    sys.exit(main())

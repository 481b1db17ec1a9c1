"""Rewards for short, friendly answers."""

from __future__ import annotations

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

ANALYZER = SentimentIntensityAnalyzer()


def sentiment(prompts: list[str], responses: list[str]) -> list[float]:
    """VADER's compound sentiment of each response, −1 to 1 (Hutto & Gilbert 2014), from human-rated words."""
    return [ANALYZER.polarity_scores(response)["compound"] for response in responses]


def words(prompts: list[str], responses: list[str]) -> list[float]:
    """Words of each response; weighted below 0 it is a length penalty."""
    return [float(len(response.split())) for response in responses]

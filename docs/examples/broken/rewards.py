"""Rewards for walks, `a` being the goal. Each has a mistake."""


def arrived(responses: list[str]) -> list[float]:
    """1 for a walk that ends at the goal."""
    return [float(response.endswith("a\n")) for response in responses]


def arrived_soon(responses: list[str]) -> list[float]:
    """1 for the goal at once, a tenth less for each step before it; 0 for a walk that does not arrive."""
    return [1.1 - len(response) / 10 if response.endswith("a") else 0.0 for response in responses]

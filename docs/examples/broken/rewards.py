"""Rewards for walks, `a` being the goal. One of them is wrong, and one is right and pays for the wrong thing."""


def arrived(responses: list[str]) -> list[float]:
    """1 for a walk that ends at the goal."""
    return [float(response.split("\n")[-1] == "a\n") for response in responses]


def short(responses: list[str]) -> list[float]:
    """1 for the goal at once, less for each step; 0 for a walk that does not arrive."""
    return [1 - len(response) / 10 if response.endswith("a") else 0.0 for response in responses]


def steps(responses: list[str]) -> list[float]:
    """A tenth for each step, as one that leads somewhere."""
    return [sum(letter.isalpha() for letter in response) / 10 for response in responses]

"""How much of the list a response reverses."""


def reversed_words(prompts: list[str], responses: list[str]) -> list[float]:
    """Words that are right up to the first that is not, over those asked for or given, whichever are more: 0 to 1."""
    return [right(answer(prompt).split(), response.split()) for prompt, response in zip(prompts, responses, strict=True)]


def solved(prompts: list[str], responses: list[str]) -> list[float]:
    """1 where the response is the answer and no more, else 0."""
    return [float(answer(prompt) == response.strip()) for prompt, response in zip(prompts, responses, strict=True)]


def answer(prompt: str) -> str:
    """`Words: owl sea pot` → `pot sea owl`."""
    return " ".join(reversed(prompt.partition("\n")[0].split()[1:]))


def right(expected: list[str], found: list[str]) -> float:
    same = 0
    while same < min(len(expected), len(found)) and expected[same] == found[same]:
        same += 1
    return same / max(len(expected), len(found))

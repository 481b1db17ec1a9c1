"""How much of the right sequence a response begins with."""


def matched(prompts, responses):
    """The fraction of the answer's characters that are right up to the first that is not, one each."""
    return [prefix(answer(prompt), response) for prompt, response in zip(prompts, responses, strict=True)]


def solved(prompts, responses):
    """1 where the response is the answer and no more, else 0."""
    return [float(answer(prompt) == response) for prompt, response in zip(prompts, responses, strict=True)]


def prefix(expected, found):
    wrong = (i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b)
    return next(wrong, min(len(expected), len(found))) / len(expected)


def answer(prompt):
    """`7,9:9,3` → `2,4,6`."""
    begin, _, rest = prompt.partition(":")
    (first, second), (modulus, count) = (map(int, part.split(",")) for part in (begin, rest))
    return ",".join(str((second + i * (second - first)) % modulus) for i in range(1, count + 1))

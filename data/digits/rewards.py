"""How much of the right sequence a response begins with. Responses come with their special tokens, one character a token."""

import re


def matched(prompts, responses):
    """For each token 1/n while it and all before it are those of the answer, which has n characters; else 0."""
    return [paid(answer(prompt), tokens(response)) for prompt, response in zip(prompts, responses, strict=True)]


def solved(prompts, responses):
    """1 where the response is the answer and no more, else 0."""
    pairs = zip(prompts, responses, strict=True)
    return [float([*answer(prompt), "<eos>"] == tokens(response)) for prompt, response in pairs]


def tokens(response):
    """`2,4<eos>` → `2`, `,`, `4`, `<eos>`."""
    return re.findall(r"<\w+>|.", response)


def paid(expected, found):
    wrong = (i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b)
    right = next(wrong, min(len(expected), len(found)))
    return [1 / len(expected)] * right + [0.0] * (len(found) - right)


def answer(prompt):
    """`7,9:9,3` → `2,4,6`."""
    begin, _, rest = prompt.partition(":")
    (first, second), (modulus, count) = (map(int, part.split(",")) for part in (begin, rest))
    return ",".join(str((second + i * (second - first)) % modulus) for i in range(1, count + 1))

"""Random walks on a directed graph: the inputs of this example, and the score of a walk.

    python data/randomwalks/walks.py      writes the *.jsonl files beside it again, always the same

21 nodes, written `a` to `u`; `a` is the goal, and nothing leads out of it. A walk is the letters of its nodes. The task is
trlX's (https://github.com/CarperAI/trlx, examples/randomwalks), as its documentation describes it.
"""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np

NODES, GOAL, LONGEST, WALKS, SEED = 21, 0, 10, 1000, 1002
HELDOUT_REPEATS = 20  # samples of each start in an evaluation


def draw_graph(rng: np.random.RandomState) -> np.ndarray:
    """(21, 21) bool, True where an edge leads from row to column: 1 in 10, no self-loops, one out of every node at least."""
    while True:
        edges = rng.uniform(size=(NODES, NODES)) > 0.9
        np.fill_diagonal(edges, False)
        if edges.any(1).all():
            edges[GOAL] = False
            return edges


@cache
def graph() -> np.ndarray:
    """The graph of this example."""
    return draw_graph(np.random.RandomState(SEED))


@cache
def shortest_lengths() -> tuple[int, ...]:
    """Nodes on the shortest walk from each node to the goal, both counted; breadth first, from the goal backwards."""
    lengths, reached = {GOAL: 1}, [GOAL]
    for node in reached:
        for before in np.flatnonzero(graph()[:, node]):
            if before not in lengths:
                lengths[int(before)] = lengths[node] + 1
                reached.append(int(before))
    return tuple(lengths[node] for node in range(NODES))


def draw_walk(rng: np.random.RandomState, longest: int = LONGEST) -> list[int]:
    """From a uniform start other than the goal, uniformly along edges, to the goal or to `longest` nodes."""
    walk = [int(rng.randint(1, NODES))]
    while walk[-1] != GOAL and len(walk) < longest:
        walk.append(int(rng.choice(np.flatnonzero(graph()[walk[-1]]))))
    return walk


def optimality(prompts: list[str], responses: list[str]) -> list[float]:
    """(10 − L)/(10 − S) of each walk prompt + response: 1 is as short as can be, 0 illegal, too long or not at the goal."""
    return [_optimality(prompt + response) for prompt, response in zip(prompts, responses, strict=True)]


def _optimality(text: str) -> float:
    nodes = [ord(letter) - ord("a") for letter in text]
    legal = all(0 <= node < NODES for node in nodes) and all(
        graph()[a, b] for a, b in pairwise(nodes))
    length = len(nodes) if legal and nodes[-1] == GOAL and len(nodes) <= LONGEST else LONGEST
    shortest = shortest_lengths()[nodes[0]]
    return (LONGEST - length) / (LONGEST - shortest)


def letters(nodes: list[int]) -> str:
    return "".join(chr(ord("a") + node) for node in nodes)


def main() -> None:
    rng = np.random.RandomState(SEED)
    draw_graph(rng)  # the walks go on from where the graph's draws ended
    walks: list[list[int]] = []
    while len(walks) < WALKS:
        walk = draw_walk(rng)
        if walk[-1] == GOAL:
            walks.append(walk)
    starts = [{"prompt": letters([node])} for node in range(1, NODES)]
    _write("demonstrations", [{"prompt": letters(walk[:1]), "completion": letters(walk[1:])} for walk in walks])
    _write("prompts", starts)
    _write("heldout_prompts", starts * HELDOUT_REPEATS)


def _write(name: str, rows: list[dict[str, str]]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    Path(__file__).with_name(f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

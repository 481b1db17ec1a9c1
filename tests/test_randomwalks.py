"""The example of random walks: its graph, its score, and that its files are what the script writes."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import module_of

FOLDER = Path(__file__).parents[1] / "data" / "randomwalks"


@pytest.fixture(scope="module")
def walks():
    return module_of(FOLDER / "walks.py")


def test_the_graph_is_as_described(walks):
    edges = walks.graph()
    assert edges.shape == (21, 21) and not np.diag(edges).any() and not edges[0].any() and edges[1:].any(1).all()


def test_shortest_lengths_by_powers_of_the_matrix(walks):
    """The goal is reached in S − 1 steps: the first power of the adjacency matrix with a way there."""
    reach, edges = np.eye(21, dtype=int), walks.graph().astype(int)
    found = {}
    for nodes in range(1, 11):
        for node in np.flatnonzero(reach[:, 0]):
            found.setdefault(int(node), nodes)
        reach = reach @ edges
    assert [found[node] for node in range(21)] == list(walks.shortest_lengths())


def test_scores_by_hand(walks):
    way, node, left = "b", 1, walks.shortest_lengths()
    while node:
        node = next(n for n in np.flatnonzero(walks.graph()[node]) if left[n] < left[node])
        way += walks.letters([node])
    scores = walks.optimality(["b"] * 6, [way[1:], way[1:] + "a", "", "é", "b" + way[1:], way[1:-1]])
    assert scores == [1, 0, 0, 0, 0, 0]


def test_uniform_walking_scores_what_the_task_says(walks):
    rng = np.random.RandomState(0)
    texts = [walks.letters(walks.draw_walk(rng)) for _ in range(4000)]
    assert abs(np.mean(walks.optimality([t[0] for t in texts], [t[1:] for t in texts])) - 0.785) < 0.02


def test_the_files_are_what_the_script_writes(tmp_path):
    shutil.copy(FOLDER / "walks.py", tmp_path)
    subprocess.run([sys.executable, tmp_path / "walks.py"], check=True)
    for path in sorted(tmp_path.glob("*.jsonl")):
        assert path.read_bytes() == (FOLDER / path.name).read_bytes(), path.name
    assert len(list(tmp_path.glob("*.jsonl"))) == 3

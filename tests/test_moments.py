"""Running moments against NumPy's over all that was seen, however it comes: in long batches, in single steps, by turns."""

import numpy as np
import pytest

from schemas.artifacts import Moments
from stages.ops.moments import RunningMoments, normalized, sample_std, updated_moments


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("before", [0, 5])
def test_each_step_has_the_moments_of_all_steps_so_far(width, before):
    random = np.random.default_rng(width)
    seen = [random.normal(3, 2, (before, 2))] if before else []
    start = np.concatenate(seen) if seen else np.zeros((0, 2))
    running = RunningMoments(before, start.mean(0) if before else np.zeros(2), start.var(0) if before else np.ones(2))
    for steps in (4, 1, 3, 1, 1, 5):
        batch = random.normal(3, 2, (steps, width, 2))
        means, variances = running.see(batch)
        assert means.shape == variances.shape == (steps, 2)
        for step, mean, variance in zip(batch, means, variances, strict=True):
            seen.append(step)
            np.testing.assert_allclose(mean, np.concatenate(seen).mean(0), rtol=1e-9)
            np.testing.assert_allclose(variance, np.concatenate(seen).var(0), rtol=1e-9, atol=1e-12)
        assert running.count == sum(map(len, seen))


def test_moments_of_batches_are_those_of_all_values():
    random, seen, moments = np.random.default_rng(0), [], Moments()
    for size in (1, 4, 7):
        seen.append(random.normal(-2, 3, size).astype(np.float32))
        moments = updated_moments(moments, seen[-1])
        values = np.concatenate(seen).astype(np.float64)
        assert moments.count == len(values)
        assert moments.mean == pytest.approx(values.mean()) and moments.std == pytest.approx(values.std(), abs=1e-12)


@pytest.mark.parametrize("x, std", [([1, 2, 4], 1.5275252316519468), ([5, 7], 1.4142135623730951), ([3], 0)])
def test_a_samples_standard_deviation(x, std):
    assert sample_std(np.array(x)) == pytest.approx(std, rel=1e-12)


def test_nothing_is_divided_where_all_scores_are_equal():
    moments = updated_moments(Moments(), np.full(3, 2.0, np.float32))
    assert normalized(np.array([2.0, 4.0]), moments, "scale").tolist() == [2, 4]
    assert normalized(np.array([2.0, 4.0]), moments, "standardize").tolist() == [0, 2]

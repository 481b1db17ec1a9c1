"""Losses against case-by-case oracles and finite differences."""

import oracles
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.ops.losses import approx_kl, log_ratio, policy_loss, value_loss

NUMBER = st.floats(-4, 4)


@given(st.floats(-6, 0), st.floats(-6, 0), NUMBER, st.floats(0.05, 0.5), st.floats(0.05, 2))
def test_policy_loss_case_by_case(logprob, old, advantage, low, high):
    ratio = log_ratio(torch.tensor([logprob]).double(), torch.tensor([old]).double())
    ours = policy_loss(ratio, torch.tensor([advantage]).double(), low, high).item()
    assert abs(ours - oracles.policy_loss(logprob, old, advantage, low, high)) < 1e-5 * max(1, abs(ours))


@given(NUMBER, NUMBER, NUMBER, st.one_of(st.none(), st.floats(0.05, 1)))
def test_value_loss_is_the_worse_square(value, old, target, clip):
    ours, _ = value_loss(*(torch.tensor([x]).double() for x in (value, old, target)), clip)
    assert abs(ours.item() - oracles.value_loss(value, old, target, clip)) < 1e-5 * max(1, ours.item())


def test_ratio_is_clamped_at_20_nats():
    assert log_ratio(torch.tensor([100.0, -100.0]), torch.zeros(2)).tolist() == [20, -20]


def test_gradients_equal_finite_differences():
    def total(x):
        ratio = log_ratio(x[0], torch.tensor([-1.0, -2.0]).double())
        policy = policy_loss(ratio, torch.tensor([1.5, -0.7]).double(), 0.2, 0.2)
        value, _ = value_loss(x[1], torch.tensor([0.1, 0.3]).double(), torch.tensor([1.0, -1.0]).double(), 0.2)
        return (policy + value).sum()

    at = torch.tensor([[-1.05, -1.9], [0.2, 0.9]]).double().requires_grad_()
    assert torch.autograd.gradcheck(total, at)


def test_approx_kl_is_0_at_ratio_1_and_positive_elsewhere():
    assert approx_kl(torch.tensor([0.0])).item() == 0
    assert (approx_kl(torch.tensor([-1.0, -0.1, 0.1, 2.0])) > 0).all()

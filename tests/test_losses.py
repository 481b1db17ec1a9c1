"""Losses against case-by-case oracles, finite differences and torchrl."""

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.ops.kl import kl_estimate
from stages.ops.losses import a2c_loss, log_ratio, policy_loss, value_loss
from stages.ops.token_logprobs import entropy_of

NUMBER = st.floats(-4, 4)


def one(*numbers):
    return (torch.tensor([x]).double() for x in numbers)


@given(st.floats(-6, 0), st.floats(-6, 0), NUMBER, st.floats(0.05, 0.5), st.floats(0.05, 2),
       st.one_of(st.none(), st.floats(1.1, 5)))
def test_policy_loss_case_by_case(logprob, old, advantage, low, high, dual):
    ratio = log_ratio(*one(logprob, old))
    ours = policy_loss(ratio, *one(advantage), low, high, dual)
    expected = oracles.policy_loss(logprob, old, advantage, low, high, dual or float("inf"))
    assert abs(ours.loss.item() - expected) < 1e-5 * max(1, abs(expected))
    if min(abs(ratio.exp().item() - (1 - low)), abs(ratio.exp().item() - (1 + high))) > 1e-6:
        assert ours.outside.item() == (not 1 - low <= ratio.exp().item() <= 1 + high)


@pytest.mark.parametrize("ratio, advantage, outside, taken, bounded", [
    (1.5, 1.0, True, True, False), (1.5, -1.0, True, False, False), (0.5, -1.0, True, True, False),
    (0.5, 1.0, True, False, False), (1.1, 1.0, False, False, False), (4.0, -1.0, True, True, True)])
def test_where_the_policy_clip_is_at_work(ratio, advantage, outside, taken, bounded):
    """The clipped loss is taken only where it is the larger one, and gives no gradient there."""
    at = torch.tensor([ratio]).double().log().requires_grad_()
    clip = policy_loss(at, *one(advantage), 0.2, 0.2, dual_clip=3)
    assert (clip.outside.item(), clip.taken.item(), clip.bounded.item()) == (outside, taken, bounded)
    clip.loss.sum().backward()
    assert (at.grad.item() == 0) == taken


@given(NUMBER, NUMBER, NUMBER, st.one_of(st.none(), st.floats(0.05, 1)))
def test_value_loss_is_the_worse_square(value, old, target, clip):
    ours = value_loss(*one(value, old, target), clip)
    assert abs(ours.loss.item() - oracles.value_loss(value, old, target, clip)) < 1e-5 * max(1, ours.loss.item())
    if clip is None or abs(abs(value - old) - clip) > 1e-6:
        assert ours.outside.item() == (clip is not None and abs(value - old) > clip)


def test_ratio_is_clamped_at_20_nats():
    assert log_ratio(torch.tensor([100.0, -100.0]), torch.zeros(2)).tolist() == [20, -20]


@pytest.mark.parametrize("part", ["policy", "dual", "value", "entropy", "k2", "k3"])
def test_gradients_equal_finite_differences(part):
    """Through the softmax, from logits of two tokens over three entries; away from the kinks of the clips."""
    tokens, old = torch.tensor([0, 2]), torch.tensor([-1.0, -3.5]).double()
    advantages, reference = torch.tensor([1.5, -0.7]).double(), torch.tensor([-0.9, -1.6]).double()

    def loss(logits, values):
        logprobs = logits.log_softmax(-1)
        chosen = logprobs.gather(1, tokens[:, None])[:, 0]
        if part in ("policy", "dual"):
            return policy_loss(log_ratio(chosen, old), advantages, 0.2, 0.2, 3.0 if part == "dual" else None).loss.sum()
        if part == "value":
            return value_loss(values, torch.tensor([0.1, 0.3]).double(), torch.tensor([1.0, -1.0]).double(), 0.2).loss.sum()
        if part == "entropy":
            return entropy_of(logprobs).sum()
        return kl_estimate(log_ratio(reference, chosen), part).sum()

    logits = torch.tensor([[0.3, -0.2, 0.5], [0.1, 0.9, -0.4]]).double().requires_grad_()
    values = torch.tensor([0.2, 0.9]).double().requires_grad_()
    assert torch.autograd.gradcheck(loss, (logits, values))


def test_clipped_losses_equal_torchrls():
    """ClipPPOLoss over a table of logits, one observation a token; its critic loss is not halved."""
    from tensordict import TensorDict
    from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
    from torchrl.objectives import ClipPPOLoss

    torch.manual_seed(0)
    n, vocabulary = 12, 5
    policy, critic = torch.nn.Linear(n, vocabulary, bias=False), torch.nn.Linear(n, 1, bias=False)
    actions, old = torch.randint(vocabulary, (n,)), torch.randn(n) - 1.5
    advantages, old_values, returns = torch.randn(n), torch.randn(n), torch.randn(n)
    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(policy, ["observation"], ["logits"]),
        ProbabilisticTensorDictModule(["logits"], ["action"], distribution_class=torch.distributions.Categorical,
                                      return_log_prob=True, log_prob_key="sample_log_prob"))
    theirs = ClipPPOLoss(actor, TensorDictModule(critic, ["observation"], ["state_value"]), clip_epsilon=0.2,
                         entropy_bonus=False, critic_coeff=0.5, loss_critic_type="l2", clip_value=0.3,
                         normalize_advantage=False)
    theirs.set_keys(sample_log_prob="sample_log_prob")
    out = theirs(TensorDict({"observation": torch.eye(n), "action": actions, "sample_log_prob": old,
                             "advantage": advantages[:, None], "state_value": old_values[:, None],
                             "value_target": returns[:, None]}, [n]))
    chosen = policy.weight.T.log_softmax(-1).gather(1, actions[:, None])[:, 0]
    ours = policy_loss(log_ratio(chosen, old), advantages, 0.2, 0.2)
    torch.testing.assert_close(ours.loss.mean(), out["loss_objective"])
    torch.testing.assert_close(ours.outside.float().mean(), out["clip_fraction"])
    value = value_loss(critic.weight[0], old_values, returns, 0.3)
    torch.testing.assert_close(value.loss.mean(), out["loss_critic"])


def test_approx_kl_is_0_at_ratio_1_and_positive_elsewhere():
    assert kl_estimate(torch.tensor([0.0]), "k3").item() == 0
    assert (kl_estimate(torch.tensor([-1.0, -0.1, 0.1, 2.0]), "k3") > 0).all()


def test_nothing_of_a2cs_loss_is_clipped():
    found = a2c_loss(torch.tensor([-0.5, -9.0]), torch.tensor([2.0, -3.0]))
    assert found.loss.tolist() == [1.0, -27.0] and found.bounded is None
    for where in (found.outside, found.taken):
        assert where.dtype == torch.bool and where.tolist() == [False, False]

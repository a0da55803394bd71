"""The formulas of PPO, DPO and the reward model: published numbers, and float64 NumPy loops on random inputs.

Published numbers are printed to six decimals: PRINTED allows half of the last one plus float32 rounding of
values of about 1. Random inputs are of size 1 to 10, so float32 leaves 1e-6 of that, and sums of 7 columns
some ten roundings: NEAR.
"""

import math

import numpy as np
import pytest
import torch

from distributed.optimizer import learning_rate
from dpo import dpo_loss
from ppo import (
    AdaptiveKLController,
    Config,
    FixedKLController,
    actor_loss,
    clipped_surrogate,
    gae,
    policy_loss,
    shape_rewards,
    value_loss,
    whiten,
)
from rm import preference_loss, ranking_loss

PRINTED = dict(atol=1e-6, rtol=0)
NEAR = dict(atol=1e-5, rtol=1e-5)


def t(values):
    return torch.tensor(values, dtype=torch.float32)


def normal(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check(got, expected, tolerance=NEAR):
    got = got.detach()
    assert got.shape == torch.Size(np.shape(expected))
    np.testing.assert_allclose(got.double().numpy(), np.asarray(expected, dtype=np.float64), **tolerance)


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


# ---- the reference step, from log-probabilities to whitened advantages -----------------------------------

LOGPROBS = [[-1.0, -0.5, -2.0, -0.2, -3.0, -4.0]]
REF_LOGPROBS = [[-1.2, -0.4, -1.5, -0.3, -2.0, -5.0]]
VALUES = [[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]]
WITH_EOS = dict(
    score=1.0, last=3, kl=[0.2, -0.1, -0.5, 0.1, 0, 0], rewards=[-0.01, 0.005, 0.025, -0.005, 1, 0],
    advantages=[0.791266, 0.738175, 0.6665, 0.57, 0.5, 0], returns=[0.891266, 0.938175, 0.9665, 0.97, 1.0, 0],
    whitened=[1.202985, 0.562903, -0.301229, -1.464658, 0, 0],
)
WITHOUT_EOS = dict(
    score=-1.0, last=5, kl=[0.2, -0.1, -0.5, 0.1, -1, 1], rewards=[-0.01, 0.005, 0.025, -0.005, 0.05, -1.05],
    advantages=[-0.770549, -0.905842, -1.064044, -1.251625, -1.4175, -1.65],
    returns=[-0.670549, -0.705842, -0.764044, -0.851625, -0.9175, -1.05],
    whitened=[1.355206, 0.903657, 0.375644, -0.250425, -0.804046, -1.580035],
)


def masks(last, n_columns):
    """mask and mask_p1 (B, R) of responses whose last tokens are in the columns `last`."""
    last = torch.tensor(last)[:, None]
    columns = torch.arange(n_columns)
    return columns <= last, columns <= last + 1


def rewards_of(case, **settings):
    """The KL (1, 6) of the example's log-probabilities, as a rollout has it, and the rewards made of it."""
    mask, mask_p1 = masks([case["last"]], 6)
    kl = (t(LOGPROBS) - t(REF_LOGPROBS)) * mask
    return kl, shape_rewards(kl, t([case["score"]]), mask_p1, 0.05, **settings)


@pytest.mark.parametrize("case", [WITH_EOS, WITHOUT_EOS], ids=["eos", "no eos"])
def test_reference_step_matches_worked_example(case):
    kl, rewards = rewards_of(case)
    check(kl, [case["kl"]], PRINTED)
    check(rewards, [case["rewards"]], PRINTED)
    mask, mask_p1 = masks([case["last"]], 6)
    values = t(VALUES) * mask_p1
    advantages = gae(rewards, values, 1.0, 0.95)
    check(advantages, [case["advantages"]], PRINTED)
    check(advantages + values, [case["returns"]], PRINTED)
    check(whiten(advantages, mask), [case["whitened"]], PRINTED)


def test_whitened_rewards_match_worked_example():
    kl, rewards = rewards_of(WITH_EOS, whiten_rewards=True)
    check(rewards, [[-0.331263, -0.293638, -0.243473, -0.318721, 2.202095, 0]], PRINTED)
    check(kl, [WITH_EOS["kl"]], PRINTED)  # what is given stays as it is


# ---- shape_rewards ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_shape_rewards_matches_loop(whiten_rewards):
    B, R = 6, 7
    scores = normal(B, seed=2, scale=3)
    last = [0, 3, 5, 6, 2, 6]
    mask, mask_p1 = masks(last, R)
    kl = normal(B, R) * mask  # that pads have none is the rollout's: see test_stages and test_options
    before = kl.clone()
    expected = np.zeros((B, R))
    for row, end in enumerate(last):
        for column in range(end + 1):
            expected[row, column] = -0.15 * kl[row, column].item()
        expected[row, min(end + 1, R - 1)] += scores[row].item()
    if whiten_rewards:  # the column of the score counts as well; the mean is kept
        inside = [(row, column) for row, column in np.ndindex(B, R) if column <= last[row] + 1]
        rewards = np.array([expected[place] for place in inside])
        scale = 1 / math.sqrt(rewards.var() + 1e-8)
        for place in inside:
            expected[place] = (expected[place] - rewards.mean()) * scale + rewards.mean()
    got = shape_rewards(kl, scores, mask_p1, 0.15, whiten_rewards=whiten_rewards)
    check(got, expected)
    assert torch.equal(kl, before)  # it is reported as it was


def test_reward_of_equal_policies_is_only_the_score():
    _, mask_p1 = masks([0, 4, 2], 5)
    rewards = shape_rewards(torch.zeros(3, 5), t([2.0, 3.0, 4.0]), mask_p1, 0.05)
    assert rewards.tolist() == [[0, 2, 0, 0, 0], [0, 0, 0, 0, 3], [0, 0, 0, 4, 0]]


def test_response_of_one_token_gets_kl_and_score():
    rewards = shape_rewards(t([[2.0]]), t([5.0]), torch.tensor([[True]]), 0.1)
    check(rewards, [[4.8]])


# ---- gae -------------------------------------------------------------------------------------------------


def test_gae_matches_hand_example():
    rewards = t([[-0.05 * 0.4, 0.05 * 0.2, 1 - 0.05 * 0.2]])
    advantages = gae(rewards, t([[0.5, 0.6, 0.8]]), 1.0, 0.95)
    check(advantages, [[0.4510, 0.3905, 0.19]], dict(atol=5e-5, rtol=0))  # printed to four decimals


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.97, 0.0), (0.0, 0.95)])
def test_gae_matches_sum_of_discounted_errors(gamma, lam):
    """A_t = sum over l of (gamma lam)^l delta_(t+l), arXiv:1506.02438 eq. 16; past the end V is 0."""
    rewards = normal(4, 7)
    values = normal(4, 7, seed=1)
    reward = rewards.double().numpy()
    value = np.pad(values.double().numpy(), ((0, 0), (0, 1)))
    expected = np.zeros((4, 7))
    for row, start in np.ndindex(4, 7):
        for later in range(start, 7):
            error = reward[row, later] + gamma * value[row, later + 1] - value[row, later]
            expected[row, start] += (gamma * lam) ** (later - start) * error
    check(gae(rewards, values, gamma, lam), expected)


def test_gae_with_lambda_one_is_return_minus_value():
    rewards = normal(3, 6)
    values = normal(3, 6, seed=1)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    check(gae(rewards, values, 1.0, 1.0), (to_go - values).numpy())


# ---- whiten ----------------------------------------------------------------------------------------------


def test_whiten_matches_published_example():
    """Population variance and mean kept, as in OpenAI's lm-human-preferences."""
    x = t([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]])
    got = whiten(x, torch.ones(3, 3, dtype=torch.bool), shift_mean=False)
    expected = [[0.0508, 0.4381, 0.8254], [1.2127, 1.6, 1.9873], [2.3746, 2.7619, 3.1492]]
    check(got, expected, dict(atol=5e-5 + 1e-6, rtol=0))  # printed to four decimals


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_matches_loop(shift_mean):
    x = 3 + normal(5, 7, scale=2)
    mask = normal(5, 7, seed=1) > -0.3
    x[~mask] = 1e4  # outside the mask anything may stand
    inside = x[mask].double().numpy()
    expected = np.zeros((5, 7))
    for place in np.ndindex(5, 7):
        if mask[place]:
            expected[place] = (x[place].item() - inside.mean()) / math.sqrt(inside.var() + 1e-8)
            if not shift_mean:
                expected[place] += inside.mean()
    check(whiten(x, mask, shift_mean=shift_mean), expected)


def test_whiten_epsilon_is_inside_the_root():
    """Values +-1e-4 have variance 1e-8, like epsilon: the result is 1 / sqrt(2), not 1 or 1 / 2."""
    got = whiten(t([[1e-4, -1e-4, 7.0]]), torch.tensor([[True, True, False]]))
    check(got, [[math.sqrt(0.5), -math.sqrt(0.5), 0.0]])


def test_whiten_of_equal_values_is_zero():
    got = whiten(torch.full((2, 3), 2.0), torch.tensor([[True, True, False], [True, False, False]]))
    assert not got.any()


# ---- policy and value losses -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "advantage, ratio, objective, clipped",
    [(1, 1.3, 1.2, True), (1, 0.7, 0.7, False), (-1, 0.7, -0.8, True), (-1, 1.5, -1.5, False)],
)
def test_policy_loss_matches_published_clip_vectors(advantage, ratio, objective, clipped):
    """arXiv:1707.06347 eq. 7 at epsilon 0.2; d ratio / d new_logprobs = ratio."""
    new = t([[math.log(ratio)]]).requires_grad_()
    loss = policy_loss(new, t([[0.0]]), t([[float(advantage)]]), 0.2)
    check(loss, [[-objective]], PRINTED)
    loss.sum().backward()
    check(new.grad, [[0.0 if clipped else -advantage * ratio]], PRINTED)


def test_policy_loss_matches_loop_and_gradient():
    old = normal(5, 7)
    new = (old + normal(5, 7, seed=1, scale=0.4)).requires_grad_()
    advantages = normal(5, 7, seed=2)
    loss = np.zeros((5, 7))
    grad = np.zeros((5, 7))
    for place in np.ndindex(5, 7):
        ratio = math.exp(new[place].item() - old[place].item())
        advantage = advantages[place].item()
        if advantage > 0 and ratio > 1.2:
            loss[place] = -advantage * 1.2
        elif advantage < 0 and ratio < 0.8:
            loss[place] = -advantage * 0.8
        else:
            loss[place] = -advantage * ratio
            grad[place] = -advantage * ratio
    assert 5 < (grad == 0).sum() < 30  # both kinds are there
    got = policy_loss(new, old, advantages, 0.2)
    check(got, loss)
    got.sum().backward()
    check(new.grad, grad)


def test_what_stands_after_eos_is_no_part_of_the_policy_loss():
    """A ratio there of exp(200), which is infinite, times the weight 0 would be NaN."""
    new = torch.tensor([[-1.0, -2.0, 0.0]], requires_grad=True)
    micro = {
        "logprobs": torch.tensor([[-1.5, -2.5, -200.0]]),
        "advantages": torch.tensor([[-1.0, 0.5, 0.0]]),
        "mask": torch.tensor([[True, True, False]]),
        "weights": torch.tensor([[1.0, 1.0, 0.0]]),
    }
    loss, stats = actor_loss(Config(cliprange=0.9), clipped_surrogate, new, micro, total_weight=2.0)
    loss.backward()
    ratio = math.exp(0.5)
    assert loss.item() == pytest.approx((ratio - 0.5 * ratio) / 2)
    np.testing.assert_allclose(new.grad, [[ratio / 2, -0.25 * ratio, 0]], rtol=1e-6)
    assert stats["val/ratio_avg"].item() == pytest.approx(ratio)
    assert stats["policy/approxkl_avg"].item() == pytest.approx(0.125)


def test_policy_loss_at_ratio_one_has_the_plain_policy_gradient():
    new = normal(3, 4).requires_grad_()
    advantages = normal(3, 4, seed=1)
    policy_loss(new, new.detach().clone(), advantages, 0.2).sum().backward()
    check(new.grad, -advantages.numpy())


@pytest.mark.parametrize(
    "new, old, target, loss, gradient",
    [
        (0.1, 0.0, 1.0, 0.405, -0.9),  # inside the range: 0.9^2 / 2
        (0.5, 0.0, 1.0, 0.32, 0.0),  # moved by more than 0.2 towards the target: 0.8^2 / 2, no more pull
        (-0.5, 0.0, 1.0, 1.125, -1.5),  # moved away: the unclipped 1.5^2 / 2 is larger and pulls back
        (0.5, 0.0, 0.1, 0.08, 0.4),  # beyond the target: 0.4^2 / 2 against the clipped 0.1^2 / 2
    ],
)
def test_value_loss_matches_hand_examples(new, old, target, loss, gradient):
    new = t([[new]]).requires_grad_()
    got = value_loss(new, t([[old]]), t([[target]]), 0.2)
    check(got, [[loss]], PRINTED)
    got.sum().backward()
    check(new.grad, [[gradient]], PRINTED)


def test_value_loss_matches_loop_and_gradient():
    old = normal(5, 7)
    returns = normal(5, 7, seed=2)
    new = (old + normal(5, 7, seed=1, scale=0.4)).requires_grad_()
    loss = np.zeros((5, 7))
    grad = np.zeros((5, 7))
    for place in np.ndindex(5, 7):
        old_value = old[place].item()
        value = new[place].item()
        clipped = min(max(value, old_value - 0.2), old_value + 0.2)
        error = value - returns[place].item()
        clipped_error = clipped - returns[place].item()
        loss[place] = 0.5 * max(error**2, clipped_error**2)
        if abs(error) >= abs(clipped_error):
            grad[place] = error
    assert 5 < (grad == 0).sum() < 30
    got = value_loss(new, old, returns, 0.2)
    check(got, loss)
    got.sum().backward()
    check(new.grad, grad)


# ---- KL controllers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kl, value", [(12, 0.151536), (6.3, 0.150384), (6, 0.15), (3, 0.148464), (0, 0.148464)]
)
def test_adaptive_controller_matches_published_numbers(kl, value):
    controller = AdaptiveKLController(0.15, 6, 10000)
    assert controller.value == 0.15
    controller.update(kl, 512)
    assert controller.value == pytest.approx(value, abs=1e-9)


def test_adaptive_controller_accumulates():
    controller = AdaptiveKLController(0.15, 6.0, 10000)
    value = 0.15
    for kl in [12.0, 5.0, 6.5, 0.1, 30.0]:
        controller.update(kl, 256)
        value *= 1 + min(max(kl / 6 - 1, -0.2), 0.2) * 256 / 10000
    assert controller.value == pytest.approx(value, rel=1e-9)


def test_adaptive_controller_keeps_its_sign_with_a_short_horizon():
    controller = AdaptiveKLController(0.05, 3, 2)
    controller.update(0.0, 16)  # 1 - 0.2 * 16 / 2 is -0.6
    assert controller.value == pytest.approx(0.005, rel=1e-9)


def test_fixed_controller_stays():
    controller = FixedKLController(0.05)
    controller.update(100.0, 512)
    assert controller.value == 0.05


# ---- preferences -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [1.0, 0.5, 0.3])
def test_preference_loss_matches_loop_and_gradient(target):
    chosen = normal(9, scale=3).requires_grad_()
    rejected = normal(9, seed=1, scale=3)
    margins = (chosen - rejected).tolist()
    loss = preference_loss(chosen, rejected, target=target)
    check(loss, [-target * log_sigmoid(x) - (1 - target) * log_sigmoid(-x) for x in margins])
    loss.sum().backward()
    check(chosen.grad, [1 / (1 + math.exp(-x)) - target for x in margins])


@pytest.mark.parametrize(
    "target, difference, loss",
    # log 2 at no difference, whatever the target; log(1 + e^-1) = 0.313262; softplus(1) = 1.313262
    [
        (1.0, 0.0, 0.693147), (0.3, 0.0, 0.693147), (1.0, 1.0, 0.313262), (0.5, 1.0, 0.813262),
        (0.3, 1.0, 0.3 * 0.313262 + 0.7 * 1.313262), (0.0, 1.0, 1.313262), (1.0, 2.0, 0.126928),
    ],
)
def test_preference_loss_matches_hand_numbers(target, difference, loss):
    check(preference_loss(t([difference + 3]), t([3.0]), target), [loss], PRINTED)


def test_preference_loss_defaults_to_the_hard_label():
    chosen = normal(4)
    rejected = normal(4, seed=1)
    assert torch.equal(preference_loss(chosen, rejected), preference_loss(chosen, rejected, 1.0))


def test_preference_loss_takes_one_target_per_pair():
    chosen = normal(3)
    rejected = normal(3, seed=1)
    targets = [1.0, 0.5, 0.3]
    one_by_one = []
    for row, target in enumerate(targets):
        one = slice(row, row + 1)
        one_by_one.append(preference_loss(chosen[one], rejected[one], target)[0])
    check(preference_loss(chosen, rejected, t(targets)), torch.stack(one_by_one).numpy())


def test_preference_loss_is_finite_at_extreme_rewards():
    check(preference_loss(t([-1000.0, 1000.0]), t([0.0, 0.0])), [1000.0, 0.0])
    check(preference_loss(t([-1000.0, 1000.0]), t([0.0, 0.0]), 0.5), [500.0, 500.0])


def test_ranking_loss_matches_published_number():
    check(ranking_loss(t([[2.0, 1.0, 0.0]])), [0.251150], PRINTED)


@pytest.mark.parametrize("k", [2, 4, 9])
def test_ranking_loss_matches_loop(k):
    rewards = normal(5, k, scale=2)
    expected = []
    for row in rewards.tolist():
        losses = [-log_sigmoid(row[i] - row[j]) for i in range(k) for j in range(i + 1, k)]
        expected.append(sum(losses) / len(losses))
    check(ranking_loss(rewards), expected)


def test_ranking_of_two_is_the_preference_loss():
    rewards = normal(6, 2)
    check(ranking_loss(rewards), preference_loss(rewards[:, 0], rewards[:, 1]).numpy())


# ---- DPO -------------------------------------------------------------------------------------------------

# c = 1, r = -0.5, beta = 0.1
DPO_TABLE = [
    ("sigmoid", 0.0, 0.620957), ("sigmoid", 0.1, 0.635957), ("hinge", 0.0, 0.85), ("ipo", 0.0, 12.25),
]


@pytest.mark.parametrize("loss_type, smoothing, loss", DPO_TABLE)
def test_dpo_loss_matches_table(loss_type, smoothing, loss):
    losses, chosen, rejected = dpo_loss(
        t([-9.0]), t([-20.5]), t([-10.0]), t([-20.0]), 0.1, loss_type=loss_type, label_smoothing=smoothing
    )
    check(losses, [loss], PRINTED)
    check(chosen, [0.1], PRINTED)
    check(rejected, [-0.05], PRINTED)


@pytest.mark.parametrize("loss_type, smoothing", [(name, smoothing) for name, smoothing, _ in DPO_TABLE])
def test_dpo_loss_matches_loop_and_gradient(loss_type, smoothing):
    beta = 0.3
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = (normal(12, seed=seed, scale=3) for seed in range(4))
    policy_chosen.requires_grad_()
    chosen_ratio = policy_chosen - ref_chosen
    rejected_ratio = policy_rejected - ref_rejected
    losses = []
    grads = []
    for margin in (chosen_ratio - rejected_ratio).tolist():
        scaled = beta * margin
        if loss_type == "sigmoid":
            losses.append(-(1 - smoothing) * log_sigmoid(scaled) - smoothing * log_sigmoid(-scaled))
            grads.append(beta * (1 / (1 + math.exp(-scaled)) - 1 + smoothing))
        elif loss_type == "hinge":
            losses.append(max(0.0, 1 - scaled))
            grads.append(-beta if scaled < 1 else 0.0)
        else:
            losses.append((margin - 1 / (2 * beta)) ** 2)
            grads.append(2 * (margin - 1 / (2 * beta)))
    logprobs = (policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    got, chosen, rejected = dpo_loss(*logprobs, beta, loss_type=loss_type, label_smoothing=smoothing)
    check(got, losses)
    check(chosen, (beta * chosen_ratio).detach().numpy())
    check(rejected, (beta * rejected_ratio).numpy())
    got.sum().backward()
    check(policy_chosen.grad, grads)


def test_dpo_loss_starts_at_log_two():
    logps = normal(5, scale=30), normal(5, seed=1, scale=30)
    losses, chosen, rejected = dpo_loss(*logps, *logps, 0.05)
    check(losses, [math.log(2)] * 5)
    assert not chosen.any()
    assert not rejected.any()


def test_dpo_loss_refuses_an_unknown_name():
    """A misspelt loss must not silently train with another one."""
    x = normal(2)
    with pytest.raises(SystemExit, match="sigmoyd"):
        dpo_loss(x, x, x, x, 0.1, loss_type="sigmoyd")


# ---- learning rate ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "step, total, schedule, expected",
    [
        (0, 1953, "linear", 3e-6), (1, 1953, "linear", 2.99846390e-6), (1952, 1953, "linear", 1.5361e-9),
        (0, 911, "cosine", 3e-6), (1, 911, "cosine", 2.99999108e-6), (455, 911, "cosine", 1.50258638e-6),
        (910, 911, "cosine", 8.919e-12), (0, 10, "constant", 3e-6), (9, 10, "constant", 3e-6),
    ],
)
def test_learning_rate_matches_published_numbers(step, total, schedule, expected):
    digits = {1.5361e-9: 5, 8.919e-12: 4}.get(expected, 9)  # significant digits that are printed
    assert learning_rate(step, total, 3e-6, schedule) == pytest.approx(
        expected, rel=0.51 * 10.0 ** (1 - digits)
    )


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_learning_rate_warms_up_to_its_peak(schedule):
    rates = [learning_rate(step, 100, 1e-3, schedule, warmup_steps=10) for step in range(100)]
    rise = np.diff(rates[:10])
    assert (rise > 0).all()
    assert np.allclose(rise, 1e-4, atol=1e-9)  # straight, a tenth of the peak per step
    # The first update has a tenth already; the decay begins after the tenth, and is half way at update 55 of 10 to 100.
    assert (rates[0], rates[9], rates[10]) == pytest.approx((1e-4, 1e-3, 1e-3))
    assert rates[55] == pytest.approx(1e-3 if schedule == "constant" else 5e-4)
    assert max(rates) == pytest.approx(1e-3, rel=1e-3)
    assert max(rates) <= 1e-3 * (1 + 1e-12)
    assert max(rates[9], rates[10]) == max(rates)
    fall = np.diff(rates[10:])
    assert (fall == 0).all() if schedule == "constant" else (fall < 0).all()
    assert rates[-1] >= 0

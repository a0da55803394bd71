"""The mathematics of the variants, against numbers worked by hand and against enumeration."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ppo
from variants import (
    aot,
    bco,
    dpo_formulas,
    dr_grpo,
    f_dpo,
    grpo,
    importance,
    kl_estimators,
    kl_penalty,
    online_dpo,
    reference_ema,
    reinforce_pp,
    rloo,
    sequence_ratio,
    truly_ppo,
)

# Sums of a few float32 numbers of size 1: 20 operations of 6e-8 each.
EXACT = 2e-6


def tiny(*scores, lengths=None, columns=3):
    """A batch of these scores, as far as a critic-free variant reads it."""
    rows = len(scores)
    lengths = torch.tensor(lengths or [columns] * rows)
    return {
        "scores": torch.tensor(scores),
        "mask": torch.arange(columns) < lengths[:, None],
        "kl": torch.zeros(rows, columns),
    }


# ---------------------------------------------------------------------------- mathematics


@pytest.mark.parametrize(
    "ratio, advantage, surrogate",
    [(1.3, 1.0, 1.17), (1.1, 1.0, 1.1), (0.7, -1.0, -0.83), (0.9, -1.0, -0.9), (1.5, -1.0, -1.5), (0.5, 1.0, 0.5)],
)
def test_rollback_matches_numbers_by_hand(ratio, advantage, surrogate):
    """arXiv:1903.07940 with alpha 0.3 and clip 0.2; beyond the bound the slope is -alpha times the advantage."""
    ratio = torch.tensor(ratio, dtype=torch.float64, requires_grad=True)
    loss = truly_ppo.rollback_loss(ratio, torch.tensor(advantage), 0.2, 0.3)
    loss.backward()
    assert -loss.item() == pytest.approx(surrogate, abs=EXACT)
    slope = -0.3 if surrogate in (1.17, -0.83) else 1.0
    assert -ratio.grad.item() == pytest.approx(slope * advantage, abs=EXACT)


def test_rollback_without_a_slope_is_ppo():
    ratios = torch.linspace(0.5, 1.6, 12)
    for advantage in (2.0, -0.5):
        advantages = torch.full_like(ratios, advantage)
        ours = truly_ppo.rollback_loss(ratios, advantages, 0.2, 0.0)
        plain = ppo.policy_loss(ratios.log(), torch.zeros(12), advantages, 0.2)
        torch.testing.assert_close(ours, plain)


def test_grpo_scores_an_answer_against_its_group():
    """Scores 1, 2, 5, 8: unbiased deviation 3.162278; a second group of equal scores has nothing to say."""
    cfg = SimpleNamespace(group_size=4)
    batch = grpo.advantages(cfg, tiny(1.0, 2.0, 5.0, 8.0, 3.0, 3.0, 3.0, 3.0, lengths=[1, 2, 3, 3] * 2), {})
    expected = [-0.9487, -0.6325, 0.3162, 1.2649, 0, 0, 0, 0]
    np.testing.assert_allclose(batch["advantages"][:, 0], expected, atol=1e-4)
    assert (batch["advantages"] == 0).equal(~batch["mask"] | (torch.arange(8)[:, None] >= 4))
    # Every answer weighs the same, however long it is.
    torch.testing.assert_close(batch["weights"].sum(1), torch.ones(8))


def test_grpo_adds_k3_to_the_clipped_surrogate():
    cfg = SimpleNamespace(cliprange=0.2, kl_coef=0.5)
    micro = {
        "logprobs": torch.tensor([[-1.0, -2.0, -1.0]]),
        "ref_logprobs": torch.tensor([[-1.5, -1.0, 300.0]]),  # the last column is behind EOS
        "advantages": torch.tensor([[2.0, 2.0, 0.0]]),
        "mask": torch.tensor([[True, True, False]]),
    }
    loss = grpo.token_loss(cfg, torch.tensor([[-0.5, -2.0, -1.0]]), micro)
    log_ratios = np.array([-1.0, 1.0])  # reference to policy
    k3 = np.exp(log_ratios) - 1 - log_ratios
    np.testing.assert_allclose(loss[0, :2], [-2 * 1.2, -2] + 0.5 * k3, atol=EXACT)
    assert loss[0, 2] == 0


def test_rloo_takes_the_others_as_the_baseline():
    """Scores 1, 2, 5, 8; the KL of a whole answer comes off its score first."""
    cfg = rloo.Config(group_size=4, kl_coef=0.5)
    batch = tiny(1.0, 2.0, 5.0, 8.0)
    expected = torch.tensor([-4.0, -8 / 3, 4 / 3, 16 / 3])
    torch.testing.assert_close(rloo.advantages(cfg, batch, {})["advantages"], expected[:, None].expand(4, 3))
    batch["kl"][3] = 2.0  # 3 nats off the fourth score
    shifted = rloo.advantages(cfg, batch, {})["advantages"][:, 0]
    torch.testing.assert_close(shifted, torch.tensor([-3.0, -5 / 3, 7 / 3, 7 / 3]))


def test_rloo_clips_the_ratio_of_the_whole_answer():
    """Log-ratios 0.1, -0.2 and 0.4: their sum is 0.3, above the clip; what stands behind EOS does not count."""
    micro = {
        "logprobs": torch.zeros(1, 4),
        "mask": torch.tensor([[True, True, True, False]]),
        "advantages": torch.tensor([[1.0, 1.0, 1.0, 0.0]]),
    }
    new_logprobs = torch.tensor([[0.1, -0.2, 0.4, 9.0]])
    wide, narrow = (rloo.token_loss(SimpleNamespace(cliprange=c), new_logprobs, micro) for c in (0.5, 0.2))
    torch.testing.assert_close(wide, torch.tensor([[-1.349859, -1.349859, -1.349859, 0.0]]))
    torch.testing.assert_close(narrow, torch.tensor([[-1.2, -1.2, -1.2, 0.0]]))


def test_kl_penalty_estimates_the_kl_from_old_to_new():
    """Over all tokens, weighed as the old policy draws them, loss and gradient are the exact ones."""
    old = torch.tensor([0.5, -0.2, 0.1], dtype=torch.float64).log_softmax(0)
    theta = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    micro = {"logprobs": old[None], "advantages": rewards[None], "beta": torch.tensor([3.0], dtype=torch.float64)}
    loss = kl_penalty.token_loss(None, theta.log_softmax(0)[None], micro)[0]
    (gradient,) = torch.autograd.grad((old.exp() * loss).sum(), theta)

    new = theta.log_softmax(0)
    exact = -(new.exp() * rewards).sum() + 3 * (old.exp() * (old - new)).sum()
    (exact_gradient,) = torch.autograd.grad(exact, theta)
    assert (old.exp() * loss).sum().item() == pytest.approx(exact.item(), abs=1e-12)
    np.testing.assert_allclose(gradient, exact_gradient, atol=1e-12)


@pytest.mark.parametrize("n_steps, share", [(2, 1 / 8), (4, 14 / 64)])
def test_kl_penalty_follows_the_kl_that_an_update_ends_with(n_steps, share):
    """Of the KL after two equal steps these saw 0 and 1/4; of that after four 0, 1/16, 4/16 and 9/16."""
    assert kl_penalty.kl_after(share * 0.03, n_steps) == pytest.approx(0.03, rel=EXACT)
    cfg = kl_penalty.Config(n_epochs=n_steps, kl_step=0.01, beta=3.0)
    batch = {**tiny(1.0, -1.0, columns=2), "values": torch.zeros(2, 2), "mask_p1": torch.ones(2, 2, dtype=torch.bool)}
    for update_kl, beta in ((None, 3.0), (0.006, 1.5), (0.01, 3.0), (0.016, 6.0)):
        state = {"beta": 3.0, "update_kl": share * update_kl} if update_kl else {}
        assert kl_penalty.advantages(cfg, batch, state)["beta"].tolist() == [beta] * 2
        assert state["beta"] == beta


def test_kl_penalty_halves_and_doubles():
    """arXiv:1707.06347 section 4: halved below the target / 1.5, doubled above 1.5 times it."""
    cases = {0.0066: 0.5, 0.0067: 1.0, 0.0149: 1.0, 0.0151: 2.0}
    for kl, beta in cases.items():
        assert kl_penalty.adapt(1.0, kl, 0.01) == beta


@pytest.mark.parametrize(
    "form, ratio, advantage, surrogate, slope",
    [
        # KL of one token, by k3: 1.3 - 1 - log 1.3 = 0.0376 and 0.7 - 1 - log 0.7 = 0.0567, both beyond delta
        ("trust_region", 1.3, 1.0, 1.3, 0.0),
        ("trust_region", 0.7, -1.0, -0.7, 0.0),
        ("trust_region_rollback", 1.3, 2.0, 2.6, -0.05 * 2),
        ("truly", 1.3, 1.0, 1.3 - 5 * 0.0376357, 1 - 5 * (1 - 1 / 1.3)),
        # the surrogate has not grown: it goes back to where it was
        ("trust_region", 0.7, 1.0, 0.7, 1.0),
        ("truly", 1.3, -1.0, -1.3, -1.0),
        # 1.1 - 1 - log 1.1 = 0.0047 is within delta
        ("trust_region", 1.1, 1.0, 1.1, 1.0),
        ("trust_region_rollback", 1.1, 1.0, 1.1, 1.0),
        ("truly", 1.1, 1.0, 1.1, 1.0),
    ],
)
def test_trust_region_matches_numbers_by_hand(form, ratio, advantage, surrogate, slope):
    """arXiv:1903.07940; the slope is that in the ratio."""
    cfg = truly_ppo.Config(form=form, delta=0.025, alpha=0.05)
    ratio = torch.tensor([[ratio]], dtype=torch.float64, requires_grad=True)
    micro = {"logprobs": torch.zeros(1, 1, dtype=torch.float64), "advantages": torch.tensor([[advantage]])}
    loss = truly_ppo.token_loss(cfg, ratio.log(), micro)
    loss.sum().backward()
    assert -loss.item() == pytest.approx(surrogate, abs=EXACT)
    assert -ratio.grad.item() == pytest.approx(slope, abs=EXACT)


def test_truly_ppo_default_is_the_rollback():
    micro = {"logprobs": torch.zeros(1, 2), "advantages": torch.tensor([[1.0, -1.0]])}
    loss = truly_ppo.token_loss(truly_ppo.Config(), torch.tensor([[1.3, 0.7]]).log(), micro)
    torch.testing.assert_close(loss, torch.tensor([[-1.17, 0.83]]))


def losses_of_an_update(micro, losses):
    """What ppo.py makes of token losses: their mean by weights over the minibatch."""
    weights = micro["weights"] / micro["weights"].sum()
    return (losses * weights).sum().item()


def test_dr_grpo_divides_by_a_constant():
    """Token losses [[1, 2, -], [3, 4, 5]]: per row 2.75, per token 3.0, by the constant 3 it is (1 + 2 + 12) / 6."""
    cfg = dr_grpo.Config(group_size=2, response_length=3, kl_coef=0.0)
    batch = dr_grpo.advantages(cfg, tiny(1.0, 5.0, lengths=[2, 3]), {})
    assert batch["advantages"].tolist() == [[-2, -2, 0], [2, 2, 2]]
    losses = torch.tensor([[1.0, 2, 0], [3, 4, 5]])
    assert losses_of_an_update(batch, batch["share"][:, None] * losses) == pytest.approx(2.5, abs=EXACT)
    assert losses_of_an_update(batch, losses) == pytest.approx(2.75, abs=EXACT)
    # with the ratio 1 a token's loss is minus its advantage
    batch["logprobs"] = torch.zeros(2, 3)
    batch["ref_logprobs"] = torch.zeros(2, 3)
    losses = dr_grpo.token_loss(cfg, torch.zeros(2, 3), batch)
    assert losses_of_an_update(batch, losses) == pytest.approx((2 * 2 - 2 * 3) / 6, abs=EXACT)


def test_dr_grpo_keeps_the_penalty_of_grpo():
    cfg = dr_grpo.Config(group_size=2, response_length=4, kl_coef=0.5)
    micro = {
        "logprobs": torch.full((1, 2), -1.0),
        "ref_logprobs": torch.full((1, 2), -2.0),
        "advantages": torch.zeros(1, 2),
        "mask": torch.ones(1, 2, dtype=torch.bool),
        "share": torch.tensor([0.5]),
    }
    k3 = np.exp(-1) - 1 + 1
    loss = dr_grpo.token_loss(cfg, micro["logprobs"], micro)
    np.testing.assert_allclose(loss, np.full((1, 2), 0.5 * 0.5 * k3), atol=EXACT)


def test_reinforce_pp_pays_all_that_comes_after():
    """Two answers; penalty 0.5 per nat, scores 2 and -1 paid after EOS: sums to the end, whitened over six tokens."""
    cfg = reinforce_pp.Config(kl_coef=0.5)
    batch = tiny(2.0, -1.0, lengths=[2, 3], columns=4)
    batch["mask_p1"] = torch.arange(4) <= torch.tensor([[2], [3]])
    batch["kl"] = torch.tensor([[0.2, 0.4, 0, 0], [0.6, 0, -0.2, 0]])
    got = reinforce_pp.advantages(cfg, batch, {})["advantages"]
    to_the_end = np.array([1.7, 1.8, -1.2, -0.9, -0.9])
    expected = (to_the_end - to_the_end.mean()) / to_the_end.std()
    np.testing.assert_allclose(got[batch["mask"]], expected, atol=EXACT)
    assert not got[~batch["mask"]].any()


@pytest.mark.parametrize("ratio_of, expected", [("sequence", [1.10517] * 3), ("token", [1.105171, 0.818731, 1.491825])])
def test_gspo_takes_the_mean_log_ratio(ratio_of, expected):
    """Log-ratios 0.1, -0.2 and 0.4: their mean is 0.1 (their product would be 1.34986); behind EOS nothing counts."""
    cfg = sequence_ratio.Config(ratio_of=ratio_of, clip_low=9.0, clip_high=9.0, kl_coef=0.0)
    micro = {
        "logprobs": torch.zeros(1, 4),
        "ref_logprobs": torch.zeros(1, 4),
        "mask": torch.tensor([[True, True, True, False]]),
        "advantages": torch.tensor([[1.0, 1.0, 1.0, 0.0]]),
    }
    loss = sequence_ratio.token_loss(cfg, torch.tensor([[0.1, -0.2, 0.4, 9.0]]), micro)
    np.testing.assert_allclose(loss, [[*(-x for x in expected), 0]], atol=5e-6)


def test_clip_higher_bounds_the_two_sides_apart():
    """DAPO's 0.2 below and 0.28 above; with a negative advantage the upper bound does not hold."""
    cfg = sequence_ratio.Config(ratio_of="token", clip_low=0.2, clip_high=0.28, kl_coef=0.0)
    micro = {
        "logprobs": torch.zeros(1, 4),
        "ref_logprobs": torch.zeros(1, 4),
        "mask": torch.ones(1, 4, dtype=torch.bool),
        "advantages": torch.tensor([[1.0, 1.0, -1.0, -1.0]]),
    }
    ratios = torch.tensor([[1.27, 1.5, 0.5, 1.5]])
    loss = sequence_ratio.token_loss(cfg, ratios.log(), micro)
    np.testing.assert_allclose(loss, [[-1.27, -1.28, 0.8, 1.5]], atol=EXACT)


def test_importance_weights_by_hand():
    """w = 0.25, 0.6, 1, 3 with 2 at most: cut off at 2; or left out below 1/2 and above 2."""
    gap = torch.tensor([0.25, 0.6, 1.0, 3.0]).log()
    truncated = importance.importance_weights(gap, "truncate", 2.0)
    np.testing.assert_allclose(truncated, [0.25, 0.6, 1, 2], atol=EXACT)
    masked = importance.importance_weights(gap, "mask", 2.0)
    np.testing.assert_allclose(masked, [0, 0.6, 1, 0], atol=EXACT)


def test_importance_weights_undo_another_sampler():
    """Tokens drawn from q, weighed p / q: the policy gradient is that of p, by enumeration of four tokens."""
    q = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    theta = torch.tensor([0.1, -0.3, 0.4, 0.2], dtype=torch.float64, requires_grad=True)
    worth = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    p = theta.log_softmax(0)
    weights = importance.importance_weights(p.detach() - q.log(), "truncate", 100.0)
    micro = {"logprobs": p.detach(), "advantages": worth * weights}
    losses = ppo.policy_loss(p, micro["logprobs"], micro["advantages"], 0.2)
    (gradient,) = torch.autograd.grad((q * losses).sum(), theta, retain_graph=True)
    (exact,) = torch.autograd.grad(-(p.exp() * worth).sum(), theta)
    np.testing.assert_allclose(gradient, exact, atol=1e-12)


def test_a_sync_moves_the_reference_by_its_share():
    """From 0 to a policy of 1 with 0.6: 0.6, then 0.84."""
    reference, policy = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    for parameter, value in [*((p, 0.0) for p in reference.parameters()), *((p, 1.0) for p in policy.parameters())]:
        torch.nn.init.constant_(parameter, value)
    reference_ema.move(reference, policy, 0.6)
    assert all((p == torch.tensor(0.6)).all() for p in reference.parameters())
    reference_ema.move(reference, policy, 0.6)
    assert reference.bias.item() == pytest.approx(0.84, abs=EXACT) and policy.bias.item() == 1.0


def test_online_dpo_has_the_gradient_of_dpo():
    """Three pairs (the second a tie), answers of unlike lengths: loss and gradient against dpo_loss's own."""
    lengths = [3, 1, 2, 2, 1, 3]
    generator = torch.Generator().manual_seed(0)
    logprobs = -torch.rand(6, 3, generator=generator, dtype=torch.float64)
    reference = -torch.rand(6, 3, generator=generator, dtype=torch.float64)
    batch = tiny(2.0, -1.0, 0.5, 0.5, 0.0, 3.0, lengths=lengths)
    mask = batch["mask"]
    batch["kl"] = (logprobs - reference) * mask
    cfg = online_dpo.Config(beta=0.7)
    micro = {**online_dpo.advantages(cfg, batch, {})}
    new_logprobs = logprobs.clone().requires_grad_()
    losses = online_dpo.token_loss(cfg, new_logprobs, micro)
    weights = micro["weights"] / micro["weights"].sum()
    loss = (losses * weights).sum()
    (gradient,) = torch.autograd.grad(loss, new_logprobs)

    twin = logprobs.clone().requires_grad_()
    ratios = ((twin - reference) * mask).sum(1)
    margins = 0.7 * torch.stack((ratios[0] - ratios[1], ratios[2] - ratios[3], ratios[5] - ratios[4]))
    halves = torch.nn.functional.softplus(-margins), torch.nn.functional.softplus(margins)
    right, wrong = halves
    exact = (right[0] + 0.5 * right[1] + 0.5 * wrong[1] + right[2]) / 3
    (exact_gradient,) = torch.autograd.grad(exact, twin)
    assert loss.item() == pytest.approx(exact.item(), abs=EXACT)
    np.testing.assert_allclose(gradient, exact_gradient, atol=EXACT)


def aot_loss(cfg, logprobs, ref_logprobs, chunks):
    """Loss and gradient of a whole batch that goes through in these micro-batches."""
    logprobs = logprobs.clone().requires_grad_()
    above, below = aot.sides(cfg, logprobs.detach(), ref_logprobs)
    columns = {"ref_logprobs": ref_logprobs, "below": aot.of_equal_rank(above, below)}
    columns["above"] = aot.of_equal_rank(below, above)
    total = 0.0
    for indices in chunks:
        micro = {name: column[indices] for name, column in columns.items()}
        losses, _ = aot.pair_loss(cfg, logprobs[indices], micro)
        total = total + losses.sum() / len(logprobs)
    (gradient,) = torch.autograd.grad(total, logprobs)
    return total.item(), gradient


@pytest.mark.parametrize("loss_type", ["aot", "aot_unpaired"])
def test_aot_sorts_the_whole_batch(loss_type):
    """The loss of sorted values and its gradient, written as one graph; and in micro-batches of two."""
    cfg = aot.Config(loss_type=loss_type, beta=0.3, label_smoothing=0.1)
    logprobs = 3 * torch.randn(6, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ref_logprobs = 3 * torch.randn(6, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    twin = logprobs.clone().requires_grad_()
    if loss_type == "aot":
        above = (twin[:, 0] - twin[:, 1]).sort().values
        below = (ref_logprobs[:, 0] - ref_logprobs[:, 1]).sort().values
    else:
        above = (twin - ref_logprobs)[:, 0].sort().values
        below = (twin - ref_logprobs)[:, 1].sort().values
    softplus = torch.nn.functional.softplus
    exact = (0.9 * softplus(0.3 * (below - above)) + 0.1 * softplus(0.3 * (above - below))).mean()
    (exact_gradient,) = torch.autograd.grad(exact, twin)
    for chunks in ([[0, 1, 2, 3, 4, 5]], [[4, 0], [2, 5], [1, 3]]):
        value, gradient = aot_loss(cfg, logprobs, ref_logprobs, chunks)
        assert value == pytest.approx(exact.item(), abs=1e-12)
        np.testing.assert_allclose(gradient, exact_gradient, atol=1e-12)


@pytest.mark.parametrize(
    "divergence, rewards, loss",
    [
        ("reverse_kl", [0.1, -0.05], 0.620957),
        ("forward_kl", [0.0632121, -0.0648721], 0.631154),
        ("js", [0.0379885, -0.0280930], 0.660652),
        ("alpha", [0.0786939, -0.0568051], 0.627691),
    ],
)
def test_f_dpo_matches_numbers_by_hand(divergence, rewards, loss):
    """Log-ratios 1 and -0.5 at beta 0.1; alpha is 1/2."""
    cfg = f_dpo.Config(divergence=divergence, beta=0.1)
    micro = {"ref_logprobs": torch.tensor([[-3.0, -4.0]]), "smoothing": torch.zeros(1)}
    losses, got = f_dpo.pair_loss(cfg, torch.tensor([[-2.0, -4.5]]), micro)
    np.testing.assert_allclose(got, [rewards], atol=EXACT)
    assert losses.item() == pytest.approx(loss, abs=EXACT)


@pytest.mark.parametrize(
    "loss_weights, expected",
    [
        ("0,1", 0.744397 + 0.575939),  # log(1 + e ** 0.1) + log(1 + e ** -0.25)
        ("1,0", 0.620957),  # of a margin of 0.15, whatever the threshold
        ("0.8,0.2", 0.8 * 0.620957 + 0.2 * 1.320336),
    ],
)
def test_bco_threshold_matches_numbers_by_hand_and_moves_no_loss_of_a_margin(loss_weights, expected):
    """Log-ratios 1 and -0.5 at beta 0.1, threshold 0.2."""
    cfg = bco.Config(loss_type="sigmoid,bco_pair", loss_weights=loss_weights, beta=0.1)
    micro = {"ref_logprobs": torch.tensor([[-3.0, -4.0]]), "smoothing": torch.zeros(1)}
    micro["shift"] = torch.tensor([[0.2]])
    losses, rewards = bco.pair_loss(cfg, torch.tensor([[-2.0, -4.5]]), micro)
    assert losses.item() == pytest.approx(expected, abs=EXACT)
    np.testing.assert_allclose(rewards, [[0.1, -0.05]], atol=EXACT)


def test_bco_threshold_leaves_out_what_is_no_number():
    state = {}
    assert [bco.mean_so_far(state, mean) for mean in (np.nan, 1.0, np.nan, 3.0)] == [0.0, 1.0, 1.0, 2.0]


def test_alpha_near_one_is_the_reverse_kl_and_nothing_overflows():
    log_u = torch.tensor([-200.0, -3.0, 0.0, 2.0], requires_grad=True)
    near = f_dpo.score(log_u, "alpha", 1 - 1e-6)
    np.testing.assert_allclose(near.detach(), log_u.detach(), rtol=2e-4)
    for divergence in ("forward_kl", "js", "alpha"):
        got = f_dpo.score(log_u, divergence, 0.5)
        (gradient,) = torch.autograd.grad(got.sum(), log_u)
        assert got.isfinite().all() and gradient.isfinite().all() and got[2] == 0


def divergence_of(name, p, q):
    u = p / q
    if name == "reverse_kl":
        return (p * u.log()).sum()
    if name == "forward_kl":
        return -(q * u.log()).sum()
    if name == "js":
        middle = (p + q) / 2
        return (p * (p / middle).log()).sum() + (q * (q / middle).log()).sum()
    return (q * u**0.5).sum() / (0.5 * -0.5)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js", "alpha"])
def test_f_dpo_rewards_are_those_of_the_best_policy(divergence):
    """Of three answers: if they are worth its implicit rewards, a policy p is where E r - beta D(p, q) is largest."""
    q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    logits = torch.tensor([-0.4, 0.9, 0.3], dtype=torch.float64, requires_grad=True)
    p = logits.softmax(0)
    worth = 0.7 * f_dpo.score(p.log() - q.log(), divergence, 0.5).detach()
    objective = (p * worth).sum() - 0.7 * divergence_of(divergence, p, q)
    (gradient,) = torch.autograd.grad(objective, logits, retain_graph=True)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-12)

    (of_worth,) = torch.autograd.grad((p * worth).sum(), logits)
    assert of_worth.abs().max() > 0.01  # so that it was the divergence that held it back


def test_discopop_pushes_a_margin_of_zero_down():
    """Its slope there is (1 - log 2) / (4 tau) - 3/4, with tau 0.05; its minimum at -0.12, its maximum at 0.07."""
    margin = torch.tensor([0.0, -0.13, -0.11, 0.06, 0.08, 0.5], dtype=torch.float64, requires_grad=True)
    loss = dpo_formulas.discopop(margin, torch.zeros(6, dtype=torch.float64), 0.0, 0.1)
    (slope,) = torch.autograd.grad(loss.sum(), margin)
    assert slope[0].item() == pytest.approx((1 - np.log(2)) / 0.2 - 0.75, abs=1e-12)
    assert (slope > 0).tolist() == [True, False, True, True, False, False]


def test_soft_labels_weigh_both_orders():
    """p = 0.7 of a margin of 1.5 at beta 0.1: -(0.7 log sigmoid(0.15) + 0.3 log sigmoid(-0.15))."""
    loss = dpo_formulas.sigmoid(torch.tensor(0.1), torch.tensor(-0.05), torch.tensor(0.3), 0.1)
    assert loss.item() == pytest.approx(0.7 * 0.620957 + 0.3 * 0.770957, abs=EXACT)


@pytest.mark.parametrize(
    "log_ratio, k1, k2, k3",
    [
        (1.0, 1.0, 0.5, 0.367879),
        (0.1, 0.1, 0.005, 0.0048374),
        (-0.1, -0.1, 0.005, 0.0051709),
        (-1.0, -1.0, 0.5, 0.718282),
    ],
)
def test_kl_estimators_of_one_token(log_ratio, k1, k2, k3):
    """log p - log p_ref of a token; to the six digits, or seven places, that the numbers have."""
    for kind, expected in dict(k1=k1, k2=k2, k3=k3).items():
        got = kl_estimators.estimate(torch.tensor(log_ratio, dtype=torch.float64), kind)
        assert got.item() == pytest.approx(expected, abs=5e-7 if abs(log_ratio) == 1 else 5e-8)


@pytest.mark.parametrize("beta, share", [(0.5, 0.8808), (1.0, 0.7311), (2.0, 0.6225)])
def test_the_optimal_policy_has_no_gradient_left(beta, share):
    """Rewards 1 and 0, a reference of one half each: the best policy is p_ref exp(r / beta), and PPO, with the penalty
    in the reward, stays there; by enumeration of the two responses of one token, and only there."""

    def gradient(first):
        p = torch.tensor([first, 1 - first], dtype=torch.float64)
        theta = p.log().requires_grad_()
        logprobs = theta.log_softmax(0)
        old = logprobs.detach()[:, None]
        kl = old - torch.tensor([[0.5], [0.5]], dtype=torch.float64).log()
        scores = torch.tensor([1.0, 0.0], dtype=torch.float64)
        mask = torch.ones(2, 1, dtype=torch.bool)
        rewards = ppo.shape_rewards(kl, scores, mask, beta)
        worth = ppo.gae(rewards, torch.zeros_like(rewards), 1.0, 0.95)
        losses = ppo.policy_loss(logprobs[:, None], old, worth, 0.2)
        return torch.autograd.grad((p[:, None] * losses).sum(), theta)[0]

    best = 1 / (1 + np.exp(-1 / beta))
    assert best == pytest.approx(share, abs=5e-5)
    np.testing.assert_allclose(gradient(best), 0, atol=1e-15)
    # descent raises the first response's probability where it is too small, and lowers it where it is too large
    assert gradient(best - 0.1)[0] < -1e-3 and gradient(best + 0.05)[0] > 1e-3

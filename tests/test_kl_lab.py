"""The gradients of the KL penalty's estimators, exact: all answers of a tiny policy are rows, by their probability.

The code under test is that of a run: variants/kl_estimators.py through ppo.advantages and ppo.actor_loss, in float64.
"""

import itertools

import numpy as np
import pytest
import torch

import ppo
from variants import kl_estimators

pytest.importorskip("matplotlib")
from lab import kl, report  # noqa: E402

# A policy of three answers by its logits, and the probabilities of a reference.
LOGITS = [0.5, -0.2, 0.1]
REF = [0.2, 0.5, 0.3]
# Worked by hand: p = (.461488, .229168, .309344); the gradient of KL(p || ref) is p (log p/ref - KL).
REVERSE = [0.285923, -0.228417, -0.057506]
FORWARD = [0.261488, -0.270832, 0.009344]  # p - ref


def gradient(estimator, where):
    logits = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    reference = torch.tensor(REF, dtype=torch.float64).log()
    cfg = kl.exact_config(estimator, where, beta=1.0)
    return kl.exact_gradient(cfg, logits, reference, torch.zeros(3, dtype=torch.float64)).tolist()


# ---------------------------------------------------------------------------- one token


@pytest.mark.parametrize(
    "estimator, where, expected, digits",
    [
        ("k1", "reward", REVERSE, 6),
        ("k1", "loss", [0.0, 0.0, 0.0], 15),
        ("k2", "loss", REVERSE, 6),
        ("k3", "loss", FORWARD, 6),
        ("k3", "reward", [0.0244, 0.0424, -0.0669], 4),
        ("k1", "weighted_loss", REVERSE, 6),
        ("k3", "weighted_loss", REVERSE, 6),
    ],
)
def test_gradient_matches_numbers_by_hand(estimator, where, expected, digits):
    assert gradient(estimator, where) == pytest.approx(expected, abs=0.51 * 10**-digits)


def test_gradients_are_those_of_the_two_divergences():
    """By numpy and differences of the divergences themselves, in place of autograd."""
    ref = np.array(REF)

    def policy(logits):
        weights = np.exp(logits)
        return weights / weights.sum()

    def reverse(logits):
        p = policy(logits)
        return (p * np.log(p / ref)).sum()

    def forward(logits):
        return (ref * np.log(ref / policy(logits))).sum()

    def slope(function):
        steps = 1e-6 * np.eye(3)
        return [(function(LOGITS + step) - function(LOGITS - step)) / 2e-6 for step in steps]

    assert slope(reverse) == pytest.approx(REVERSE, abs=6e-7)
    assert slope(forward) == pytest.approx(FORWARD, abs=6e-7)
    assert gradient("k1", "reward") == pytest.approx(slope(reverse), abs=1e-9)
    assert gradient("k2", "loss") == pytest.approx(slope(reverse), abs=1e-9)
    assert gradient("k3", "loss") == pytest.approx(slope(forward), abs=1e-9)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_all_but_k2_have_the_right_mean(kind):
    """The value is one thing, its gradient another: k1 and k3 are unbiased, and k2 is not."""
    p = torch.tensor(LOGITS, dtype=torch.float64).softmax(0)
    ref = torch.tensor(REF, dtype=torch.float64)
    ratio = (p / ref).log()
    mean = (p * kl_estimators.estimate(ratio, kind)).sum().item()
    true = (p * ratio).sum().item()
    assert (abs(mean - true) < 1e-12) == (kind != "k2")


def test_k3_near_zero_keeps_its_digits():
    """exp(-d) - 1 + d is d^2 / 2 there, which a difference of numbers near 1 would lose."""
    for ratio in (1e-7, -1e-7):
        found = kl_estimators.estimate(torch.tensor(ratio, dtype=torch.float64), "k3").item()
        assert found == pytest.approx(5e-15, rel=1e-6)


def test_k1_in_the_loss_pushes_away_from_the_policy_that_sampled():
    """After a step the samples are an older policy's, and the mean of its log p' is no constant: lowering it is to
    leave that policy. The gradient is p - p', whatever the reference is.
    """
    old = torch.tensor(LOGITS, dtype=torch.float64).log_softmax(0)[:, None]
    logits = torch.tensor([0.7, -0.4, 0.1], dtype=torch.float64, requires_grad=True)
    cfg = kl.exact_config("k1", "loss", beta=1.0)
    for ref in (REF, [0.6, 0.3, 0.1]):
        micro = {"logprobs": old, "ref_logprobs": torch.tensor(ref, dtype=torch.float64).log()[:, None]}
        micro.update(advantages=torch.zeros_like(old), mask=old < 0, weights=old.exp())
        loss, _ = ppo.actor_loss(cfg, kl_estimators.token_loss, logits.log_softmax(0)[:, None], micro, 1.0)
        (found,) = torch.autograd.grad(loss, logits)
        away = (old.exp()[:, 0] - logits.detach().softmax(0)).tolist()
        assert found.tolist() == pytest.approx(away, abs=1e-12)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_a_weighted_penalty_has_the_right_gradient_after_a_step_too(kind):
    """The samples are an older policy's; times p / p_old their mean is the KL of the new one, and so is its slope."""
    old = torch.tensor(LOGITS, dtype=torch.float64).log_softmax(0)[:, None]
    ref = torch.tensor(REF, dtype=torch.float64).log()
    logits = torch.tensor([0.7, -0.4, 0.1], dtype=torch.float64, requires_grad=True)
    new = logits.log_softmax(0)
    (expected,) = torch.autograd.grad((new.exp() * (new - ref)).sum(), logits, retain_graph=True)
    micro = {"logprobs": old, "ref_logprobs": ref[:, None], "mask": old < 0, "weights": old.exp()}
    micro["advantages"] = torch.zeros_like(old)
    for where in ("weighted_loss", "loss"):
        cfg = kl.exact_config(kind, where, beta=1.0)
        loss, _ = ppo.actor_loss(cfg, kl_estimators.token_loss, new[:, None], micro, 1.0)
        (found,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert torch.allclose(found, expected, rtol=0, atol=1e-12) == (where == "weighted_loss")


# ---------------------------------------------------------------------------- two tokens


def test_in_a_sequence_only_the_reward_pays_for_what_comes_later():
    """Two tokens of two: nine logits, all four sequences. A penalty in the reward reaches the tokens before it; in the
    loss each token has its own alone, and the gradient is no longer that of the sequence's KL.
    """
    logits = torch.tensor([[0.5, -0.2], [0.1, 0.9], [-0.7, 0.3]], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[0.2, 0.8], [0.5, 0.5], [0.9, 0.1]], dtype=torch.float64).log()
    sequences = list(itertools.product(range(2), repeat=2))

    def logprobs_of(table):
        """(4, 2): row 0 of the table is of the first token, row 1 + a of the second after the first token a."""
        return torch.stack([torch.stack([table[0, a], table[1 + a, b]]) for a, b in sequences])

    logprobs = logprobs_of(logits.log_softmax(1))
    ref_logprobs = logprobs_of(reference)
    probability = logprobs.sum(1).exp()
    true = (probability * (logprobs - ref_logprobs).sum(1)).sum()
    (expected,) = torch.autograd.grad(true, logits, retain_graph=True)

    def found(estimator, where):
        cfg = kl_estimators.Config(
            kl_estimator=estimator, kl_in=where, kl_coef=1.0, whiten_advantages=False, gamma=1.0, lam=1.0
        )
        old = logprobs.detach()
        everywhere = torch.ones_like(old, dtype=torch.bool)
        batch = {"logprobs": old, "ref_logprobs": ref_logprobs, "kl": old - ref_logprobs, "values": 0 * old}
        batch.update(scores=torch.zeros(4, dtype=torch.float64), mask=everywhere, mask_p1=everywhere)
        batch = kl_estimators.advantages(cfg, batch, {})
        batch["weights"] = probability.detach()[:, None].expand(4, 2)
        loss, _ = ppo.actor_loss(cfg, kl_estimators.token_loss, logprobs, batch, 1.0)
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    torch.testing.assert_close(found("k1", "reward"), expected)
    in_loss = found("k2", "loss")
    torch.testing.assert_close(in_loss[1:], expected[1:])  # the last token has nothing after it
    assert (in_loss[0] - expected[0]).abs().max() > 0.01


# ---------------------------------------------------------------------------- where descent ends


@pytest.mark.parametrize(
    "estimator, where, best", [("k1", "reward", 0), ("k2", "loss", 0), ("k3", "loss", 1), ("k1", "loss", None)]
)
def test_descent_ends_where_its_divergence_says(estimator, where, best):
    """p ~ ref exp(score / beta) is the best with KL(p || ref); with k1 in the loss the best answer takes all."""
    path = kl.path(kl.exact_config(estimator, where, kl.WEIGHT), kl.REF.log(), kl.REF.log(), kl.SCORES)
    torch.testing.assert_close(path[0], kl.REF)
    ends = kl.best_policies(kl.REF, kl.SCORES, kl.WEIGHT)
    reverse = (kl.REF * (kl.SCORES / kl.WEIGHT).exp()).double()
    torch.testing.assert_close(ends[0], reverse / reverse.sum())
    if best is None:
        assert path[-1][0] > 0.98
    else:
        torch.testing.assert_close(path[-1], ends[best], rtol=0, atol=1e-3)
        assert (path[-1] - ends[1 - best]).abs().max() > 0.02


# ---------------------------------------------------------------------------- what is published


def test_published_tables_are_those_of_the_published_results():
    rows = report.read(report.ROOT / "lab" / "kl.jsonl")
    page = (report.ROOT / "lab" / "kl.md").read_text(encoding="utf-8")
    for _, table, _ in kl.PARTS.values():
        assert report.markdown(table(rows)) in page

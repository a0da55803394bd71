"""The penalty on KL(policy || reference) by each of its estimators, in the reward or in the loss.

    python -m variants.kl_estimators config/toy_ppo.py --kl_estimator=k3 --kl_in=loss --out_dir=out/toy/k3_in_loss
    torchrun --nproc_per_node=8 -m variants.kl_estimators config/ppo_1b.py --kl_estimator=k2 --kl_in=loss

Of tokens that the policy drew, with d = log p - log p_ref: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d
(http://joschu.net/blog/kl-approx.html). A good estimate of the KL need not have the KL's gradient. These do: k1 in the
reward, which is PPO's, and k2 in the loss. k1 in the loss has none at all in the mean, k3 in the loss that of the
forward KL(reference || policy), and k3 in the reward that of neither (arXiv:2510.01555, 2512.21852). In the loss, times
the ratio p / p_old, k1 and k3 have it too, at every step (arXiv:2512.02556; weighted_loss). lab/kl.md shows what comes
of each.

Whitening divides what is paid, with a penalty in the reward, and leaves one in the loss as it is: kl_coef weighs
differently there.
"""

from dataclasses import dataclass
from typing import Literal

import torch

import ppo
from configurator import configure, require


@dataclass
class Config(ppo.Config):
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    kl_in: Literal["reward", "loss", "weighted_loss"] = "reward"  # weighted: times the ratio, and through it


def estimate(log_ratio, kind):
    """Each token's part of KL(policy || reference), from log p - log p_ref of tokens that the policy drew."""
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * log_ratio**2
    return torch.expm1(-log_ratio) + log_ratio


def advantages(cfg, batch, state):
    """ppo.advantages of the penalty as it is paid; what is logged (kl, non_score_reward) stays that of k1."""
    penalty = estimate(batch["kl"], cfg.kl_estimator)
    if cfg.kl_in != "reward":
        penalty = torch.zeros_like(penalty)
    new = ppo.advantages(cfg, {**batch, "kl": penalty}, state)
    if cfg.kl_in != "reward":
        del state["kl_coef"]  # it is that of a penalty in the reward
    return {**new, "kl": batch["kl"]}


def token_loss(cfg, new_logprobs, micro):
    loss = ppo.clipped_surrogate(cfg, new_logprobs, micro)
    if cfg.kl_in == "reward":
        return loss
    log_ratio = (new_logprobs - micro["ref_logprobs"]) * micro["mask"]
    penalty = estimate(log_ratio, cfg.kl_estimator)
    if cfg.kl_in == "weighted_loss":
        penalty = penalty * torch.exp(new_logprobs - micro["logprobs"])
    return loss + cfg.kl_coef * penalty


def main(cfg, score=None):
    in_reward = cfg.kl_in == "reward"
    misplaced = f"kl_target adapts a penalty in the reward; leave it 0 with --kl_in={cfg.kl_in}"
    require(in_reward or cfg.kl_target == 0, misplaced)
    ppo.main(cfg, score, advantages=advantages, token_loss=token_loss)


if __name__ == "__main__":
    main(configure(Config))

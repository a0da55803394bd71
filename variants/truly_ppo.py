"""Truly PPO (arXiv:1903.07940): what keeps the ratio near 1 where PPO's clip only takes the gradient away.

    python -m variants.truly_ppo config/toy_ppo.py --out_dir=out/toy/truly_ppo
    python -m variants.truly_ppo config/toy_ppo.py --form=trust_region --delta=0.025 --out_dir=out/toy/tr_ppo
    torchrun --nproc_per_node=8 -m variants.truly_ppo config/ppo_1b.py --form=truly --delta=0.03 --out_dir=out/truly_1b

The clip takes a token's gradient away once its ratio is outside; steps for other tokens can push that ratio further.
The forms, by what they look at:

    rollback               the ratio beyond the clip: the surrogate falls again, with slope -alpha (PPO-RB)
    trust_region           KL(old || new) at least delta: no gradient (TR-PPO)
    trust_region_rollback  from there on, slope -alpha (TR-PPO-RB, the paper's Truly PPO; delta 0.03, alpha 0.05)
    truly                  from there on, kl_slope times the KL off the surrogate (the authors' code; delta 0.03)

A token is held back only if its surrogate is larger than before the update, as by the outer minimum of PPO. Without
that condition training collapses.

differs: the paper's KL is over all actions; here k3 of the drawn token stands for it, which depends on the ratio alone.
So delta is a clip of the ratio with other bounds (0.025: 0.793 and 1.241), and only what follows beyond them differs.
"""

from dataclasses import dataclass
from typing import Literal

import torch

import ppo
from configurator import Positive, configure


@dataclass
class Config(ppo.Config):
    form: Literal["rollback", "trust_region", "trust_region_rollback", "truly"] = "rollback"
    alpha: float = 0.3  # slope of a rollback; 0.05 suits trust_region_rollback; 0 in `rollback`: PPO's clip
    delta: Positive = 0.025  # KL(old || new) of a token, in nats, where a trust region ends; 0.03 with its rollbacks
    kl_slope: float = 5.0  # what a nat beyond it costs, in `truly`


def token_loss(cfg, new_logprobs, micro):
    log_ratio = new_logprobs - micro["logprobs"]
    ratio = torch.exp(log_ratio)
    if cfg.form == "rollback":
        return rollback_loss(ratio, micro["advantages"], cfg.cliprange, cfg.alpha)
    kl = torch.expm1(log_ratio) - log_ratio
    return trust_region_loss(cfg, ratio, kl, micro["advantages"])


def rollback_loss(ratio, advantages, cliprange, alpha):
    """-min(ratio A, F(ratio) A), with F falling beyond the bound on the side where A pushes: (B, R)."""
    push = torch.where(advantages >= 0, 1.0, -1.0)
    bound = 1 + push * cliprange
    is_beyond = push * (ratio - bound) > 0
    turned = (1 + alpha) * bound - alpha * ratio
    rolled = torch.where(is_beyond, turned, ratio)
    return -torch.minimum(ratio * advantages, rolled * advantages)


def trust_region_loss(cfg, ratio, kl, advantages):
    """-ratio A, and something else where the KL has reached delta and the surrogate has grown: (B, R)."""
    surrogate = ratio * advantages
    held = surrogate.detach()
    if cfg.form == "trust_region":
        turned = held
    elif cfg.form == "trust_region_rollback":
        turned = (1 + cfg.alpha) * held - cfg.alpha * surrogate
    else:
        turned = surrogate - cfg.kl_slope * kl
    is_outside = (kl >= cfg.delta) & (surrogate > advantages)
    return -torch.where(is_outside, turned, surrogate)


def main(cfg, score=None):
    ppo.main(cfg, score, token_loss=token_loss)


if __name__ == "__main__":
    main(configure(Config))

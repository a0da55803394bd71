"""PPO-RB, the rollback of Truly PPO (arXiv:1903.07940): beyond the clip the loss pulls back.

    python -m variants.truly_ppo config/toy_ppo.py --out_dir=out/toy/truly_ppo
    torchrun --nproc_per_node=8 -m variants.truly_ppo config/ppo_1b.py --out_dir=out/truly_ppo_1b

PPO's clip only takes the gradient away; steps of other tokens go on pushing a ratio outwards. Here its surrogate falls
again, with slope -alpha. The outer minimum stays: without it training collapses.
"""

from dataclasses import dataclass

import torch

import ppo
from configurator import configure


@dataclass
class Config(ppo.Config):
    alpha: float = 0.3  # slope of the rollback; 0: PPO's clip


def token_loss(cfg, new_logprobs, micro):
    ratio = torch.exp(new_logprobs - micro["logprobs"])
    return rollback_loss(ratio, micro["advantages"], cfg.cliprange, cfg.alpha)


def rollback_loss(ratio, advantages, cliprange, alpha):
    """-min(ratio A, F(ratio) A), with F falling beyond the bound on the side where A pushes: (B, R)."""
    push = torch.where(advantages >= 0, 1.0, -1.0)
    bound = 1 + push * cliprange
    is_beyond = push * (ratio - bound) > 0
    turned = (1 + alpha) * bound - alpha * ratio
    rolled = torch.where(is_beyond, turned, ratio)
    return -torch.minimum(ratio * advantages, rolled * advantages)


def main(cfg, score=None):
    ppo.main(cfg, score, token_loss=token_loss)


if __name__ == "__main__":
    main(configure(Config))

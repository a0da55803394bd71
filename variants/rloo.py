"""RLOO (arXiv:2402.14740): several answers to a query, the mean of the others as the baseline; no critic.

    python -m variants.rloo config/toy_ppo.py --out_dir=out/toy/rloo
    torchrun --nproc_per_node=8 -m variants.rloo config/ppo_1b.py --out_dir=out/rloo_1b

A whole answer is one action: its reward is the score minus kl_coef times its KL, its probability the product of its
tokens'. Each of its tokens carries the answer's loss. As in the paper a batch is seen once; with more epochs or
minibatches PPO's clip bounds the ratio.
"""

from dataclasses import dataclass

import ppo
from configurator import Count, configure, require


@dataclass
class Config(ppo.Config):
    group_size: Count = 4
    n_epochs: Count = 1


def advantages(cfg, batch, state):
    state["kl_coef"] = ppo.next_kl_coef(cfg, state)
    rewards = batch["scores"] - state["kl_coef"] * batch["kl"].sum(1)
    groups = rewards.view(-1, cfg.group_size)
    others = (groups.sum(1, keepdim=True) - groups) / (cfg.group_size - 1)
    mask = batch["mask"]
    weights = mask / mask.sum(1, keepdim=True)  # the tokens of an answer share its loss
    return {**batch, "advantages": (groups - others).view(-1, 1) * mask, "weights": weights}


def token_loss(cfg, new_logprobs, micro):
    new_logprob = (new_logprobs * micro["mask"]).sum(1, keepdim=True)  # (B, 1): of the whole answer
    logprob = (micro["logprobs"] * micro["mask"]).sum(1, keepdim=True)
    return ppo.policy_loss(new_logprob, logprob, micro["advantages"], cfg.cliprange)


def main(cfg, score=None):
    require(cfg.group_size > 1, f"group_size {cfg.group_size}: an answer alone has no others; take 2 or more")
    ppo.main(cfg, score, advantages=advantages, token_loss=token_loss, with_critic=False)


if __name__ == "__main__":
    main(configure(Config))

"""GRPO (arXiv:2402.03300 eq. 3, 4): several answers to a query, each judged against its group; no critic.

    python -m variants.grpo config/toy_ppo.py --out_dir=out/toy/grpo
    torchrun --nproc_per_node=8 -m variants.grpo config/ppo_1b.py --out_dir=out/grpo_1b

An answer's advantage is (score - mean of its group) / (standard deviation of its group + 1e-4), the same for all its
tokens; the deviation is the unbiased one, as in TRL. Every answer weighs the same, however long it is. The penalty, k3
of the KL to the reference, stands in the loss, and pulls to another divergence than PPO's (lab/kl.md).
objective/kl_coef and objective/rlhf_reward speak of a penalty in the reward: here they are 0, and the score. A batch is
learned from once, as in the paper.

differs: TRL 1.12.0 multiplies the penalty by the ratio; variants/kl_estimators.py has that as weighted_loss.
"""

from dataclasses import dataclass

import torch

import ppo
from configurator import Count, configure, require


@dataclass
class Config(ppo.Config):
    group_size: Count = 8
    n_epochs: Count = 1


def advantages(cfg, batch, state):
    groups = batch["scores"].view(-1, cfg.group_size)
    centred = groups - groups.mean(1, keepdim=True)
    scaled = centred / (groups.std(1, keepdim=True) + 1e-4)
    mask = batch["mask"]
    weights = mask / mask.sum(1, keepdim=True)
    # state["kl_coef"] is of penalties in the reward: here there is none.
    return {**batch, "advantages": scaled.view(-1, 1) * mask, "weights": weights}


def token_loss(cfg, new_logprobs, micro):
    return ppo.clipped_surrogate(cfg, new_logprobs, micro) + cfg.kl_coef * reference_kl(new_logprobs, micro)


def reference_kl(new_logprobs, micro):
    """k3 of the KL to the reference, at each token: (B, R). (http://joschu.net/blog/kl-approx.html)"""
    log_ratio = (micro["ref_logprobs"] - new_logprobs) * micro["mask"]
    return torch.expm1(log_ratio) - log_ratio


def require_group(cfg):
    require(cfg.group_size > 1, f"group_size {cfg.group_size}: an answer alone has no group; take 2 or more")
    require(cfg.kl_target == 0, "kl_target adapts a penalty in the reward, and here is none; leave it 0")


def main(cfg, score=None):
    require_group(cfg)
    ppo.main(cfg, score, advantages=advantages, token_loss=token_loss, with_critic=False)


if __name__ == "__main__":
    main(configure(Config))

"""Online DPO (arXiv:2402.04792): two fresh answers to a query, the reward model picks, one step of DPO on the pair.

    python -m variants.online_dpo config/toy_ppo.py --n_minibatches=1 --out_dir=out/toy/online_dpo
    torchrun --nproc_per_node=8 -m variants.online_dpo config/ppo_1b.py --out_dir=out/online_dpo_1b

DPO's loss of a pair is -log sigmoid(beta m), m the difference of the answers' log-ratios to the reference, and its
gradient is -beta (1 - sigmoid(beta m)) times that of log p(chosen) - log p(rejected). A batch is used for one step
only, and by the policy that sampled it. So m is known from the rollout, and the gradient is a policy gradient with
advantages +-beta (1 - sigmoid(beta m)).

differs: a reward model compares the answers, where the paper asks a language model; log-probabilities are at the
temperature of sampling, so that the same beta pulls otherwise than in dpo.py.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

import ppo
from configurator import Count, Positive, configure, require


@dataclass
class Config(ppo.Config):
    group_size: Count = 2
    n_epochs: Count = 1
    beta: Positive = 0.1  # strength of the pull towards the reference; kl_coef has no meaning here


def advantages(cfg, batch, state):
    mask = batch["mask"]
    length = mask.sum(1, keepdim=True)  # (B, 1)
    log_ratios = batch["kl"].sum(1)
    losses, pulls = pair_loss(log_ratios, batch["scores"], cfg.beta)
    # The loss is a mean over pairs, and an update's over answers, each of them over tokens: hence 2 and the length.
    worth = 2 * length * pulls[:, None]
    new = {"advantages": worth * mask, "weights": mask / length, "pair_loss": losses}
    return {**batch, **new}


def pair_loss(log_ratios, scores, beta):
    """Each answer's share of DPO's loss (B,), its pair's, and -d loss / d log p (B,). (arXiv:2305.18290 eq. 7)

    log_ratios, scores (B,): of the answers, pairs side by side.
    """
    first, second = scores.view(-1, 2).unbind(1)
    # That the first is better: 1 or 0, and 0.5 where both are as good.
    target = 0.5 + 0.5 * torch.sign(first - second)
    first, second = log_ratios.view(-1, 2).unbind(1)
    margin = beta * (first - second)
    losses = F.binary_cross_entropy_with_logits(margin, target, reduction="none")
    pull = beta * (target - torch.sigmoid(margin))
    pulls = torch.stack((pull, -pull), dim=1)
    return losses.repeat_interleave(2), pulls.flatten()


def token_loss(cfg, new_logprobs, micro):
    """The value is the pair's loss, the gradient that of -worth * log p."""
    change = new_logprobs - new_logprobs.detach()
    return micro["pair_loss"][:, None] - micro["advantages"] * change


def main(cfg, score=None):
    require(cfg.kl_target == 0, "kl_target adapts a penalty in the reward, and here is none; leave it 0")
    require(cfg.group_size == 2, f"group_size {cfg.group_size}: DPO compares two answers; take 2")
    steps = cfg.n_epochs * cfg.n_minibatches
    require(steps == 1, f"{steps} steps on a batch, but only the first is by its sampler; take 1")
    ppo.main(cfg, score, advantages=advantages, token_loss=token_loss, with_critic=False)


if __name__ == "__main__":
    main(configure(Config))

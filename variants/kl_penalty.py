"""PPO's other objective (arXiv:1707.06347 eq. 8): no clip, but a penalty on the KL of each update.

    python -m variants.kl_penalty config/toy_ppo.py --critic_steps=0 --out_dir=out/toy/kl_penalty
    torchrun --nproc_per_node=8 -m variants.kl_penalty config/ppo_1b.py --out_dir=out/kl_penalty_1b

The loss is -ratio A + beta KL(old || new). After an update whose KL was below kl_step / 1.5, beta is halved; above
1.5 kl_step, doubled. KL(old || new) is estimated from the sampled tokens, by k3 in the loss.

differs: the KL that beta follows is not measured after the update, by a pass of its own, but estimated from the mean of
0.5 (log ratio)^2 over its steps, as if these were alike (kl_after).
"""

from dataclasses import dataclass

import torch

import ppo
from configurator import Positive, configure, require


@dataclass
class Config(ppo.Config):
    kl_step: Positive = 0.01  # the KL of an update, per token, that beta aims at
    beta: Positive = 1.0  # of the first update


def advantages(cfg, batch, state):
    batch = ppo.advantages(cfg, batch, state)
    state.setdefault("beta", cfg.beta)
    if "update_kl" in state:
        last_kl = kl_after(state["update_kl"], cfg.n_epochs * cfg.n_minibatches)
        state["beta"] = adapt(state["beta"], last_kl, cfg.kl_step)
    batch["beta"] = torch.full_like(batch["scores"], state["beta"])  # a column, for token_loss sees a batch alone
    return batch


def kl_after(mean_kl, n_steps):
    """The KL that an update ends with, from the mean of what its steps begin with.

    Of n equal steps the i-th, from 0, begins with i / n of the last log-ratio, and with the square of that of the KL.
    """
    shares = (torch.arange(n_steps) / n_steps) ** 2
    return mean_kl / shares.mean().item()


def adapt(beta, kl, target):
    if kl < target / 1.5:
        return beta / 2
    if kl > 1.5 * target:
        return beta * 2
    return beta


def token_loss(cfg, new_logprobs, micro):
    log_ratio = new_logprobs - micro["logprobs"]
    kl = torch.expm1(log_ratio) - log_ratio  # of tokens drawn from the old policy: k3 of KL(old || new)
    return -torch.exp(log_ratio) * micro["advantages"] + micro["beta"][:, None] * kl


def main(cfg, score=None):
    n_steps = cfg.n_epochs * cfg.n_minibatches
    require(n_steps > 1, "one step an update: beta would see no KL, and go to 0; raise n_epochs")
    require(cfg.critic_steps == 0, "critic_steps: beta would fall meanwhile; leave it 0")
    ppo.main(cfg, score, advantages=advantages, token_loss=token_loss)


if __name__ == "__main__":
    main(configure(Config))

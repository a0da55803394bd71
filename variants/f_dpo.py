"""f-DPO (arXiv:2309.16240): DPO with another divergence from the reference than the reverse KL.

    python -m variants.f_dpo config/toy_dpo.py --divergence=js --out_dir=out/toy/f_dpo
    torchrun --nproc_per_node=8 -m variants.f_dpo config/dpo_1b.py --divergence=alpha --out_dir=out/f_dpo_1b

The implicit reward is beta f'(u) of u = policy / reference, here with the constant by which it is 0 where u is 1:

    reverse_kl   log(u): DPO
    forward_kl   1 - 1 / u
    js           log(2 u / (1 + u))
    alpha        (u ** (alpha - 1) - 1) / (alpha - 1): from the forward KL at 0 to the reverse KL at 1

The paper's alpha is 1 - alpha. In eval.json the accuracy is right for all of them, since they rise with u; what stands
beside it is by DPO's reward.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from configurator import configure, require
from variants import dpo_losses
from variants.dpo_formulas import sigmoid


@dataclass
class Config(dpo_losses.Config):
    loss_type: Literal["sigmoid"] = "sigmoid"
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "js"
    alpha: float = 0.5  # of divergence alpha


def score(log_u, divergence, alpha):
    """f'(u) of log u, 0 at u = 1."""
    if divergence == "reverse_kl":
        return log_u
    if divergence == "js":
        return F.logsigmoid(log_u) + math.log(2)
    power = alpha - 1
    if divergence == "forward_kl":
        power = -1
    # e ** 88 is the last that float32 holds: beyond 80 the score stays, without a gradient.
    return torch.expm1((power * log_u).clamp(max=80)) / power


def pair_loss(cfg, logprobs, micro):
    """Losses (B,) and implicit rewards (B, 2), as dpo.pair_loss."""
    log_u = logprobs - micro["ref_logprobs"]
    rewards = cfg.beta * score(log_u, cfg.divergence, cfg.alpha)
    chosen, rejected = rewards.unbind(1)
    return sigmoid(chosen, rejected, micro["smoothing"], cfg.beta), rewards


def main(cfg):
    require(cfg.alpha != 1, "alpha 1 is the reverse KL; give --divergence=reverse_kl")
    require(not cfg.loss_weights, "loss_weights: there is one loss; leave them out")
    dpo_losses.main(cfg, loss=pair_loss)


if __name__ == "__main__":
    main(configure(Config))

"""f-DPO (arXiv:2309.16240): DPO with another divergence from the reference than the reverse KL.

    python -m variants.f_dpo config/toy_dpo.py --divergence=js --out_dir=out/toy/f_dpo
    torchrun --nproc_per_node=8 -m variants.f_dpo config/dpo_1b.py --divergence=alpha --out_dir=out/f_dpo_1b

The implicit reward is beta f'(u) of u = policy / reference, up to a constant that falls out of a pair:

    reverse_kl   log u: DPO
    forward_kl   -1 / u
    js           log u / (1 + u): no reward is above 0
    alpha        u ** (alpha - 1) / (alpha - 1): near 1 the reverse KL, at 0 the forward

These are the names and scores of TRL; the paper's alpha is 1 - alpha.
"""

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
    """f'(u), without its constant, of log u."""
    if divergence == "reverse_kl":
        return log_u
    if divergence == "forward_kl":
        return -torch.exp(-log_u)
    if divergence == "js":
        return F.logsigmoid(log_u)
    return torch.exp((alpha - 1) * log_u) / (alpha - 1)


def pair_loss(cfg, logprobs, micro):
    """Losses (B,) and implicit rewards (B, 2), as dpo.pair_loss."""
    log_u = logprobs - micro["ref_logprobs"]
    rewards = cfg.beta * score(log_u, cfg.divergence, cfg.alpha)
    chosen, rejected = rewards.unbind(1)
    return sigmoid(chosen, rejected, micro["smoothing"], cfg.beta), rewards


def main(cfg):
    require(cfg.alpha != 1, "alpha 1 is the reverse KL; give --divergence=reverse_kl")
    dpo_losses.main(cfg, loss=pair_loss)


if __name__ == "__main__":
    main(configure(Config))

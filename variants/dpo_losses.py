"""More of DPO's family, by name: robust, ipo_norm, apo_zero, beside the sigmoid, hinge and ipo of dpo.py.

    python -m variants.dpo_losses config/toy_dpo.py --loss_type=apo_zero --out_dir=out/toy/dpo_apo_zero
    torchrun --nproc_per_node=8 -m variants.dpo_losses config/dpo_1b.py --loss_type=robust --label_smoothing=0.1
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

import dpo
from configurator import configure, require


@dataclass
class Config(dpo.Config):
    loss_type: Literal["sigmoid", "hinge", "ipo", "robust", "ipo_norm", "apo_zero"] = "apo_zero"


def pair_loss(cfg, logprobs, ref_logprobs, lengths):
    """Losses (B,) and implicit rewards (B, 2), as dpo.pair_loss. ratios: log policy - log reference."""
    if cfg.loss_type in ("sigmoid", "hinge", "ipo"):
        return dpo.pair_loss(cfg, logprobs, ref_logprobs, lengths)
    fits = cfg.label_smoothing == 0 or (cfg.loss_type == "robust" and cfg.label_smoothing < 0.5)
    wrong = f"label_smoothing {cfg.label_smoothing} does not fit loss_type {cfg.loss_type!r}"
    require(fits, f"{wrong}; sigmoid and robust take one below 0.5")

    ratios = logprobs - ref_logprobs  # (B, 2)
    family = {"robust": robust, "ipo_norm": ipo_norm, "apo_zero": apo_zero}
    loss = family[cfg.loss_type]
    losses = loss(ratios, lengths, cfg.beta, cfg.label_smoothing)
    return losses, cfg.beta * ratios


def robust(ratios, lengths, beta, label_smoothing):
    """The sigmoid loss, unbiased if labels are wrong with that probability. (arXiv:2403.00409)"""
    margin = ratios[:, 0] - ratios[:, 1]
    right = F.logsigmoid(beta * margin)
    wrong = F.logsigmoid(-beta * margin)
    losses = -(1 - label_smoothing) * right + label_smoothing * wrong
    return losses / (1 - 2 * label_smoothing)


def ipo_norm(ratios, lengths, beta, label_smoothing):
    """IPO of the ratios per token, as newer versions of TRL have it. (arXiv:2310.12036 eq. 17)"""
    per_token = ratios / lengths
    margin = per_token[:, 0] - per_token[:, 1]
    return (margin - 1 / (2 * beta)) ** 2


def apo_zero(ratios, lengths, beta, label_smoothing):
    """Chosen responses become likelier, rejected ones less likely. (arXiv:2408.06266)"""
    chosen, rejected = torch.sigmoid(beta * ratios).unbind(1)
    return 1 - chosen + rejected


def main(cfg):
    dpo.main(cfg, loss=pair_loss)


if __name__ == "__main__":
    main(configure(Config))

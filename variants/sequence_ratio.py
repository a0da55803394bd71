r"""GSPO (arXiv:2507.18071): GRPO with one ratio for an answer, and its own bounds above and below.

    python -m variants.sequence_ratio config/toy_ppo.py --out_dir=out/toy/gspo
    python -m variants.sequence_ratio config/toy_ppo.py --out_dir=out/dapo --ratio_of=token --clip_low=0.2 \
        --clip_high=0.28
    torchrun --nproc_per_node=8 -m variants.sequence_ratio config/ppo_1b.py --out_dir=out/gspo_1b

An answer's ratio is exp(mean log-ratio of its tokens): it does not grow with length, as a product does, and its bounds
are narrow. The second line is the clip of DAPO (arXiv:2503.14476 eq. 10): token by token, and wider above, so that
unlikely tokens can rise. As in both papers a batch is learned from once, in several steps, of which the first sees no
clip, and there is no penalty. cliprange is not used, but policy/clipfrac_avg goes by it.

differs: of DAPO it is the clip alone; each answer weighs the same, and none is left out.
"""

from dataclasses import dataclass
from typing import Literal

import torch

import ppo
from configurator import Count, configure, require
from variants import grpo


@dataclass
class Config(grpo.Config):
    n_minibatches: Count = 4
    kl_coef: float = 0.0
    ratio_of: Literal["sequence", "token"] = "sequence"
    clip_low: float = 3e-4  # the ratio has a gradient from 1 - this; 0.2 suits a token's
    clip_high: float = 4e-4  # to 1 + this; 0.28 suits a token's


def token_loss(cfg, new_logprobs, micro):
    mask = micro["mask"]
    log_ratio = (new_logprobs - micro["logprobs"]) * mask
    if cfg.ratio_of == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True)  # (B, 1)
    ratio = torch.exp(log_ratio)
    clipped = ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    surrogate = torch.minimum(ratio * micro["advantages"], clipped * micro["advantages"])
    return -surrogate + cfg.kl_coef * grpo.reference_kl(new_logprobs, micro)


def main(cfg, score=None):
    grpo.require_group(cfg)
    is_wide = cfg.clip_low > 1e-3
    require(is_wide or cfg.ratio_of == "sequence", "clip_low 0.2 and clip_high 0.28 suit --ratio_of=token")
    ppo.main(cfg, score, advantages=grpo.advantages, token_loss=token_loss, with_critic=False)


if __name__ == "__main__":
    main(configure(Config))

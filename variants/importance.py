"""Importance weights between sampler and trainer, which round differently: tokens are drawn by another policy.

    python -m variants.importance config/toy_ppo.py --dtype=bfloat16 --out_dir=out/toy/importance
    torchrun --nproc_per_node=8 -m variants.importance config/ppo_1b.py --correction=mask --out_dir=out/importance_1b

Tokens are drawn by cached generation, and learned from as if the pass that trains had drawn them. What a token was
worth is weighed by w = p_trainer / p_sampler, cut off at max_weight (truncated importance sampling, arXiv:1802.01561);
or a token with w outside [1 / max_weight, max_weight] is left out (arXiv:2510.18855, whose two bounds are free). Watch
val/generation_gap, which says how far the two are apart: in float32 all weights are 1 up to rounding.
"""

from dataclasses import dataclass
from typing import Literal

import torch

import ppo
from configurator import Positive, configure, require


@dataclass
class Config(ppo.Config):
    correction: Literal["truncate", "mask"] = "truncate"
    max_weight: Positive = 2.0


def advantages(cfg, batch, state):
    batch = ppo.advantages(cfg, batch, state)
    gap = (batch["logprobs"] - batch["sampled_logprobs"]) * batch["mask"]
    weights = importance_weights(gap, cfg.correction, cfg.max_weight)
    return {**batch, "advantages": batch["advantages"] * weights}


def importance_weights(gap, correction, max_weight):
    """What each token counts, from log p of the trainer - log p of the sampler."""
    weights = torch.exp(gap)
    if correction == "truncate":
        return weights.clamp(max=max_weight)
    is_near = (weights <= max_weight) & (weights >= 1 / max_weight)
    return weights * is_near


def main(cfg, score=None):
    require(cfg.max_weight >= 1, f"max_weight {cfg.max_weight}: no weight could be 1; take 1 or more")
    ppo.main(cfg, score, advantages=advantages)


if __name__ == "__main__":
    main(configure(Config))

"""PPO that is wary of its reward models: an ensemble's min, or mean minus lambda * variance (arXiv:2310.02743).

    python -m variants.ensemble config/toy_ppo.py --reward_model=a,b,c --combine=min --out_dir=out/toy/ppo_min
    torchrun --nproc_per_node=8 -m variants.ensemble config/ppo_1b.py --reward_model=a,b,c --combine=uncertainty

Each member learns from rows drawn with replacement (`bootstrap`, arXiv:1706.03741 section 2.2.3); where members
disagree, the rows have told them little. Normalise them one by one (rm.py --normalize_std), or the one with the widest
scale decides alone. variants/online_rlhf.py trains such an ensemble, and lets it choose what is labelled.

differs: the variance is the unbiased one; the paper divides by the number of members.
"""

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np

import ppo
from configurator import configure, require
from data import pick
from evals.winrate import reward_scores
from hub.files import split_names
from variants.labellers import for_judges, texts_of


@dataclass
class Config(ppo.Config):
    combine: Literal["mean", "min", "uncertainty"] = "mean"  # of the reward models; uncertainty: mean - lambda variance
    variance_coef: float = 0.1  # lambda


def bootstrap(rows, *key):
    """As many rows, drawn with replacement: a pure function of `key`, for example (seed, member)."""
    indices = np.random.default_rng(key).integers(len(rows), size=len(rows))
    return pick(rows, indices)


def disagreement(margins):
    """Margins (members, pairs), first response minus second -> how far the members are apart (pairs,).

    The standard deviation of the probability that each gives to the first response: members that are all sure agree,
    however sure they are. (arXiv:1706.03741 section 2.2.4)
    """
    probabilities = 1 / (1 + np.exp(-np.asarray(margins)))
    return np.std(probabilities, axis=0, ddof=1)


def margins_of(cfg, world, members, rows):
    """Each member's margins (members, pairs) of the pairs in rows as of variants/pairs.py."""
    pairs = for_judges(*texts_of(rows))
    margins = []
    for member in members:
        firsts = reward_scores(cfg, world, member, pairs, "response")
        seconds = reward_scores(cfg, world, member, pairs, "other")
        margins.append(np.subtract(firsts, seconds))
    return np.array(margins)


def combined(rewards, how, variance_coef):
    """Rewards (members, B) -> (B,). The variance is the unbiased one."""
    if how == "min":
        return rewards.min(0).values
    mean = rewards.mean(0)
    if how == "mean":
        return mean
    return mean - variance_coef * rewards.var(0)


def door(cfg):
    """`combine` for ppo.main."""
    n_models = len(split_names(cfg.reward_model))
    several = f"combine {cfg.combine!r} needs several reward models; give --reward_model=a,b,c"
    require(n_models > 1 or cfg.combine == "mean", several)
    return functools.partial(combined, how=cfg.combine, variance_coef=cfg.variance_coef)


def main(cfg):
    ppo.main(cfg, combine=door(cfg))


if __name__ == "__main__":
    main(configure(Config))

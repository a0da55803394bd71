"""PPO-max (arXiv:2307.04964): scores normalised and clipped, advantages clipped, and PPO-ptx (variants/ptx.py).

    python -m variants.ppo_max config/toy_ppo.py --reward_norm=normalize --reward_clip=0.8 --out_dir=out/toy/ppo_max
    torchrun --nproc_per_node=8 -m variants.ppo_max config/ppo_1b.py config/ppo_max.py --out_dir=out/ppo_max_1b

Its other parts are fields of ppo.py: critic_steps, critic_lr, max_grad_norm, whiten_advantages, lam.

differs from the sources:
- Scores are normalised after a missing EOS has had its score; the reported objective/scores stay as they were.
- Advantages are whitened over the batch, not per minibatch, before they are clipped.
"""

from dataclasses import dataclass
from typing import Literal

import ppo
from configurator import configure
from runtime import stage
from variants import ptx


@dataclass
class Config(ptx.Config):
    reward_norm: Literal["none", "scale", "normalize"] = "none"  # scores / std of all so far; minus their mean too
    reward_clip: float = 0.0  # then keep scores within -+ this; 0: any
    advantage_clip: float = 0.0  # keep whitened advantages within -+ this; 0: any


def advantages(cfg, batch, state):
    """ppo.advantages of the scores as they are paid: normalised and clipped (arXiv:2307.04964 eq. 18)."""
    scores = batch["scores"]
    paid = scores
    if cfg.reward_norm != "none":
        moments = state.get("moments", (0, 0.0, 0.0))
        paid, state["moments"] = normalize_scores(scores, moments, cfg.reward_norm)
    if cfg.reward_clip:
        paid = paid.clamp(-cfg.reward_clip, cfg.reward_clip)
    batch = ppo.advantages(cfg, {**batch, "scores": paid}, state)
    if cfg.advantage_clip:
        batch["advantages"] = batch["advantages"].clamp(-cfg.advantage_clip, cfg.advantage_clip)
    return {**batch, "scores": scores}


def normalize_scores(scores, moments, how):
    """Scores (B,) divided by the standard deviation of all so far ("scale"), or minus their mean first ("normalize").

    moments: count, mean and sum of squared deviations of those before; returns the new ones too. (The running moments
    of the released code, merged as in Chan et al. 1979.)
    """
    count, mean, squares = moments
    x = scores.double()
    n = count + len(x)
    shift = x.mean().item() - mean
    squares += ((x - x.mean()) ** 2).sum().item() + shift**2 * count * len(x) / n
    mean += shift * len(x) / n
    std = (squares / max(n - 1, 1)) ** 0.5
    if std == 0:
        std = 1.0  # all scores are equal
    if how == "normalize":
        x = x - mean
    return (x / std).float(), (n, mean, squares)


@stage
def main(cfg, score=None):
    before_step = ptx.PretrainingMix(cfg) if cfg.ptx_coef else None
    ppo.main(cfg, score, advantages=advantages, before_step=before_step)


if __name__ == "__main__":
    main(configure(Config))

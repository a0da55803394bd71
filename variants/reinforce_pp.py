"""REINFORCE++ (arXiv:2501.03262): PPO without a critic; what a token was worth is all that came after it.

    python -m variants.reinforce_pp config/toy_ppo.py --out_dir=out/toy/reinforce_pp
    torchrun --nproc_per_node=8 -m variants.reinforce_pp config/ppo_1b.py --out_dir=out/reinforce_pp_1b

The penalty stands in the reward of each token, one answer to each query is enough, and the batch is the baseline: sums
of rewards to the end are whitened over all tokens of all processes. That is PPO's own advantage of a critic that says
0, with lambda 1.
"""

from dataclasses import dataclass

import torch

import ppo
from configurator import configure, require


@dataclass
class Config(ppo.Config):
    lam: float = 1.0


def advantages(cfg, batch, state):
    without_critic = {**batch, "values": torch.zeros_like(batch["kl"])}
    return ppo.advantages(cfg, without_critic, state)


def main(cfg, score=None):
    require(cfg.lam == 1, f"lam {cfg.lam}: without a critic it would only discount; leave it 1")
    require(cfg.whiten_advantages, "whitening is the baseline here; leave whiten_advantages on")
    ppo.main(cfg, score, advantages=advantages, with_critic=False)


if __name__ == "__main__":
    main(configure(Config))

"""A reference that follows the policy, so that the penalty holds back from where the policy was of late.

    python -m variants.reference_ema config/toy_ppo.py --ema=0.02 --out_dir=out/toy/reference_ema
    torchrun --nproc_per_node=8 -m variants.reference_ema config/ppo_1b.py --ema=0.6 --sync_every=512

Every sync_every updates: reference <- ema policy + (1 - ema) reference. The first launch line is the exponential moving
average of arXiv:2404.10719 (whose code has 0.001 for runs of many more updates); the second TRL's sync_ref_model. The
reference is in the checkpoints: a resumed run goes on with the one it had. objective/kl is the KL to the reference as
it is now, no longer that to the SFT model.
"""

from dataclasses import dataclass

import torch

import ppo
from configurator import Count, configure, require


@dataclass
class Config(ppo.Config):
    ema: float = 0.001  # share of the policy in the new reference; 1: it becomes the policy
    sync_every: Count = 1  # updates between such moves


def after_update(run, policy, reference):
    if (run.step + 1) % run.cfg.sync_every == 0:
        move(reference, policy, run.cfg.ema)


@torch.no_grad()
def move(reference, policy, share):
    for mine, theirs in zip(reference.parameters(), policy.parameters(), strict=True):
        mine.lerp_(theirs, share)


def main(cfg, score=None):
    require(cfg.ema <= 1, f"ema {cfg.ema}: a share is at most 1; lower it")
    ppo.main(cfg, score, after_update=after_update)


if __name__ == "__main__":
    main(configure(Config))

"""Early stop (Spinning Up's PPO): once the policy has moved too far in an update, it takes no more steps in it.

    python -m variants.early_stop config/toy_ppo.py --target_kl=0.01 --out_dir=out/toy/early_stop
    torchrun --nproc_per_node=8 -m variants.early_stop config/ppo_1b.py --out_dir=out/early_stop_1b

Before each step of the policy its distance from the one that sampled is looked at, mean(log p_old - log p) over the
minibatch's tokens; above 1.5 target_kl that step and the update's later ones are left out. The critic takes all its
steps. The mean is over all processes, so that all stop together.
"""

from dataclasses import dataclass

import ppo
from configurator import Positive, configure


@dataclass
class Config(ppo.Config):
    target_kl: Positive = 0.01  # nats per token; the policy stops at 1.5 times this


class EarlyStop:
    """Two doors of ppo.main: token_loss measures each micro-batch, before_step adds up and decides."""

    def __init__(self):
        self.parts = []  # of the minibatch at hand

    def token_loss(self, cfg, new_logprobs, micro):
        # Once the policy has stopped there is no gradient, and nobody asks.
        if new_logprobs.requires_grad:
            old_minus_new = (micro["logprobs"] - new_logprobs) * micro["mask"]
            self.parts.append({"sum": old_minus_new.sum(), "tokens": micro["mask"].sum()})
        return ppo.clipped_surrogate(cfg, new_logprobs, micro)

    def before_step(self, run, cfg, metrics):
        sums = run.world.sum_scalars(self.parts)
        self.parts.clear()
        kl = sums["sum"] / sums["tokens"]
        metrics["policy/old_new_kl"] = kl
        return kl > 1.5 * cfg.target_kl


def main(cfg, score=None):
    stop = EarlyStop()
    ppo.main(cfg, score, token_loss=stop.token_loss, before_step=stop.before_step)


if __name__ == "__main__":
    main(configure(Config))

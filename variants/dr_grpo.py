"""Dr. GRPO (arXiv:2503.20783): GRPO without its two biases, the deviation of the group and the length of the answer.

    python -m variants.dr_grpo config/toy_ppo.py --kl_coef=0.05 --out_dir=out/toy/dr_grpo
    torchrun --nproc_per_node=8 -m variants.dr_grpo config/ppo_1b.py --out_dir=out/dr_grpo_1b

An answer's advantage is score - mean of its group: queries on which all answers do about the same are not blown up. The
loss is the sum over all tokens, divided by the number of answers and by response_length, a constant: long bad answers
are not spared. kl_coef, 0 as in the paper, weighs GRPO's penalty.
"""

from dataclasses import dataclass

import ppo
from configurator import configure
from variants import grpo


@dataclass
class Config(grpo.Config):
    kl_coef: float = 0.0


def advantages(cfg, batch, state):
    groups = batch["scores"].view(-1, cfg.group_size)
    centred = groups - groups.mean(1, keepdim=True)
    # By GRPO's weights each answer's loss is a mean over its tokens; `share` makes it a sum, divided by the constant.
    share = batch["mask"].sum(1) / cfg.response_length
    batch = grpo.advantages(cfg, batch, state)
    return {**batch, "advantages": centred.view(-1, 1) * batch["mask"], "share": share}


def token_loss(cfg, new_logprobs, micro):
    return micro["share"][:, None] * grpo.token_loss(cfg, new_logprobs, micro)


def main(cfg, score=None):
    grpo.require_group(cfg)
    ppo.main(cfg, score, advantages=advantages, token_loss=token_loss, with_critic=False)


if __name__ == "__main__":
    main(configure(Config))

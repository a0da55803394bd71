"""PPO-ptx (arXiv:2203.02155 eq. 2): an SFT loss on other rows is mixed into each step of the policy.

    python -m variants.ptx config/toy_ppo.py --ptx_coef=0.1 --out_dir=out/toy/ppo_ptx
    torchrun --nproc_per_node=8 -m variants.ptx config/ppo_1b.py --ptx_coef=0.1 --out_dir=out/ppo_ptx_1b

differs: as many rows as the batch of PPO has; the paper takes eight times as many.
"""

from dataclasses import dataclass

import ppo
from configurator import configure, require
from data import batch_indices, collate
from hub.tokenizer import Tokenizer
from runtime import World, backward, check_rows, load_split, stage


@dataclass
class Config(ppo.Config):
    ptx_coef: float = 0.0  # weight of an SFT loss on as many rows
    ptx_data: str = ""  # its rows, longer than queries by response_length at most: as data; empty: data


class PretrainingMix:
    """Before each step: the gradient of ptx_coef * mean -log p per token, of as many rows as the minibatch has."""

    def __init__(self, cfg):
        longest = 0  # any
        if cfg.max_length:
            longest = cfg.max_length + cfg.response_length
        world = World(cfg)  # ppo.main joins the same processes; rows that do not fit are refused before it begins
        tokenizer = Tokenizer.load(cfg.model)
        source = cfg.ptx_data or cfg.data
        options = dict(n_responses=1, max_length=longest)
        self.rows = load_split(cfg, world, tokenizer, source, cfg.train_split, **options)
        self.step = -1

    def __call__(self, run, cfg, metrics):
        if self.step == -1:
            check_rows(cfg, run.world, "ptx_data", self.rows)
        if self.step != run.step:
            # A new update: as many rows as the batch has, in the order of its minibatches.
            self.step = run.step
            self.batch = self.rows.select(batch_indices(len(self.rows), cfg.batch_size, run.step, cfg.seed + 1))
            self.minibatches = ppo.minibatch_indices(cfg, run.step)
        # ppo.py calls this once for each minibatch, in this order.
        metrics["loss/ptx_avg"] = accumulate(run, cfg, self.batch.select(next(self.minibatches)))
        return False  # the policy goes on


def accumulate(run, cfg, rows):
    """Accumulate the gradient of ptx_coef * loss on these rows; returns the loss, the mean of -log p per token."""
    n_tokens = sum(len(responses[0]) for responses in rows["responses"])
    parts = []
    for indices in run.micro_batches(rows["length"]):
        micro = rows[indices]
        responses = [responses[0] for responses in micro["responses"]]
        ids, select, targets, mask = collate(micro["query"], responses, run.world.device)
        loss = -(run.models["policy"].logprobs(ids, select, targets) * mask).sum() / n_tokens
        backward(run, cfg.ptx_coef * loss)
        parts.append({"loss": loss})
    return run.world.sum_scalars(parts)["loss"]


@stage
def main(cfg, score=None):
    require(cfg.ptx_coef > 0, "ptx_coef 0: nothing would be mixed in; give --ptx_coef=0.1")
    ppo.main(cfg, score, before_step=PretrainingMix(cfg))


if __name__ == "__main__":
    main(configure(Config))

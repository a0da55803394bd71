"""PPO-max (arXiv:2307.04964) and PPO-ptx (arXiv:2203.02155): scores normalised and clipped, an SFT loss mixed in.

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
from data import batch_indices, collate
from hub.tokenizer import Tokenizer
from runtime import World, backward, load_split, stage


@dataclass
class Config(ppo.Config):
    reward_norm: Literal["none", "scale", "normalize"] = "none"  # scores / std of all so far; minus their mean too
    reward_clip: float = 0.0  # then keep scores within -+ this; 0: any
    advantage_clip: float = 0.0  # keep whitened advantages within -+ this; 0: any
    ptx_coef: float = 0.0  # weight of an SFT loss on as many rows
    ptx_data: str = ""  # its rows, longer than queries by response_length at most: as data; empty: data


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
    std = (squares / max(n - 1, 1)) ** 0.5 or 1.0
    if how == "normalize":
        x = x - mean
    return (x / std).float(), (n, mean, squares)


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
        if self.step != run.step:
            # A new update: as many rows as the batch has, in the order of its minibatches.
            self.step = run.step
            self.batch = self.rows.select(batch_indices(len(self.rows), cfg.batch_size, run.step, cfg.seed + 1))
            self.minibatches = ppo.minibatch_indices(cfg, run.step)
        # ppo.py calls this once for each minibatch, in this order.
        metrics["loss/ptx_avg"] = accumulate(run, cfg, self.batch.select(next(self.minibatches)))
        return False  # the policy goes on


def accumulate(run, cfg, rows):
    """(PPO-ptx: arXiv:2203.02155 eq. 2)"""
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
    before_step = PretrainingMix(cfg) if cfg.ptx_coef else None
    ppo.main(cfg, score, advantages=advantages, before_step=before_step)


if __name__ == "__main__":
    main(configure(Config))

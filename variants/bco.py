r"""BCO (arXiv:2404.04656) with its reward shift: a classifier of single responses whose threshold follows the rewards.

    python -m variants.bco config/toy_dpo.py --out_dir=out/toy/bco
    torchrun --nproc_per_node=8 -m variants.bco config/dpo_1b.py --out_dir=out/mpo_1b \
        --loss_type=sigmoid,bco_pair,sft --loss_weights=0.8,0.2,1

-log sigmoid(chosen - shift) - log sigmoid(shift - rejected): shift is the mean over all batches so far, this one
included, of the mean reward beta log(policy / reference) of their responses, without a gradient. It is in the
checkpoints. The second line is MPO (arXiv:2411.10442) with it. The bco_pair of variants/dpo_losses.py has no shift, nor
have newer versions of TRL.

differs: for pairs only, so without the paper's weights for good and bad responses to unlike prompts.
"""

import math
from dataclasses import dataclass

import torch

import dpo
from configurator import configure, require
from variants import dpo_losses

OF_MARGINS = {"sigmoid", "robust", "hinge", "ipo", "discopop"}  # a shift of both rewards changes nothing


@dataclass
class Config(dpo_losses.Config):
    loss_type: str = "bco_pair"


def before_batch(run, model, batch, columns):
    """Add the shift (B, 1), the same for each pair."""
    dpo_losses.before_batch(run, model, batch, columns)
    cfg = run.cfg
    logprobs = dpo.predict(cfg, run.world, run.tokenizer.n_vocab, model, batch)
    log_ratios = logprobs - columns["ref_logprobs"]
    shift = mean_so_far(run.state, cfg.beta * log_ratios.mean().item())
    columns["shift"] = torch.full_like(logprobs[:, :1], shift)


def mean_so_far(state, mean):
    """Add this batch's mean reward to those in `state`; returns the mean of all."""
    state.setdefault("reward_sum", 0.0)
    state.setdefault("n_batches", 0)
    if math.isfinite(mean):  # a batch that on_nonfinite=skip leaves out must not spoil all that follow
        state["reward_sum"] += mean
        state["n_batches"] += 1
    return state["reward_sum"] / max(1, state["n_batches"])


def pair_loss(cfg, logprobs, micro):
    """Losses (B,) and implicit rewards (B, 2), as dpo.pair_loss."""
    shift = micro["shift"]
    losses, shifted = dpo_losses.pair_loss(cfg, logprobs - shift / cfg.beta, micro)
    return losses, shifted + shift


def main(cfg):
    names = set(dpo_losses.weights_of(cfg))
    fits = "bco_pair" in names and names <= {"bco_pair", "sft"} | OF_MARGINS
    require(fits, f"loss_type {cfg.loss_type!r}: use bco_pair, alone or with sft, {', '.join(sorted(OF_MARGINS))}")
    dpo_losses.main(cfg, loss=pair_loss, before_batch=before_batch)


if __name__ == "__main__":
    main(configure(Config))

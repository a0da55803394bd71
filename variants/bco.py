"""BCO (arXiv:2404.04656) with its reward shift: a classifier of single responses whose threshold follows the rewards.

    python -m variants.bco config/toy_dpo.py --out_dir=out/toy/bco
    torchrun --nproc_per_node=8 -m variants.bco config/dpo_1b.py --out_dir=out/mpo_1b \\
        --loss_type=sigmoid,bco_pair,sft --loss_weights=0.8,0.2,1

-log sigmoid(chosen - shift) - log sigmoid(shift - rejected): shift is the mean over all batches so far, this one
included, of the mean reward beta log(policy / reference) of their responses, without a gradient. It is in the
checkpoints. The second line is MPO (arXiv:2411.10442) with it. TRL 0.12 had this shift, newer versions have none: that
is the bco_pair of variants/dpo_losses.py.
"""

from dataclasses import dataclass

import dpo
from configurator import configure, require
from variants import dpo_losses

OF_MARGINS = {"sigmoid", "robust", "exo_pair", "hinge", "ipo", "discopop"}  # a shift of both rewards changes nothing


@dataclass
class Config(dpo_losses.Config):
    loss_type: str = "bco_pair"


def before_batch(run, model, batch, columns):
    """Add the shift (B, 1), the same for each pair."""
    dpo_losses.before_batch(run, model, batch, columns)
    cfg = run.cfg
    logprobs = dpo.predict(cfg, run.world, run.tokenizer.n_vocab, model, batch)
    log_ratios = logprobs - columns["ref_logprobs"]
    mean = cfg.beta * log_ratios.mean().item()
    so_far = run.state.get("shift", 0.0)
    run.state["shift"] = so_far + (mean - so_far) / (run.step + 1)
    columns["shift"] = logprobs.new_full((len(logprobs), 1), run.state["shift"])


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

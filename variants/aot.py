"""AOT (arXiv:2406.05882): the whole distribution of chosen responses above that of rejected ones, not pair by pair.

    python -m variants.aot config/toy_dpo.py --out_dir=out/toy/aot
    torchrun --nproc_per_node=8 -m variants.aot config/dpo_1b.py --loss_type=aot_unpaired --out_dir=out/aot_1b

    aot            the policy's margins log p(chosen) - log p(rejected), sorted, against the reference's, sorted
    aot_unpaired   the log-ratios of the chosen responses, sorted, against those of the rejected ones, sorted

Each value meets that of its rank in the *whole* batch. A pass without gradients finds the ranks first, so that the
result depends neither on micro-batches nor on processes. (TRL 1.12.0 sorts each micro-batch by itself: one pair at a
time, its aot is DPO.)
"""

from dataclasses import dataclass
from typing import Literal

import dpo
from configurator import configure, require
from variants import dpo_formulas


@dataclass
class Config(dpo.Config):
    loss_type: Literal["aot", "aot_unpaired"] = "aot"


def sides(cfg, logprobs, ref_logprobs):
    """Two values (B,) for each pair; the loss pushes the first above the second."""
    if cfg.loss_type == "aot":
        margin = logprobs[:, 0] - logprobs[:, 1]
        ref_margin = ref_logprobs[:, 0] - ref_logprobs[:, 1]
        return margin, ref_margin
    return (logprobs - ref_logprobs).unbind(1)


def before_batch(run, model, batch, columns):
    """Add, for each pair's two values, the one of the other kind that has the same rank in the batch."""
    cfg = run.cfg
    is_hard = min(batch["target"]) == 1
    require(is_hard, f"{cfg.data}: soft labels (target) are for variants/dpo_losses.py")
    logprobs = dpo.predict(cfg, run.world, run.tokenizer.n_vocab, model, batch)
    above, below = sides(cfg, logprobs, columns["ref_logprobs"])
    columns["below"] = of_equal_rank(above, below)
    columns["above"] = of_equal_rank(below, above)


def of_equal_rank(values, others):
    """For each of `values` (B,) that one of `others` (B,) which has its rank."""
    ranks = values.argsort(stable=True).argsort()
    return others.sort().values[ranks]


def pair_loss(cfg, logprobs, micro):
    above, below = sides(cfg, logprobs, micro["ref_logprobs"])
    losses = sigmoid(cfg, above, micro["below"])
    # This row's `below` is met in another row, where its value is counted: here only its gradient.
    again = sigmoid(cfg, micro["above"], below)
    rewards = cfg.beta * (logprobs - micro["ref_logprobs"])
    return losses + again - again.detach(), rewards


def sigmoid(cfg, above, below):
    return dpo_formulas.sigmoid(cfg.beta * above, cfg.beta * below, cfg.label_smoothing, cfg.beta)


def main(cfg):
    require(cfg.label_smoothing < 0.5, f"label_smoothing {cfg.label_smoothing}: take one below 0.5")
    dpo.main(cfg, loss=pair_loss, before_batch=before_batch)


if __name__ == "__main__":
    main(configure(Config))

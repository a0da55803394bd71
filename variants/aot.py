"""AOT (arXiv:2406.05882): the whole distribution of chosen responses above that of rejected ones, not pair by pair.

    python -m variants.aot config/toy_dpo.py --out_dir=out/toy/aot
    torchrun --nproc_per_node=8 -m variants.aot config/dpo_1b.py --loss_type=aot_unpaired --out_dir=out/aot_1b

    aot            the policy's margins log p(chosen) - log p(rejected), sorted, against the reference's, sorted
    aot_unpaired   the log-ratios of the chosen responses, sorted, against those of the rejected ones, sorted

Each value meets that of its rank in the *whole* batch. A pass without gradients finds the ranks first, so that the
result depends neither on micro-batches nor on processes.
"""

from dataclasses import dataclass
from typing import Literal

import dpo
from configurator import configure
from variants import dpo_formulas


@dataclass
class Config(dpo.Config):
    loss_type: Literal["aot", "aot_unpaired"] = "aot"


def sides(cfg, logprobs, ref_logprobs):
    """The two values (B,) of each pair, of which the first shall be above the second."""
    if cfg.loss_type == "aot":
        margin = logprobs[:, 0] - logprobs[:, 1]
        ref_margin = ref_logprobs[:, 0] - ref_logprobs[:, 1]
        return margin, ref_margin
    return (logprobs - ref_logprobs).unbind(1)


def before_batch(run, model, batch, columns):
    """Add the values (B, 2) that each pair's two meet."""
    logprobs = dpo.predict(run.cfg, run.world, run.tokenizer.n_vocab, model, batch)
    above, below = sides(run.cfg, logprobs, columns["ref_logprobs"])
    columns["below"] = of_equal_rank(above, below)
    columns["above"] = of_equal_rank(below, above)


def of_equal_rank(values, others):
    """For each of `values` (B,) that one of `others` (B,) which has its rank."""
    ranks = values.argsort(stable=True).argsort()
    return others.sort().values[ranks]


def pair_loss(cfg, logprobs, micro):
    above, below = sides(cfg, logprobs, micro["ref_logprobs"])
    losses = sigmoid(cfg, above, micro["below"])
    # The same two meet again in the row of `below`: of that only the gradient counts, which is that of `below`.
    again = sigmoid(cfg, micro["above"], below)
    rewards = cfg.beta * (logprobs - micro["ref_logprobs"])
    return losses + again - again.detach(), rewards


def sigmoid(cfg, above, below):
    return dpo_formulas.sigmoid(cfg.beta * above, cfg.beta * below, cfg.label_smoothing, cfg.beta)


def main(cfg):
    dpo.main(cfg, loss=pair_loss, before_batch=before_batch)


if __name__ == "__main__":
    main(configure(Config))

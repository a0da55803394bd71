"""WPO (arXiv:2406.11827): the likelier the policy itself would write a pair, the more it weighs.

    python -m variants.wpo config/toy_dpo.py --out_dir=out/toy/wpo
    torchrun --nproc_per_node=8 -m variants.wpo config/dpo_1b.py --out_dir=out/wpo_1b

Pairs come from other writers; the weights bring the loss nearer to that of pairs which the policy has sampled. A weight
is the product, over both responses, of the geometric mean of p(token) / sum p ** 2, the sum over the vocabulary (the
paper's eq. 2, in its sampled alignment: of a sure policy, its own samples weigh near 1). It has no gradient, and costs
two passes more over each batch. It goes with every loss of variants/dpo_losses.py.

differs: versions of TRL hold the weight at 1 at most, or weigh the SFT loss that is mixed in as well; here is neither.
"""

from dataclasses import dataclass

import dpo
from configurator import configure
from variants import dpo_losses


@dataclass
class Config(dpo_losses.Config):
    loss_type: str = "sigmoid"


class Squared:
    """A model, for dpo.predict, with p ** 2 / sum p ** 2 in place of p: the softmax at half the temperature."""

    def __init__(self, model):
        self.model = model

    def logprobs(self, *args, **options):
        return self.model.logprobs(*args, temperature=0.5, **options)


def before_batch(run, model, batch, columns):
    """Add each pair's weight (B,), by the policy as it is."""
    dpo_losses.before_batch(run, model, batch, columns)
    n_vocab = run.tokenizer.n_vocab
    plain = dpo.predict(run.cfg, run.world, n_vocab, model, batch)
    squared = dpo.predict(run.cfg, run.world, n_vocab, Squared(model), batch)
    # (p ** 2 / sum p ** 2) / p, as a mean of its logarithm
    aligned = (squared - plain) / columns["lengths"]
    columns["weight"] = aligned.sum(1).exp()


def pair_loss(cfg, logprobs, micro):
    losses, rewards = dpo_losses.pair_loss(cfg, logprobs, micro)
    return micro["weight"] * losses, rewards


def main(cfg):
    dpo_losses.main(cfg, loss=pair_loss, before_batch=before_batch)


if __name__ == "__main__":
    main(configure(Config))

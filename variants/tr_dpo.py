"""TR-DPO (arXiv:2404.09656): DPO whose reference follows the policy.

    python -m variants.tr_dpo config/toy_dpo.py --sync_every=30 --out_dir=out/toy/tr_dpo
    torchrun --nproc_per_node=8 -m variants.tr_dpo config/dpo_1b.py --out_dir=out/tr_dpo_1b

Every sync_every updates: reference <- ema policy + (1 - ema) reference; 0.6 and 512 are TRL's. Its log-probabilities
are computed anew for each batch, and it is in the checkpoints. (dpo.py also asks the first reference about all rows
before it begins; only eval.json uses that.)
"""

from dataclasses import dataclass

import dpo
from configurator import Count, configure, require
from hub.tokenizer import Tokenizer
from model import GPTNeoX
from runtime import World, load_model, stage
from variants.reference_ema import move


@dataclass
class Config(dpo.Config):
    ema: float = 0.6  # share of the policy in the new reference; 1: it becomes the policy
    sync_every: Count = 512  # updates between such moves


class MovingReference:
    """For dpo.main(cfg, before_batch=...): ref_logprobs by the reference as it is now."""

    def __init__(self, model):
        self.model = model

    def __call__(self, run, model, batch, columns):
        if run.step > 0 and run.step % run.cfg.sync_every == 0:
            move(self.model, model, run.cfg.ema)
        columns["ref_logprobs"] = dpo.predict(run.cfg, run.world, run.tokenizer.n_vocab, self.model, batch)


@stage
def main(cfg):
    require(cfg.ema <= 1, f"ema {cfg.ema}: a share is at most 1; lower it")
    world = World(cfg)  # dpo.main joins the same processes
    tokenizer = Tokenizer.load(cfg.model)
    # Trainable, that is with float32 masters: small moves would be lost in bfloat16.
    reference = load_model(cfg, world, tokenizer, GPTNeoX, cfg.reference or cfg.model, trainable=True)
    dpo.main(cfg, before_batch=MovingReference(reference), kept={"reference": reference})


if __name__ == "__main__":
    main(configure(Config))

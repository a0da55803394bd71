r"""DPO's family by name, several at once with weights, per token, and with soft labels.

    python -m variants.dpo_losses config/toy_dpo.py --loss_type=apo_zero --out_dir=out/toy/dpo_apo_zero
    python -m variants.dpo_losses config/toy_dpo.py --out_dir=out/mpo --loss_type=sigmoid,bco_pair,sft \
        --loss_weights=0.8,0.2,1
    torchrun --nproc_per_node=8 -m variants.dpo_losses config/dpo_1b.py --loss_type=robust --label_smoothing=0.1

The names are those of variants/dpo_formulas.py. Behind a name, _norm means log-ratios per token (ipo_norm is the ipo of
newer versions of TRL); sft is the loss of SFT on the chosen responses, which takes its weight to sft_coef. The second
line is MPO (arXiv:2411.10442) as TRL has it: bco_pair without a shift. A row's `target`, the probability that its first
response is the better one, is used by sigmoid: the loss of arXiv:2305.18290 eq. 7 for both orders, weighed by their
probabilities.
"""

import dataclasses
from dataclasses import dataclass

import torch

import dpo
from configurator import configure, explain, require
from hub.files import split_names
from variants.dpo_formulas import LOSSES

SMOOTHED = ("sigmoid", "robust", "exo_pair")  # those that have a use for label_smoothing


@dataclass
class Config(dpo.Config):
    loss_type: str = "apo_zero"  # a name, or a,b,c: their sum
    loss_weights: str = ""  # of each, as x,y,z; empty: 1


def weights_of(cfg):
    """{name: weight}"""
    names = split_names(cfg.loss_type)
    if not cfg.loss_weights:
        return dict.fromkeys(names, 1.0)
    with explain(f"loss_weights {cfg.loss_weights!r} are no numbers; write 0.8,0.2", ValueError):
        weights = list(map(float, split_names(cfg.loss_weights)))
    counts = f"loss_type names {len(names)} losses, loss_weights {len(weights)} weights"
    require(len(set(names)) == len(weights), f"{counts}; give one for each")
    return dict(zip(names, weights))


def check_losses(cfg):
    """Raise UserError for names that are not known, and for a label_smoothing that does not fit."""
    epsilon = cfg.label_smoothing
    for name in weights_of(cfg):
        plain = name.removesuffix("_norm")
        require(plain in LOSSES or name == "sft", f"loss_type {name!r} is not known; use sft, {', '.join(LOSSES)}")
        takes_one = plain in SMOOTHED and epsilon < 0.5
        wrong = f"label_smoothing {epsilon} does not fit loss_type {name!r}"
        require(epsilon == 0 or takes_one, f"{wrong}; {', '.join(SMOOTHED)} take one below 0.5")
        require(epsilon > 0 or plain != "exo_pair", f"{wrong}; give one above 0, 0.001 for example")


def before_batch(run, model, batch, columns):
    """Add what `pair_loss` needs: lengths (B, 2), and the probability (B,) that the label is wrong."""
    cfg = run.cfg
    if run.step == 0:
        is_hard = min(run.rows["target"]) == 1
        fits = is_hard or cfg.loss_type in ("sigmoid", "sigmoid_norm", "sigmoid,sft")
        require(fits, f"{cfg.data}: soft labels (target) are for loss_type sigmoid alone")
    lengths = [list(map(len, pair)) for pair in batch["responses"]]
    columns["lengths"] = torch.tensor(lengths, device=run.world.device)
    wrong = 1 - torch.tensor(batch["target"], device=run.world.device)
    epsilon = cfg.label_smoothing
    columns["smoothing"] = epsilon + (1 - 2 * epsilon) * wrong


def pair_loss(cfg, logprobs, micro):
    """Losses (B,) and implicit rewards (B, 2), as dpo.pair_loss."""
    rewards = cfg.beta * (logprobs - micro["ref_logprobs"])
    losses = torch.zeros_like(rewards[:, 0])
    for name, weight in weights_of(cfg).items():
        if name == "sft":
            continue  # dpo.py adds it
        scaled = rewards
        if name.endswith("_norm"):
            scaled = rewards / micro["lengths"]
        chosen, rejected = scaled.unbind(1)
        loss = LOSSES[name.removesuffix("_norm")]
        losses = losses + weight * loss(chosen, rejected, micro["smoothing"], cfg.beta)
    return losses, rewards


def main(cfg, loss=pair_loss, before_batch=before_batch):
    check_losses(cfg)
    sft_coef = cfg.sft_coef + weights_of(cfg).get("sft", 0.0)
    dpo.main(dataclasses.replace(cfg, sft_coef=sft_coef), loss=loss, before_batch=before_batch)


if __name__ == "__main__":
    main(configure(Config))

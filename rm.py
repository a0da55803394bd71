"""The reward model: a scalar head on the SFT model learns which of two responses people prefer.

    python rm.py config/toy_rm.py                                    # a CPU, a minute
    torchrun --nproc_per_node=8 rm.py config/rm_2.8b.py

The reward of a response is the scalar at its EOS token (detail 12). After training, the mean reward of the
SFT references is subtracted from the head's bias (detail 15): a pairwise loss gives that bias no gradient (but
rounding), and the critic that starts from this model inherits it. Writes out_dir/final and out_dir/eval.json.

Shapes: B rows in a micro-batch, K responses per row (2 for pairs), the best first; T tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import runtime
from configurator import configure
from data import Tokenizer, accuracy_table, batch_rows, last_scalars, load_rows
from model import ScalarModel


@dataclass
class Config(runtime.TrainConfig):
    model: str = "out/sft_1b/final"  # the SFT model: hub id or directory
    data: str = "vwxyzjn/summarize_from_feedback_oai_preprocessing_1706381144"  # hub id, directory or file with {split}
    batch_size: int = 64  # pairs per update, over all processes
    max_length: int = 638  # tokens of query + response; a longer row is an error; 0: any
    normalize_data: str = "vwxyzjn/summarize_from_feedback_tldr_3_filtered"  # references that get mean reward 0
    normalize_split: str = "train"


def preference_loss(chosen, rejected, target=1.0):
    """Bradley-Terry loss -(p log s(d) + (1 - p) log s(-d)) of rewards (B,), with d = chosen - rejected; returns (B,).

    target: the probability p that `chosen` is the better one; 0.5 is a tie. (arXiv:1706.03741; arXiv:2403.17031)
    """
    margin = chosen - rejected
    return -(target * F.logsigmoid(margin) + (1 - target) * F.logsigmoid(-margin))


def ranking_loss(rewards):
    """Mean over all pairs of K ranked responses, rewards (B, K) best first; returns (B,). (arXiv:2203.02155 eq. 1)"""
    better, worse = torch.triu_indices(rewards.shape[1], rewards.shape[1], offset=1)
    return preference_loss(rewards[:, better], rewards[:, worse]).mean(1)


def rewards_of(model, queries, responses, device):
    """Rewards (B, K) of the responses (B lists of K lists of ids) to queries (B lists), in one forward pass."""
    flat = [(query, response) for query, row in zip(queries, responses) for response in row]
    return last_scalars(model, device, *zip(*flat)).view(len(queries), -1)


def update(run, cfg, model, rows):
    """Accumulate the gradient of the batch `rows`; returns the batch's loss, accuracy and mean margin."""
    totals = {"loss/rm": 0.0, "train/accuracy": 0.0, "train/margin": 0.0}
    for index in run.share(rows["length"], cfg.micro_batch_size):
        queries, responses = ([rows[name][i] for i in index] for name in ("query", "responses"))
        rewards = rewards_of(model, queries, responses, run.device)  # (B, K)
        loss = ranking_loss(rewards).sum() / cfg.batch_size
        runtime.backward(run, loss)
        margin = (rewards[:, 0] - rewards[:, -1]).detach()
        totals["loss/rm"] += loss.detach()
        totals["train/accuracy"] += (margin > 0).sum() / cfg.batch_size
        totals["train/margin"] += margin.sum() / cfg.batch_size
    return run.sum(totals)


def predict(run, cfg, model, rows):
    """Rewards (n, K) of every row of a data set, on every rank."""

    def rewards(index):
        micro = rows[index]
        return {"rewards": rewards_of(model, micro["query"], micro["responses"], run.device)}

    return run.map_rows(rewards, rows["length"], cfg.micro_batch_size)["rewards"]


@torch.no_grad()
def normalize(run, cfg, model, rows):
    """Shift the head's bias so that the references `rows` have mean reward 0 (detail 15: the mean only, no gain).

    Returns their mean and standard deviation as they were before.
    """
    rewards = predict(run, cfg, model, rows).double()
    model.score.bias.sub_(rewards.mean().item())
    return {"normalize/mean": rewards.mean().item(), "normalize/std": rewards.std(correction=0).item()}


def main(cfg):
    run = runtime.start(cfg)
    if run is None:
        return
    tokenizer = Tokenizer.load(cfg.model)
    rows, held_out = runtime.load_splits(run, tokenizer, n_responses=2)
    total = runtime.count_updates(run, len(rows))
    with run.main_first():
        source, split = cfg.normalize_data, cfg.normalize_split
        references = source and load_rows(source, split, tokenizer, 1, max_query_tokens=cfg.max_query_tokens)
    model = runtime.load_model(run, ScalarModel, cfg.model, trainable=True, new_head=True)
    trained = nn.ModuleDict({"model": model})
    optimizer = runtime.make_optimizer(cfg, trained)
    for step in run.steps(runtime.resume(run, trained, optimizer)["step"], total):
        metrics = update(run, cfg, model, rows[batch_rows(len(rows), cfg.batch_size, step, cfg.seed)])
        metrics |= runtime.optimizer_step(run, optimizer, step, total)
        run.log(step, metrics, watch=("loss/rm", "train/accuracy"))
        runtime.save_checkpoint(run, step + 1, trained, optimizer)
    metrics = normalize(run, cfg, model, references) if references else {}
    table = {}
    if held_out:
        rewards = predict(run, cfg, model, held_out)
        table = accuracy_table(held_out, rewards[:, 0] - rewards[:, 1])
        metrics |= {"eval/accuracy": table["all"]["accuracy"], "eval/loss": ranking_loss(rewards).mean().item()}
    runtime.report(run, total, metrics, table)
    runtime.export(run, model, tokenizer)
    run.close()


if __name__ == "__main__":
    main(configure(Config))
